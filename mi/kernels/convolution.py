"""A convolution of images whose gradient is fast on XLA's CPU backend too.

    y[h, w] = Σ_ij x[s·h + i, s·w + j] W[i, j],   x [N, H, W, c], W [i, j, c, k]

On that backend ∂y/∂W is slower than one matrix product for each i, j, and strides make ∂y/∂x slow.
So each block of s × s pixels becomes one pixel with s²·c channels, which leaves stride 1, and ∂W is
computed by products. Other backends use their own convolutions. `benchmarks.rl`, row conv, measures
both.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

AXES = ('NHWC', 'HWIO', 'NHWC')
MIN_PRODUCT_CHANNELS = 32  # from here on, products are faster in the forward pass too


def convolve(  # noqa: PLR0913 - the signature of jax.lax.conv_general_dilated
    lhs: Array,
    rhs: Array,
    window_strides: tuple[int, int],
    padding: Any,
    lhs_dilation: tuple[int, int] = (1, 1),
    rhs_dilation: tuple[int, int] = (1, 1),
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """Convolve images, with the signature that `nn.Conv(conv_general_dilated=…)` expects.

    Dilated and grouped convolutions, and strides that do not divide the kernel, are passed to
    `lax.conv_general_dilated`. Seven parameters, because that is its signature.
    """
    options |= {'lhs_dilation': lhs_dilation, 'rhs_dilation': rhs_dilation}
    options |= {'feature_group_count': feature_group_count}

    def convolve_natively(x: Array, W: Array) -> Array:
        return jax.lax.conv_general_dilated(x, W, window_strides, padding, **options)

    def multiply(x: Array, W: Array) -> Array:
        pads = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(x.shape[1:3], W.shape[:2], window_strides, padding)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return _valid(*_blocks(x, W, *window_strides))

    divides = all(size % s == 0 for size, s in zip(rhs.shape, window_strides, strict=False))
    if not divides or {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        return convolve_natively(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=multiply, default=convolve_natively)


def _blocks(x: Array, W: Array, s: int, t: int) -> tuple[Array, Array]:
    """Return x and W with each block of s × t pixels as one pixel."""
    N, height, width, c = x.shape
    i, j, _, k = W.shape
    height, width = height // s, width // t
    x = x[:, : height * s, : width * t].reshape(N, height, s, width, t, c)
    W = W.reshape(i // s, s, j // t, t, c, k)
    return (
        x.swapaxes(2, 3).reshape(N, height, width, s * t * c),
        W.swapaxes(1, 2).reshape(i // s, j // t, s * t * c, k),
    )


@jax.custom_vjp
def _valid(x: Array, W: Array) -> Array:
    """Convolve with stride 1 and without padding."""
    if x.shape[-1] < MIN_PRODUCT_CHANNELS:
        return _native(x, W)
    windows = [row for rows in _windows(x, W) for row in rows]
    taps = W.reshape(-1, *W.shape[2:])
    products = (window @ tap for window, tap in zip(windows, taps, strict=True))
    return functools.reduce(operator.add, products)


def _forward(x: Array, W: Array) -> tuple[Array, tuple[Array, Array]]:
    return _valid(x, W), (x, W)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, W = residuals
    _, input_vjp = jax.vjp(lambda x: _native(x, W), x)
    rows = dy.reshape(-1, dy.shape[-1])
    dW = [[a.reshape(-1, a.shape[-1]).T @ rows for a in row] for row in _windows(x, W)]
    return *input_vjp(dy), jnp.stack([jnp.stack(row) for row in dW])


_valid.defvjp(_forward, _backward)


def _native(x: Array, W: Array) -> Array:
    return jax.lax.conv_general_dilated(x, W, (1, 1), 'VALID', dimension_numbers=AXES)


def _windows(x: Array, W: Array) -> list[list[Array]]:
    """Return the window of x that each W[i, j] multiplies, [N, h, w, c]."""
    (i, j), (height, width) = W.shape[:2], x.shape[1:3]
    h, w = height - i + 1, width - j + 1
    return [[x[:, a : a + h, b : b + w] for b in range(j)] for a in range(i)]
