"""The feed-forward layer of a Transformer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.layers import Affine

ACTIVATIONS = ('swiglu', 'relu', 'gelu')


class FeedForward(nn.Module):
    """A feed-forward layer whose first product may be a fusion.

        y = A₂ (silu(Gx + g) ⊙ f(x, z)) + a    for the activation 'swiglu' (Shazeer, 2020)
        y = A₂ act(f(x, z)) + a                for all others

    f is a fusion, or an affine map of x, to `hidden` features.

    Attributes:
      hidden: number of features of f.
      activation: name of an activation in ACTIVATIONS.
      fusion: constructor of f, or None for an affine map of x.
      dtype: dtype of the products.
    """

    hidden: int
    activation: str = 'swiglu'
    fusion: Callable[..., nn.Module] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array | None) -> Array:
        """Map x [..., n] and z [..., m] to y [..., n], where only a fusion uses z."""
        if self.fusion is None:
            hidden = Affine(self.hidden, self.dtype, name='hidden')(x)
        else:
            hidden = self.fusion(self.hidden, dtype=self.dtype, name='fuse_ffn')(x, z)
        # For the derivatives of silu and gelu, JAX would save several arrays of this size, so they
        # are computed again in the backward pass. For that of relu, it saves a boolean per entry.
        if self.activation == 'swiglu':
            gate = Affine(self.hidden, self.dtype, name='gate')(x)
            hidden = jax.checkpoint(_apply_gate)(gate, hidden)
        elif self.activation == 'gelu':
            hidden = jax.checkpoint(jax.nn.gelu)(hidden)
        else:
            hidden = jax.nn.relu(hidden)
        return Affine(x.shape[-1], self.dtype, name='out')(hidden)


def _apply_gate(gate: Array, hidden: Array) -> Array:
    return jax.nn.silu(gate) * hidden
