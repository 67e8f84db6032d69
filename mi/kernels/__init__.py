"""Kernels: pure functions with an optimized order of evaluation or backward pass."""
