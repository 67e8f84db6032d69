"""The motifs of the field that are multiplicative interactions, as Linen modules.

Each is a case of f(x, z) = zᵀWx + zᵀU + Vx + b, or that with a nonlinearity around it: `mi.unify`
has the exact tensors.
"""
