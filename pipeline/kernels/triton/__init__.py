"""The divergence sweeps as Triton programs, one program per row of logits."""
