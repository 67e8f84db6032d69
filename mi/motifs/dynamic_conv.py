"""Convolutions whose kernel is a softmax, or made of the position, or of the example.

Shapes: x [..., T, C], T positions of C channels; H heads, K the width of a kernel, m the width of
the context z. Images: x [B, height, width, C].
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.bilinear import accumulation_dtype, linear
from mi.layers import Context, align_streams, check_dense, context_init
from mi.motifs.gating import expand_mask


class LightweightConvolution(nn.Module):
    """A depthwise convolution with a softmaxed kernel that the channels of a head share.

        y_tc = Σ_j softmax(W_h)_j x_{t+j−l, c},   h the head of channel c,  W [H, K]

    l = K − 1 where causal and ⌊K/2⌋ where centred. Beyond the ends x is zero, as in the authors'
    code, so that near an end part of the kernel's mass falls outside. Wu et al., Pay Less Attention
    with Lightweight and Dynamic Convolutions, 2019; their affine maps and GLU around it are not
    part of it.

    Attributes:
      heads: H; a divisor of C.
      width: K.
      causal: whether y_t sees x_t and what is before it only; otherwise the kernel is centred.
      dropconnect: rate at which entries of the softmaxed kernel are dropped, the others divided by
        1 − rate; needs the rng 'dropout'.
      dtype: of the computation; None for the promoted dtype of inputs and parameters. The softmax
        and the sum over the kernel are f32 at least.
      param_dtype: of the parameters.
    """

    heads: int
    width: int
    causal: bool = False
    dropconnect: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, deterministic: bool = True) -> Array:
        """x [..., T, C] → [..., T, C].

        Args:
          x: the input.
          mask: [..., T], true where x is valid; elsewhere x counts as zero. None for all valid.
          deterministic: whether DropConnect is off.

        Raises:
          ValueError: if the shapes do not fit or the heads do not divide the channels.
        """
        _check(self.heads, self.width, x)
        W = self.param(
            'W', initializers.glorot_uniform(), (self.heads, self.width), self.param_dtype
        )
        x = x.astype(nn.dtypes.canonicalize_dtype(x, W, dtype=self.dtype))
        kernel = jax.nn.softmax(W.astype(accumulation_dtype(x)))
        kernel = nn.Dropout(self.dropconnect, deterministic=deterministic)(kernel)
        kernel = kernel.reshape((1,) * (x.ndim - 1) + W.shape)
        return convolve(jnp.where(expand_mask(x, mask), x, 0), kernel, self.causal)


class DynamicConvolution(nn.Module):
    """A lightweight convolution whose kernel is made anew at every position.

        y_tc = Σ_j softmax(z_tᵀQ_h)_j x_{t+j−l, c},   z_t = x_t if there is no other context

    Q [m, H·K]. Wu et al., 2019, as `LightweightConvolution`: so are l, the ends and what is not
    part of it. Memory is O(T · (C + H · K)): no windows of x are kept.

    Attributes:
      heads, width, causal, dropconnect, dtype, param_dtype: as in `LightweightConvolution`; with
        DropConnect, each position drops its own entries.
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
        """x [..., T, C] → [..., T, C].

        Args:
          x: the input.
          z: [..., T, m], or [..., 1, m] for one kernel at all positions; leading axes broadcast
            with those of x. None for x.
          mask: [..., T], true where x is valid; elsewhere x counts as zero. None for all valid.
          deterministic: whether DropConnect is off.

        Raises:
          ValueError: if the shapes do not fit or the heads do not divide the channels.
        """
        _check(self.heads, self.width, x)
        x, z = align_streams(x, x if z is None else z)
        if z.shape[-2] not in (1, x.shape[-2]):
            raise ValueError(
                f'z {z.shape} has {z.shape[-2]} positions, x {x.shape} has {x.shape[-2]}; '
                f'give z as many, or 1'
            )
        Q = self.param(
            'Q',
            initializers.glorot_uniform(),
            (z.shape[-1], self.heads * self.width),
            self.param_dtype,
        )
        x, z, Q = nn.dtypes.promote_dtype(x, z, Q, dtype=self.dtype)
        logits = linear(z, Q, out_dtype=accumulation_dtype(x))
        kernel = jax.nn.softmax(logits.reshape(*z.shape[:-1], self.heads, self.width))
        kernel = nn.Dropout(self.dropconnect, deterministic=deterministic)(kernel)
        return convolve(jnp.where(expand_mask(x, mask), x, 0), kernel, self.causal)


class ConditionalConvolution(nn.Module):
    """A 2-D convolution with a kernel for each example, mixed from experts (CondConv).

        y = (Σ_i g_i K_i) ∗ x + Σ_i g_i b_i,   g = σ(zᵀG + a),   z = the mean of x if not given

    K [E, kh, kw, C, k], b [E, k], G [m, E], a [E]. Yang et al., CondConv: Conditionally
    Parameterized Convolutions for Efficient Inference, 2019. G starts small (zᵀG has variance
    1/100), so that g starts near ½, and the experts are drawn apart, each with variance
    4 / (E · kh · kw · C): where no padding is seen, y has unit variance for unit-variance x.

    Attributes:
      features: k.
      kernel_size: (kh, kw); one number for both.
      experts: E.
      strides: (sh, sw); one number for both.
      padding: 'SAME', 'VALID', or (before, after) of each of both axes.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`; the routing is f32 at least.
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
        """x [B, height, width, C], z [B, m] or None → [B, height', width', k].

        Raises:
          ValueError: if the shapes do not fit or the padding is unknown.
        """
        if x.ndim != 4:
            raise ValueError(f'x must be [B, height, width, C]; got {x.shape}')
        if z is None:
            z = x.mean((1, 2), dtype=accumulation_dtype(x))
        check_dense(z)
        if z.ndim != 2 or z.shape[0] != x.shape[0]:
            raise ValueError(f'z must be [B, m] with B = {x.shape[0]} as in x; got {z.shape}')
        kh, kw = _pair(self.kernel_size)
        B, C, E, k = x.shape[0], x.shape[-1], self.experts, self.features
        each = initializers.variance_scaling(4 / E, 'fan_in', 'truncated_normal', batch_axis=0)
        K = self.param('K', each, (E, kh, kw, C, k), self.param_dtype)
        b = self.param('b', initializers.zeros, (E, k), self.param_dtype)
        G_init = context_init(self.context, 0.01)
        G = self.param('G', G_init, (z.shape[-1], E), self.param_dtype)
        a = self.param('a', initializers.zeros, (E,), self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, K, b, dtype=self.dtype)
        wide = accumulation_dtype(dtype)
        z, G, a = nn.dtypes.promote_dtype(z, G, a, dtype=wide)
        g = nn.sigmoid(linear(z, G) + a[None])
        x, g, K, b = nn.dtypes.promote_dtype(x, g, K, b, dtype=dtype)
        kernels = linear(g, K.reshape(E, -1)).reshape(B, kh * kw * C, k)
        # XLA has a grouped convolution for this; its gradient takes 30 times as long on CPU.
        patches = _windows(x, (kh, kw), _pair(self.strides), self.padding)
        y = jnp.einsum('bhwp,bpk->bhwk', patches, kernels, preferred_element_type=wide)
        return y.astype(x.dtype) + linear(g, b).reshape(B, 1, 1, k)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.checkpoint, static_argnums=2)
def convolve(x: Array, kernel: Array, causal: bool) -> Array:
    """y_tc = Σ_j kernel_thj x_{t+j−l, c}: x [..., T, C], kernel [..., T or 1, H, K].

    One shifted copy of x after another, which XLA fuses, and none kept for the backward pass;
    summed in the dtype of the kernel, f32 at least, and returned in that of x.
    """
    (T, C), (H, K) = x.shape[-2:], kernel.shape[-2:]
    left = K - 1 if causal else K // 2
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(left, K - 1 - left), (0, 0)])
    x = x.reshape(*x.shape[:-1], H, C // H)
    terms = (kernel[..., j, None] * x[..., j : j + T, :, :] for j in range(K))
    y = sum(terms, start=jnp.zeros((), kernel.dtype)).astype(x.dtype)
    return y.reshape(*y.shape[:-2], C)


def _windows(
    x: Array,
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
) -> Array:
    """x [B, height, width, C] → [B, height', width', kh · kw · C], the window of every output.

    Raises:
      ValueError: on an unknown padding, or if the window is larger than the padded image.
    """
    if isinstance(padding, str):
        if padding not in ('SAME', 'VALID'):
            raise ValueError(
                f"unknown padding {padding!r}; give 'SAME', 'VALID' or pairs of numbers"
            )
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    (kh, kw), (sh, sw) = size, strides
    rows, columns = x.shape[1] - kh, x.shape[2] - kw
    if rows < 0 or columns < 0:
        raise ValueError(f'the kernel {size} is larger than the padded image {x.shape[1:3]}')
    return jnp.concatenate(
        [
            x[:, i : i + rows + 1 : sh, j : j + columns + 1 : sw]
            for i in range(kh)
            for j in range(kw)
        ],
        axis=-1,
    )


def _check(heads: int, width: int, x: Array) -> None:
    if x.ndim < 2:
        raise ValueError(f'x must be [..., T, C]; got {x.shape}')
    if heads < 1 or x.shape[-1] % heads:
        raise ValueError(
            f'heads = {heads} does not divide the {x.shape[-1]} channels of x {x.shape}; '
            f'give a divisor'
        )
    if width < 1:
        raise ValueError(f'width = {width}: a kernel is at least 1 wide')


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
