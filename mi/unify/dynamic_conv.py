"""Converters for convolutions, which multiply a window of the input by a kernel."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import align_streams, expand_rank
from mi.motifs.dynamic_conv import (
    ConditionalConvolution,
    DynamicConvolution,
    LightweightConvolution,
)
from mi.unify.composition import Composition, Product, Variables, make_inner


def convert_lightweight_convolution(
    module: LightweightConvolution,
    variables: Variables,
    x: Array,
    mask: Array | None = None,
    deterministic: bool = True,
) -> Composition:
    """Convert a lightweight convolution to window · kernel, ignoring DropConnect."""
    kernel = jax.nn.softmax(variables['params']['W'])
    kernel = expand_rank(kernel, x.ndim + 1)
    return _multiply_windows(module, x, kernel, mask, 'the kernel of the head, a parameter')


def convert_dynamic_convolution(
    module: DynamicConvolution,
    variables: Variables,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
    deterministic: bool = True,
) -> Composition:
    """Convert a dynamic convolution to window · kernel(z), ignoring DropConnect."""
    source = 'the input' if z is None else 'the context'
    z_is = f'the kernel of the position, a softmax of a linear map of {source} there'
    x, z = align_streams(x, x if z is None else z)
    logits = z @ variables['params']['Q']
    kernel = jax.nn.softmax(logits.reshape(*z.shape[:-1], module.heads, module.width))
    return _multiply_windows(module, x, kernel, mask, z_is)


def convert_conditional_convolution(
    module: ConditionalConvolution, variables: Variables, x: Array, z: Array | None = None
) -> Composition:
    """Convert CondConv to gᵀK window + gᵀb, where W stacks the experts and U stacks the biases."""
    params = variables['params']
    z = x.mean((1, 2)) if z is None else z
    g = nn.sigmoid(z @ params['G'] + params['a'][None])
    num_experts, height, width, _, output_size = params['K'].shape
    strides = module.strides
    windows = jax.lax.conv_general_dilated_patches(
        x,
        (height, width),
        (strides, strides) if isinstance(strides, int) else strides,
        module.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    product = Product(
        name='convolution',
        x_is='the window of the input',
        z_is='the routing weights g, a sigmoid of an affine map of the context',
        x=windows,
        z=g[:, None, None],
        W=params['K'].transpose(0, 3, 1, 2, 4).reshape(num_experts, -1, output_size),
        U=params['b'],
    )
    return Composition((product,), product(), 'the sigmoid of the routing')


def _multiply_windows(
    module: LightweightConvolution | DynamicConvolution,
    x: Array,
    kernel: Array,
    mask: Array | None,
    z_is: str,
) -> Composition:
    """Return the product of a kernel [..., T or 1, H, K] and the windows of x [..., T, C]."""
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    num_positions, num_channels = x.shape[-2:]
    heads, width = kernel.shape[-2:]
    left_padding = width - 1 if module.causal else width // 2

    # The window of each position, zero beyond the ends.
    index = jnp.arange(num_positions)[:, None] + jnp.arange(width)[None] - left_padding
    is_inside = (index >= 0) & (index < num_positions)
    window = jnp.where(is_inside[:, :, None], x[..., index, :], 0)
    window = jnp.swapaxes(window, -1, -2).reshape(
        *x.shape[:-1], heads, num_channels // heads, width
    )

    product = Product(
        name='convolution',
        x_is='the window of a channel around the position',
        z_is=z_is,
        x=window,
        z=kernel[..., None, :],
        W=make_inner(width),
    )
    output = product()
    output = output.reshape(*output.shape[:-3], num_channels)
    return Composition((product,), output, 'the softmax of the kernel')
