"""Vision targets: images, the encoders that look at them, and the caches of what they saw."""
