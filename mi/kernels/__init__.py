"""Kernels: pure functions with their own order of evaluation or backward pass."""
