"""Learned Hamiltonians, which fuse positions and momenta."""
