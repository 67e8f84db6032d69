"""Linen modules for common motifs of neural networks that are multiplicative interactions.

Each motif is a special case of f(x, z) = zᵀWx + zᵀU + Vx + b, possibly with nonlinearities around
it. `mi.unify` computes the exact tensors.
"""
