"""Frozen image encoders: how each is loaded, fed and read, as an engine of its own."""
