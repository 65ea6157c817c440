"""The fused divergences: LM head, temperature, teacher and loss in one pass, without logits."""
