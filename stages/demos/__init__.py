"""What only the demos need: their models, pictures, arms and pages, and the two commands."""
