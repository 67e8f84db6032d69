"""Multiplicative interactions for JAX: f(x, z) = zᵀWx + zᵀU + Vx + b and its family."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi.contract import bilinear as bilinear
    from mi.fusion import FUSIONS as FUSIONS
    from mi.layers import DiagonalMultiplicativeInteraction as DiagonalMultiplicativeInteraction
    from mi.layers import LowRankMultiplicativeInteraction as LowRankMultiplicativeInteraction
    from mi.layers import MultiplicativeInteraction as MultiplicativeInteraction

__version__ = '0.1.0'

_HOME = {
    'FUSIONS': 'mi.fusion',
    'DiagonalMultiplicativeInteraction': 'mi.layers',
    'LowRankMultiplicativeInteraction': 'mi.layers',
    'MultiplicativeInteraction': 'mi.layers',
    'bilinear': 'mi.contract',
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `python -m mi.report` starts without jax."""
    if name not in _HOME:
        raise AttributeError(f'module mi has no attribute {name!r}')
    return getattr(importlib.import_module(_HOME[name]), name)
