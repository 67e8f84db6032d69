"""Comparison of a compressed full MI with a low-rank MI trained from scratch."""
