"""Rate and distortion of a cache, shown before anything is paid for."""
