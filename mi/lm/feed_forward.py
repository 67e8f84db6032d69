"""The feed-forward layer of a Transformer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.layers import Affine


def _swiglu(hidden: Array, gate: Array) -> Array:
    return jax.nn.silu(gate) * hidden


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    'swiglu': _swiglu,
    'relu': jax.nn.relu,
    'gelu': jax.nn.gelu,
}


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
            hidden = Affine(self.hidden, self.dtype, early_gradients=True, name='hidden')(x)
        else:
            hidden = self.fusion(self.hidden, dtype=self.dtype, name='fuse_ffn')(x, z)
        inputs = [hidden]
        if self.activation == 'swiglu':
            inputs.append(Affine(self.hidden, self.dtype, early_gradients=True, name='gate')(x))

        def apply_out(out: Affine, *inputs: Array) -> Array:
            return out(ACTIVATIONS[self.activation](*inputs))

        # The derivatives of silu and gelu and the gradient of A₂ need several arrays of the size of
        # the hidden layer. They are computed again in the backward pass. For relu, its output is
        # all that they need.
        if self.activation != 'relu':
            apply_out = nn.remat(apply_out)
        return apply_out(Affine(x.shape[-1], self.dtype, name='out'), *inputs)
