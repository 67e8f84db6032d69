"""Feature-wise modulation, and normalization layers whose scale and shift come from a context.

Shapes: input x [..., n], context z [..., m]. Leading axes of x and z broadcast. For images [B, H,
W, n], reshape a context [B, m] to [B, 1, 1, m].
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.layers import Affine, align_streams
from mi.motifs.gating import expand_mask


class FeatureWiseModulation(nn.Module):
    """Feature-wise linear modulation, FiLM (Perez et al., 2018): y = (1 + γ(z)) ⊙ x + β(z).

    γ and β are affine in z and start at zero, so y starts as x. `mi.motifs.conditioning.FiLM`
    applies an affine map to x first.

    Attributes:
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., n] for x [..., n] and z [..., m], whose leading axes broadcast."""
        x, z = align_streams(x, z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        affine = functools.partial(
            Affine, x.shape[-1], self.dtype, self.param_dtype, V_init=initializers.zeros
        )
        return (1 + affine(name='gamma')(z)) * x + affine(name='beta')(z)


class ConditionalLayerNorm(nn.Module):
    """Layer norm with scale and shift from the context: y = (1 + γ(z)) ⊙ LN(x) + β(z).

    LN normalizes over the features in f32 and has no parameters. γ and β are affine in z and start
    at zero (dynamic layer norm: Kim et al., 2017; adaLN: Peebles & Xie, 2023).

    Attributes:
      epsilon: constant added to the variance.
      dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., n] for x [..., n] and z [..., m], whose leading axes broadcast."""
        return FeatureWiseModulation(self.dtype, self.param_dtype, name='modulation')(
            _make_layer_norm(self.epsilon, self.dtype)(x), z
        )


class ConditionalBatchNorm(nn.Module):
    """Batch norm with scale and shift from the context: y = (1 + γ(z)) ⊙ BN(x) + β(z).

    In De Vries et al. (2017), γ and β change the scale and shift of a trained network. Here they
    change a scale of 1 and a shift of 0, are affine in z, and start at zero. BN normalizes over all
    axes but the last in f32. Its running mean and variance are in the collection 'batch_stats',
    under 'norm'.

    Attributes:
      use_running_average: whether to normalize by the running statistics. Set it either here or in
        the call.
      momentum: decay of the running statistics r: r ← momentum · r + (1 − momentum) · batch.
      epsilon: constant added to the variance.
      axis_name: name of the mapped axis over which statistics are averaged, as in `nn.BatchNorm`.
        All shards have equal weight, whatever their masks.
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
        """Return y [..., n] for x [..., n] and z [..., m].

        Args:
          x: the input.
          z: the context.
          use_running_average: set it either here or in the field.
          mask: [...], True at positions that count for the statistics. At least one must be True.
            None if all positions count.

        Raises:
          ValueError: if the leading axes do not broadcast, the mask does not match x, or
            `use_running_average` is set in neither place, or in both.
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
    """A residual block with adaptive layer norm (adaLN-Zero, Peebles & Xie, 2023).

        y = x + g(z) ⊙ F(LN(x) ⊙ (1 + s(z)) + b(z))

    A single affine map of silu(z) gives the shift b, the scale s and the gate g, in this order and
    [n] each. It starts at zero, so the block starts as the identity. LN is as in
    `ConditionalLayerNorm`.

    Attributes:
      F: a module or function [..., n] → [..., n]. The parameters of a module are under 'F'.
      epsilon: constant added to the variance.
      dtype, param_dtype: as in `MultiplicativeInteraction`. F has its own dtypes.
    """

    F: Callable[..., Array]
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array, *args: object, **kwargs: object) -> Array:
        """Return y [..., n] for x [..., n] and z [..., m].

        Args:
          x: the input.
          z: the context.
          *args, **kwargs: further arguments of F, such as an attention mask.

        Raises:
          ValueError: if the leading axes do not broadcast, or F changes the shape.
        """
        x, z = align_streams(x, z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        head = Affine(
            3 * x.shape[-1], self.dtype, self.param_dtype, V_init=initializers.zeros, name='head'
        )
        shift, scale, gate = jnp.split(head(nn.silu(z)), 3, axis=-1)
        inner = _make_layer_norm(self.epsilon, self.dtype)(x) * (1 + scale) + shift
        update = self.F(inner, *args, **kwargs)
        if update.shape != inner.shape:
            raise ValueError(
                f'F maps {inner.shape} to {update.shape}: expected the same shape, because its '
                'output is added to x'
            )
        return x + gate * update.astype(inner.dtype)


def _make_layer_norm(epsilon: float, dtype: DTypeLike | None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon, dtype, use_bias=False, use_scale=False, use_fast_variance=False, name='norm'
    )
