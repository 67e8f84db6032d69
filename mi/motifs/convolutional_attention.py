"""Self-attention on a grid that can express a convolution, and a converter for convolutions."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import add_bias, interaction_init
from mi.motifs.attention import einsum


class ConvolutionalSelfAttention(nn.Module):
    """Self-attention on a grid with scores that depend only on the offset.

        y_q = Σ_h Σ_p softmax_p(v_hᵀ r_δ) V_h x_p + b,   δ = p − q
        v_h = −α_h (1, −2Δ_h1, −2Δ_h2),   r_δ = (‖δ‖², δ_1, δ_2)

    Source: Cordonnier et al., 2020. Up to a constant, v_hᵀ r_δ is −α_h ‖δ − Δ_h‖². Thus head h
    attends to the offset Δ_h, more sharply for a larger α_h. V_h [n, k] is the product of the
    paper's value and output matrices for head h.

    Since the score is a sum over the two axes of the grid, the softmax is the product of a softmax
    over rows and a softmax over columns. The weights of all pairs are never computed.

    If the offset leaves the grid, the head attends to the nearest position on the grid. With a
    large α, the module is a convolution with edge padding; see `convert_convolution`.

    Attributes:
      heads: H, the number of heads, which is K² for a K × K convolution.
      features: k, the number of output features.
      dtype, param_dtype: as in `Attention`.
      Delta_init: initializer of Δ [H, 2]. Defaults to N(0, 2) for every entry.
      alpha_init: initializer of α [H]. Defaults to ones.
    """

    heads: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    Delta_init: Initializer = initializers.normal(2**0.5)
    alpha_init: Initializer = initializers.ones

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return y [..., rows, columns, k] for x [..., rows, columns, n].

        Raises:
          ValueError: if x has fewer than three axes.
        """
        if x.ndim < 3:
            raise ValueError(f'x must be [..., rows, columns, n]; got {x.shape}')
        *_, num_rows, num_columns, input_size = x.shape
        Delta = self.param('Delta', self.Delta_init, (self.heads, 2), self.param_dtype)
        alpha = self.param('alpha', self.alpha_init, (self.heads,), self.param_dtype)
        V_shape = self.heads, input_size, self.features
        V = self.param('V', interaction_init('dense'), V_shape, self.param_dtype)
        b = self.param('b', initializers.zeros, (self.features,), self.param_dtype)

        # A softmax over rows and one over columns, applied one after the other.
        row_weights = _compute_axis_weights(num_rows, Delta[:, 0], alpha)
        column_weights = _compute_axis_weights(num_columns, Delta[:, 1], alpha)
        x, V, b = nn.dtypes.promote_dtype(x, V, b, dtype=self.dtype)
        mixture = einsum('hjc,...rcn->...hrjn', column_weights.astype(x.dtype), x).astype(x.dtype)
        mixture = einsum('hir,...hrjn->...ijhn', row_weights.astype(x.dtype), mixture)
        mixture = mixture.astype(x.dtype).reshape(*x.shape[:-1], self.heads * input_size)
        return add_bias(linear(mixture, V.reshape(-1, self.features)), b)


def _compute_axis_weights(num_positions: int, Delta: Array, alpha: Array) -> Array:
    """Return the softmax over keys of −α (δ² − 2Δδ), [H, query, key], in at least f32."""
    sum_dtype = accumulation_dtype(Delta)
    Delta, alpha = (param.astype(sum_dtype)[:, None, None] for param in (Delta, alpha))
    positions = jnp.arange(num_positions)
    delta = (positions[None] - positions[:, None]).astype(sum_dtype)[None]
    return jax.nn.softmax(-alpha * (delta**2 - 2 * Delta * delta))


def convert_convolution(
    kernel: Array, b: Array | None = None, alpha: float | Array = 100.0
) -> dict[str, Array]:
    """Return parameters with which `ConvolutionalSelfAttention` is this convolution (Theorem 1).

    Head h = K_2 i + j attends to (i − (K_1 − 1) // 2, j − (K_2 − 1) // 2), the offset of the kernel
    entry (i, j) under 'SAME' padding. The grid is padded with its edge instead of zeros, so the
    outputs agree wherever the kernel stays inside the grid. Each head's weights for all other
    positions are at most exp(−alpha).

    Args:
      kernel: the kernel, [K_1, K_2, n, k], as in `flax.linen.Conv`.
      b: the bias, [k], or None for zeros.
      alpha: α of all heads.

    Returns:
      The collection 'params' of the module with heads = K_1 K_2 and features = k.

    Raises:
      ValueError: if the kernel does not have four axes.
    """
    if kernel.ndim != 4:
        raise ValueError(f'kernel must be [K_1, K_2, n, k]; got {kernel.shape}')
    K_1, K_2, input_size, features = kernel.shape
    kernel_row, kernel_column = jnp.divmod(jnp.arange(K_1 * K_2), K_2)
    offsets = [kernel_row - (K_1 - 1) // 2, kernel_column - (K_2 - 1) // 2]
    return {
        'Delta': jnp.stack(offsets, axis=-1).astype(accumulation_dtype(kernel)),
        'alpha': jnp.full(K_1 * K_2, alpha),
        'V': kernel.reshape(K_1 * K_2, input_size, features),
        'b': jnp.zeros(features) if b is None else b,
    }
