"""Small sequential recommenders in plain torch, one file each, and what they share."""
