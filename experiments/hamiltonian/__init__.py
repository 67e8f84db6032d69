"""Learned Hamiltonians of two streams, positions and momenta."""
