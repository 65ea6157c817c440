"""From cached records to batches: order, packing, collation, background decoding."""
