"""Multiplicative interactions for JAX: f(x, z) = zᵀWx + zᵀU + Vx + b and its family."""

from mi.contract import bilinear
from mi.fusion import FUSIONS
from mi.layers import (
    DiagonalMultiplicativeInteraction,
    LowRankMultiplicativeInteraction,
    MultiplicativeInteraction,
)

__version__ = '0.1.0'

__all__ = [
    'FUSIONS',
    'DiagonalMultiplicativeInteraction',
    'LowRankMultiplicativeInteraction',
    'MultiplicativeInteraction',
    'bilinear',
]
