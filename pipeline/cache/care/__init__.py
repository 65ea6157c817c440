"""Sealed caches looked after: shown, verified, audited, compared, repaired."""
