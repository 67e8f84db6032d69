"""Learned Hamiltonians that fuse positions and momenta."""
