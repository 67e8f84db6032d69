"""Conditional statements and similarity metrics, which the paper names as its motivation."""
