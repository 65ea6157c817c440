"""Records on disk: written in shards by many workers, sealed once, read by anybody."""
