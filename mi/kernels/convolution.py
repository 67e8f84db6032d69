"""A convolution of images whose gradient is also fast on XLA's CPU backend.

    y[h, w] = Σ_ij x[s·h + i, s·w + j] W[i, j],   x [N, H, W, c], W [i, j, c, k]

On that backend, computing ∂W is slower than one matrix product for each (i, j), and strides make ∂x
slow. Therefore each block of s × s pixels becomes one pixel with s²·c channels, which leaves a
stride of 1, and ∂W is computed by matrix products. Other backends use their own convolutions. The
row `conv` of `benchmarks.rl` measures both.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mi.kernels.linear import accumulate, accumulation_dtype, mesh_platform

AXES = ('NHWC', 'HWIO', 'NHWC')
MIN_PRODUCT_CHANNELS = 32  # from here on, products are faster in the forward pass too


def convolve(  # noqa: PLR0913 - nn.Conv calls it as jax.lax.conv_general_dilated
    lhs: Array,
    rhs: Array,
    window_strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: tuple[int, int] = (1, 1),
    rhs_dilation: tuple[int, int] = (1, 1),
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """Convolve images, with the signature that `nn.Conv(conv_general_dilated=…)` expects.

    Dilated and grouped convolutions, those with a `preferred_element_type`, and strides that do not
    divide the kernel are passed to `lax.conv_general_dilated`.
    """
    options |= {'lhs_dilation': lhs_dilation, 'rhs_dilation': rhs_dilation}
    options |= {'feature_group_count': feature_group_count}

    # Two ways to convolve: XLA's own, and matrix products.
    def convolve_natively(x: Array, W: Array) -> Array:
        return jax.lax.conv_general_dilated(x, W, window_strides, padding, **options)

    def convolve_by_products(x: Array, W: Array) -> Array:
        margins = padding
        if isinstance(margins, str):
            margins = jax.lax.padtype_to_pads(x.shape[1:3], W.shape[:2], window_strides, margins)
        x = jnp.pad(x, ((0, 0), *margins, (0, 0)))
        return _convolve_valid(*_merge_blocks(x, W, *window_strides))

    # Products only serve plain convolutions on CPU.
    sizes_and_strides = zip(rhs.shape, window_strides, strict=False)
    is_divisible = all(size % stride == 0 for size, stride in sizes_and_strides)
    is_plain = {*lhs_dilation, *rhs_dilation, feature_group_count} == {1}
    has_dtype = options.get('preferred_element_type') is not None
    if not (is_divisible and is_plain) or has_dtype:
        return convolve_natively(lhs, rhs)
    platform = mesh_platform()
    if platform is None:  # A program for several platforms has both.
        return jax.lax.platform_dependent(
            lhs, rhs, cpu=convolve_by_products, default=convolve_natively
        )
    return convolve_by_products(lhs, rhs) if platform == 'cpu' else convolve_natively(lhs, rhs)


def _merge_blocks(x: Array, W: Array, block_height: int, block_width: int) -> tuple[Array, Array]:
    """Return x and W with each block of pixels merged into one pixel."""
    num_images, height, width, channels = x.shape
    kernel_height, kernel_width, _, features = W.shape
    block_channels = block_height * block_width * channels

    # How many blocks an image and the kernel have.
    rows, columns = height // block_height, width // block_width
    kernel_rows, kernel_columns = kernel_height // block_height, kernel_width // block_width

    # Move the axes within a block next to the channels.
    x = x[:, : rows * block_height, : columns * block_width]
    x = x.reshape(num_images, rows, block_height, columns, block_width, channels)
    W = W.reshape(kernel_rows, block_height, kernel_columns, block_width, channels, features)
    return (
        x.swapaxes(2, 3).reshape(num_images, rows, columns, block_channels),
        W.swapaxes(1, 2).reshape(kernel_rows, kernel_columns, block_channels, features),
    )


@jax.custom_vjp
def _convolve_valid(x: Array, W: Array) -> Array:
    """Convolve with stride 1 and without padding."""
    if x.shape[-1] < MIN_PRODUCT_CHANNELS:
        return _convolve_valid_natively(x, W)
    windows = [window for window_row in _list_windows(x, W) for window in window_row]
    taps = W.reshape(-1, *W.shape[2:])
    # Sum in f32, and round once.
    multiply = functools.partial(jnp.matmul, preferred_element_type=accumulation_dtype(x, W))
    products = map(multiply, windows, taps)
    return functools.reduce(operator.add, products).astype(jnp.result_type(x, W))


def _convolve_valid_forward(x: Array, W: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_valid(x, W), (x, W)


def _convolve_valid_backward(
    residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, W = residuals
    compute_x_cotangent = jax.linear_transpose(lambda x: _convolve_valid_natively(x, W), x)
    cotangent_rows = cotangent.reshape(-1, cotangent.shape[-1])
    W_cotangent = [
        [
            accumulate(jnp.matmul, window.reshape(-1, window.shape[-1]).T, cotangent_rows)
            for window in window_row
        ]
        for window_row in _list_windows(x, W)
    ]
    return *compute_x_cotangent(cotangent), jnp.stack([jnp.stack(row) for row in W_cotangent])


_convolve_valid.defvjp(_convolve_valid_forward, _convolve_valid_backward)


def _convolve_valid_natively(x: Array, W: Array) -> Array:
    return jax.lax.conv_general_dilated(x, W, (1, 1), 'VALID', dimension_numbers=AXES)


def _list_windows(x: Array, W: Array) -> list[list[Array]]:
    """Return the windows of x, [N, h, w, c] each, that W[i, j] multiplies for each i and j."""
    kernel_height, kernel_width = W.shape[:2]
    height, width = x.shape[1] - kernel_height + 1, x.shape[2] - kernel_width + 1
    return [
        [x[:, top : top + height, left : left + width] for left in range(kernel_width)]
        for top in range(kernel_height)
    ]
