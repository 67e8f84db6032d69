"""Linen modules for the common motifs that are multiplicative interactions.

Each is a special case of f(x, z) = zᵀWx + zᵀU + Vx + b, possibly with nonlinearities around it.
`mi.unify` computes the exact tensors.
"""
