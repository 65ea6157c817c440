"""Cached records become batches: order, packing, collation, decoding in the background."""
