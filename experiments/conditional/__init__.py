"""Conditional statements and similarity metrics, with which the paper motivates MI."""
