"""The definition: a teacher asked through plain transformers, one example at a time."""
