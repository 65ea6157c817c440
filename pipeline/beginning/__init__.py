"""A run file for data that somebody has: what is in it, what it will cost on this machine."""
