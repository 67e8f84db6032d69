"""Conditional statements and similarity metrics, which motivate MI in the paper."""
