"""Where the bytes of a cache lie: a directory, a bucket, a web server, a local copy."""
