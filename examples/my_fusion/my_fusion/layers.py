"""A fusion with a gate between −1 and 1."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike


class TanhGate(nn.Module):
    """A multiplicative interaction with a gate, y = V x + b + tanh(C z) ⊙ A x.

    Attributes:
      features: number of features of y, k.
      dtype: dtype of the products; parameters are f32.
    """

    features: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Fuse x [..., n] with z [..., m] into y [..., k]."""
        gate = jnp.tanh(nn.Dense(self.features, use_bias=False, dtype=self.dtype, name='C')(z))
        gated = gate * nn.Dense(self.features, use_bias=False, dtype=self.dtype, name='A')(x)
        return nn.Dense(self.features, dtype=self.dtype, name='V')(x) + gated
