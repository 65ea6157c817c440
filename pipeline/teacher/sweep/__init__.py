"""Hidden states become every logit signal of their rows: a definition and two fast paths."""
