"""`stillroom cache`: one module per group of verbs."""
