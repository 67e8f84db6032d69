"""A convolution of images whose gradient is quick on XLA's CPU backend too.

    y[h, w] = Σ_ij x[s·h + i, s·w + j] W[i, j],   x [N, H, W, c], W [i, j, c, k]

That backend's gradient by the kernel is two to four times slower than a product of matrices for
each i, j, and that by the input of a stride four times slower than that of none. So a stride s
becomes channels first, a block of s × s pixels one pixel of s²·c channels, and ∂W is products.
Other backends have convolutions of their own and keep them. `benchmarks.rl`, row conv, measures it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

AXES = ('NHWC', 'HWIO', 'NHWC')
MANY = 32  # channels from which on products are the quicker way forward too


def convolve(
    lhs: Array,
    rhs: Array,
    window_strides: tuple[int, int],
    padding: Any,
    lhs_dilation: tuple[int, int] = (1, 1),
    rhs_dilation: tuple[int, int] = (1, 1),
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """`lax.conv_general_dilated` of images, as `nn.Conv(conv_general_dilated=convolve)` calls it.

    Dilated and grouped ones, and strides that do not divide the kernel, are left as they are.
    """
    options |= {'lhs_dilation': lhs_dilation, 'rhs_dilation': rhs_dilation}
    options |= {'feature_group_count': feature_group_count}

    def native(x: Array, W: Array) -> Array:
        return jax.lax.conv_general_dilated(x, W, window_strides, padding, **options)

    def products(x: Array, W: Array) -> Array:
        pads = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(x.shape[1:3], W.shape[:2], window_strides, padding)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return _valid(*_blocks(x, W, *window_strides))

    divides = all(size % s == 0 for size, s in zip(rhs.shape, window_strides, strict=False))
    if not divides or {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        return native(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=products, default=native)


def _blocks(x: Array, W: Array, s: int, t: int) -> tuple[Array, Array]:
    """x and W with blocks of s × t pixels as one."""
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
    """Compute the convolution of stride 1 without padding."""
    if x.shape[-1] < MANY:
        return _native(x, W)
    windows = [row for rows in _windows(x, W) for row in rows]
    return sum(a @ w for a, w in zip(windows, W.reshape(-1, *W.shape[2:]), strict=True))


def _forward(x: Array, W: Array) -> tuple[Array, tuple[Array, Array]]:
    return _valid(x, W), (x, W)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, W = kept
    _, by_input = jax.vjp(lambda x: _native(x, W), x)
    rows = dy.reshape(-1, dy.shape[-1])
    dW = [[a.reshape(-1, a.shape[-1]).T @ rows for a in row] for row in _windows(x, W)]
    return *by_input(dy), jnp.stack([jnp.stack(row) for row in dW])


_valid.defvjp(_forward, _backward)


def _native(x: Array, W: Array) -> Array:
    return jax.lax.conv_general_dilated(x, W, (1, 1), 'VALID', dimension_numbers=AXES)


def _windows(x: Array, W: Array) -> list[list[Array]]:
    """Yield the operand of each W[i, j], [N, h, w, c]."""
    (i, j), (height, width) = W.shape[:2], x.shape[1:3]
    h, w = height - i + 1, width - j + 1
    return [[x[:, a : a + h, b : b + w] for b in range(j)] for a in range(i)]
