"""Sources become documents, documents become tokens and masks, tokens become examples."""
