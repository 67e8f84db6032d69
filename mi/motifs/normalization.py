"""Feature-wise modulation, and the normalisation layers whose scale and shift it makes.

Shapes: x [..., n] the input, z [..., m] the context. Leading axes of x and z broadcast; a context
[B, m] of images [B, H, W, n] comes as [B, 1, 1, m].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.layers import Affine, align_streams
from mi.motifs.gating import expand_mask


class FeatureWiseModulation(nn.Module):
    """Feature-wise linear modulation, FiLM (Perez et al., 2018): y = (1 + γ(z)) ⊙ x + β(z).

    γ and β are affine in z and start at zero, so that y starts as x. `mi.motifs.conditioning.FiLM` has an affine
    map of x before it.

    Attributes:
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., n]; ValueError if the leading axes do not broadcast."""
        x, z = align_streams(x, z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        affine = functools.partial(
            Affine, x.shape[-1], self.dtype, self.param_dtype, V_init=initializers.zeros
        )
        return (1 + affine(name='gamma')(z)) * x + affine(name='beta')(z)


class ConditionalLayerNorm(nn.Module):
    """Layer norm with scale and shift from the context: y = (1 + γ(z)) ⊙ LN(x) + β(z).

    LN normalises over the features, in f32, and has no parameters; γ and β are affine in z and
    start at zero (dynamic layer norm: Kim et al., 2017; adaLN: Peebles & Xie, 2023).

    Attributes:
      epsilon: added to the variance.
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., n]; ValueError if the leading axes do not broadcast."""
        return FeatureWiseModulation(self.dtype, self.param_dtype, name='modulation')(
            _layer_norm(self.epsilon, self.dtype)(x), z
        )


class ConditionalBatchNorm(nn.Module):
    """Batch norm with scale and shift from the context: y = (1 + γ(z)) ⊙ BN(x) + β(z).

    De Vries et al. (2017), where γ and β are changes to those of a trained network; here they are
    changes to 1 and 0, affine in z, and start at zero. BN normalises over all axes but the last, in
    f32; its running mean and variance are in the collection 'batch_stats', under 'norm'.

    Attributes:
      use_running_average: whether to normalise by the running statistics; here or in the call.
      momentum: of the running statistics, r ← momentum · r + (1 − momentum) · batch.
      epsilon: added to the variance.
      axis_name: of the mapped axis over which statistics are shared, as in `nn.BatchNorm`; all
        shares weigh the same, whatever their masks.
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """x [..., n], z [..., m] → [..., n].

        Args:
          x: the input.
          z: the context.
          use_running_average: in the call or in the field, and not in both.
          mask: [...], true at the positions that the statistics are over, one at least; None for
            all.

        Raises:
          ValueError: if the leading axes do not broadcast, the mask does not fit, or
            `use_running_average` is given nowhere or twice.
        """
        norm = nn.BatchNorm(
            use_running_average=self.use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            use_scale=False,
            use_bias=False,
            axis_name=self.axis_name,
            use_fast_variance=False,
            name='norm',
        )
        valid = None if mask is None else expand_mask(x, mask)
        return FeatureWiseModulation(self.dtype, self.param_dtype, name='modulation')(
            norm(x, use_running_average, mask=valid), z
        )


class AdaLNZero(nn.Module):
    """A residual block under a context (Peebles & Xie, 2023, DiT):

        y = x + g(z) ⊙ F(LN(x) ⊙ (1 + s(z)) + b(z))

    b, s and g, [n] each and in this order, are one affine map of silu(z). It starts at zero, so
    that the block starts as the identity. LN as in `ConditionalLayerNorm`.

    Attributes:
      F: [..., n] → [..., n], a module or a function; the module's parameters are under 'F'.
      epsilon: added to the variance.
      dtype, param_dtype: as in `MultiplicativeInteraction`; F has its own.
    """

    F: Callable[..., Array]
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array, *args: Any, **kwargs: Any) -> Array:
        """x [..., n], z [..., m] → [..., n].

        Args:
          x: the input.
          z: the context.
          *args, **kwargs: passed on to F, as a mask for attention.

        Raises:
          ValueError: if the leading axes do not broadcast, or F changes the shape.
        """
        x, z = align_streams(x, z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        head = Affine(
            3 * x.shape[-1], self.dtype, self.param_dtype, V_init=initializers.zeros, name='head'
        )
        b, s, g = jnp.split(head(nn.silu(z)), 3, axis=-1)
        h = _layer_norm(self.epsilon, self.dtype)(x) * (1 + s) + b
        y = self.F(h, *args, **kwargs)
        if y.shape != h.shape:
            raise ValueError(
                f'F maps {h.shape} to {y.shape}; its output is added to x, so keep the shape'
            )
        return x + g * y.astype(h.dtype)


def _layer_norm(epsilon: float, dtype: DTypeLike | None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon, dtype, use_bias=False, use_scale=False, use_fast_variance=False, name='norm'
    )
