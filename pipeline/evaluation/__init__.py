"""How good a student is: held-out text against the live teacher, and probes of its layers."""
