"""Convolutions with a softmax kernel, or with a different kernel per position or example.

Shapes: x [..., T, C] has T positions with C channels. H is the number of heads, K is the width of a
kernel, and m is the width of the context z. Images are x [B, height, width, C].
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import Context, align_streams, check_dense, context_init, expand_rank, stacked_init
from mi.motifs.gating import expand_mask


class LightweightConvolution(nn.Module):
    """A depthwise convolution with a softmax kernel that is shared by the channels of a head.

        y_tc = Σ_j softmax(W_h)_j x_{t+j−l, c},   h = head of channel c,  W [H, K]

    l is K − 1 for a causal kernel and ⌊K/2⌋ for a centered kernel. As in the authors' code, x is
    zero beyond its ends, so part of the kernel's mass is lost near an end. The affine maps and the
    GLU of the paper's block are not included. Source: Wu et al., Pay Less Attention with
    Lightweight and Dynamic Convolutions, 2019.

    Attributes:
      heads: H, the number of heads, which must divide C.
      width: K, the width of the kernel.
      causal: whether y_t only depends on x_t and earlier positions. Otherwise the kernel is
        centered.
      dropconnect: rate at which entries of the softmax kernel are dropped. The other entries are
        divided by 1 − rate. Requires the rng 'dropout'.
      dtype: dtype of the computation. Defaults to the promoted dtype of inputs and parameters. The
        softmax and the sum over the kernel are in at least f32.
      param_dtype: dtype of the parameters.
    """

    heads: int
    width: int
    causal: bool = False
    dropconnect: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, deterministic: bool = True) -> Array:
        """Return y [..., T, C] for x [..., T, C].

        Args:
          x: the input.
          mask: [..., T], True where x is valid. Elsewhere x is treated as zero. None if all
            positions are valid.
          deterministic: whether to disable DropConnect.

        Raises:
          ValueError: if the shapes do not match or the heads do not divide the channels.
        """
        _check_sizes(self.heads, self.width, x)
        W_shape = self.heads, self.width
        W = self.param('W', initializers.glorot_uniform(), W_shape, self.param_dtype)
        x = x.astype(nn.dtypes.canonicalize_dtype(x, W, dtype=self.dtype))
        kernel = jax.nn.softmax(W.astype(accumulation_dtype(x)))
        kernel = nn.Dropout(self.dropconnect, deterministic=deterministic)(kernel)
        kernel = expand_rank(kernel, x.ndim + 1)
        return convolve(jnp.where(expand_mask(x, mask), x, 0), kernel, self.causal)


class DynamicConvolution(nn.Module):
    """A lightweight convolution with a different kernel at every position.

        y_tc = Σ_j softmax(z_tᵀQ_h)_j x_{t+j−l, c},   z_t = x_t if no z is given

    Q is [m, H·K]. The source, l and the ends are as in `LightweightConvolution`. Memory is O(T · (C
    + H · K)), because windows of x are not stored.

    Attributes:
      heads, width, causal, dropconnect, dtype, param_dtype: as in `LightweightConvolution`, except
        that DropConnect draws a mask for each position.
    """

    heads: int
    width: int
    causal: bool = False
    dropconnect: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None = None,
        mask: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Return y [..., T, C] for x [..., T, C].

        Args:
          x: the sequence that is convolved.
          z: the context, [..., T, m], or [..., 1, m] for the same kernel at all positions. Its
            leading axes broadcast against those of x. Defaults to x.
          mask: [..., T], True where x is valid. Elsewhere x is treated as zero. None if all
            positions are valid.
          deterministic: whether to disable DropConnect.

        Raises:
          ValueError: if the shapes do not match or the heads do not divide the channels.
        """
        _check_sizes(self.heads, self.width, x)
        x, z = align_streams(x, x if z is None else z)
        if z.shape[-2] not in (1, x.shape[-2]):
            raise ValueError(
                f'z {z.shape}: expected {x.shape[-2]} positions, as in x {x.shape}, or 1; got '
                f'{z.shape[-2]}'
            )
        Q_shape = z.shape[-1], self.heads * self.width
        Q = self.param('Q', initializers.glorot_uniform(), Q_shape, self.param_dtype)
        x, z, Q = nn.dtypes.promote_dtype(x, z, Q, dtype=self.dtype)
        logits = linear(z, Q, out_dtype=accumulation_dtype(x))
        kernel = jax.nn.softmax(logits.reshape(*z.shape[:-1], self.heads, self.width))
        kernel = nn.Dropout(self.dropconnect, deterministic=deterministic)(kernel)
        return convolve(jnp.where(expand_mask(x, mask), x, 0), kernel, self.causal)


class ConditionalConvolution(nn.Module):
    """A 2-D convolution whose kernel is mixed from experts for each example (CondConv).

        y = (Σ_i g_i K_i) ∗ x + Σ_i g_i b_i,   g = σ(zᵀG + a),   by default z = the mean of x

    The parameters are K [E, kh, kw, C, k], b [E, k], G [m, E] and a [E]. G starts small, with a
    variance of 1/100 for zᵀG, so g starts near ½. The experts are independent, each with variance 4
    / (E · kh · kw · C), so that y has unit variance for unit-variance x, except near the padding.
    Source: Yang et al., CondConv: Conditionally Parameterized Convolutions for Efficient Inference,
    2019.

    Attributes:
      features: k, the number of output channels.
      kernel_size: (kh, kw), or one number for both.
      experts: E, the number of experts.
      strides: strides along the height and the width, or one number for both.
      padding: 'SAME', 'VALID', or a pair (before, after) for each axis.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`, but routing is in at least
        f32.
    """

    features: int
    kernel_size: int | tuple[int, int]
    experts: int = 4
    strides: int | tuple[int, int] = 1
    padding: Literal['SAME', 'VALID'] | Sequence[tuple[int, int]] = 'SAME'
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> Array:
        """Return y [B, height', width', k] for x [B, height, width, C] and z [B, m].

        Raises:
          ValueError: if the shapes do not match or the padding is unknown.
        """
        if x.ndim != 4:
            raise ValueError(f'x must be [B, height, width, C]; got {x.shape}')
        if z is None:
            z = x.mean((1, 2), dtype=accumulation_dtype(x))
        check_dense(z)
        if z.ndim != 2 or z.shape[0] != x.shape[0]:
            raise ValueError(f'z must be [B, m] with B = {x.shape[0]}, as in x; got {z.shape}')

        # Parameters.
        window_shape, strides = _make_pair(self.kernel_size), _make_pair(self.strides)
        K_shape = self.experts, *window_shape, x.shape[-1], self.features
        K = self.param('K', stacked_init(4 / self.experts), K_shape, self.param_dtype)
        b = self.param('b', initializers.zeros, (self.experts, self.features), self.param_dtype)
        G_shape = z.shape[-1], self.experts
        G = self.param('G', context_init(self.context, 0.01), G_shape, self.param_dtype)
        a = self.param('a', initializers.zeros, (self.experts,), self.param_dtype)

        # A kernel for each example, applied to its windows.
        dtype = nn.dtypes.canonicalize_dtype(x, K, b, dtype=self.dtype)
        sum_dtype = accumulation_dtype(dtype)
        z, G, a = nn.dtypes.promote_dtype(z, G, a, dtype=sum_dtype)
        g = nn.sigmoid(linear(z, G) + a[None])
        x, g, K, b = nn.dtypes.promote_dtype(x, g, K, b, dtype=dtype)
        window_size = math.prod(K_shape[1:-1])
        kernels = linear(g, K.reshape(self.experts, -1))
        kernels = kernels.reshape(len(x), window_size, self.features)
        # XLA's grouped convolution would do this, but its gradient is slow on CPU.
        windows = _extract_windows(x, window_shape, strides, self.padding)
        output = jnp.einsum('bhwp,bpk->bhwk', windows, kernels, preferred_element_type=sum_dtype)
        return output.astype(x.dtype) + linear(g, b).reshape(len(x), 1, 1, self.features)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.checkpoint, static_argnums=2)
def convolve(x: Array, kernel: Array, causal: bool) -> Array:
    """Compute y_tc = Σ_j kernel_thj x_{t+j−l, c} for x [..., T, C] and kernel [..., T or 1, H, K].

    The sum runs over shifted copies of x, which XLA fuses and the backward pass recomputes. The sum
    has the dtype of the kernel, which is at least f32, and the output has the dtype of x.
    """
    num_positions, num_channels = x.shape[-2:]
    heads, width = kernel.shape[-2:]
    left_padding = width - 1 if causal else width // 2
    padding = left_padding, width - 1 - left_padding
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [padding, (0, 0)])
    x = x.reshape(*x.shape[:-1], heads, num_channels // heads)
    terms = (kernel[..., j, None] * x[..., j : j + num_positions, :, :] for j in range(width))
    output = sum(terms, start=jnp.zeros((), kernel.dtype)).astype(x.dtype)
    return output.reshape(*output.shape[:-2], num_channels)


def _extract_windows(
    x: Array,
    window_shape: tuple[int, int],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
) -> Array:
    """Return the window of x for every output position, [B, height', width', kh · kw · C].

    Raises:
      ValueError: if the padding is unknown, or the window is larger than the padded image.
    """
    # Pad, so that every window is inside of the image.
    if isinstance(padding, str):
        if padding not in ('SAME', 'VALID'):
            raise ValueError(
                f"unknown padding {padding!r}: expected 'SAME', 'VALID' or pairs of numbers"
            )
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window_shape, strides, padding)
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    last_row, last_column = x.shape[1] - window_shape[0], x.shape[2] - window_shape[1]
    if last_row < 0 or last_column < 0:
        raise ValueError(
            f'kernel_size = {window_shape}: expected at most the size of the padded image, '
            f'{x.shape[1:3]}'
        )

    # One strided slice per position of the kernel, in the order of its entries [kh, kw, C].
    return jnp.concatenate(
        [
            x[:, i : i + last_row + 1 : strides[0], j : j + last_column + 1 : strides[1]]
            for i in range(window_shape[0])
            for j in range(window_shape[1])
        ],
        axis=-1,
    )


def _check_sizes(heads: int, width: int, x: Array) -> None:
    if x.ndim < 2:
        raise ValueError(f'x must be [..., T, C]; got {x.shape}')
    if heads < 1 or x.shape[-1] % heads:
        raise ValueError(
            f'heads = {heads}: expected a positive divisor of the {x.shape[-1]} channels of '
            f'x {x.shape}'
        )
    if width < 1:
        raise ValueError(f'width = {width}: expected at least 1')


def _make_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
