"""Multiplicative interactions for JAX: f(x, z) = zᵀWx + zᵀU + Vx + b and its family."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi.compress import compress as compress
    from mi.find import find as find
    from mi.fusion import FUSIONS as FUSIONS
    from mi.kernels.bilinear import bilinear as bilinear
    from mi.layers import BlockMultiplicativeInteraction as BlockMultiplicativeInteraction
    from mi.layers import DiagonalMultiplicativeInteraction as DiagonalMultiplicativeInteraction
    from mi.layers import LowRankMultiplicativeInteraction as LowRankMultiplicativeInteraction
    from mi.layers import MultiHead as MultiHead
    from mi.layers import MultiplicativeInteraction as MultiplicativeInteraction
    from mi.layers import ScalarMultiplicativeInteraction as ScalarMultiplicativeInteraction
    from mi.layers import TuckerMultiplicativeInteraction as TuckerMultiplicativeInteraction
    from mi.unify import as_mi as as_mi
    from mi.unify import explain as explain

__version__ = '0.1.0'

_MODULES = {
    'FUSIONS': 'mi.fusion',
    'BlockMultiplicativeInteraction': 'mi.layers',
    'DiagonalMultiplicativeInteraction': 'mi.layers',
    'LowRankMultiplicativeInteraction': 'mi.layers',
    'MultiHead': 'mi.layers',
    'MultiplicativeInteraction': 'mi.layers',
    'ScalarMultiplicativeInteraction': 'mi.layers',
    'TuckerMultiplicativeInteraction': 'mi.layers',
    'as_mi': 'mi.unify',
    'bilinear': 'mi.kernels.bilinear',
    'compress': 'mi.compress',
    'explain': 'mi.unify',
    'find': 'mi.find',
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `python -m mi.report` starts without jax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'mi' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
