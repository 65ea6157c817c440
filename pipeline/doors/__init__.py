"""Ways in for the trainers, loops and files that people already have."""
