"""Compositional generalization over pairs of modules."""
