"""Convolutions as the one equation: a window of the input times a kernel made of the context."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import align_streams
from mi.motifs.dynamic_conv import (
    ConditionalConvolution,
    DynamicConvolution,
    LightweightConvolution,
)
from mi.unify.composition import Composition, Product, as_mi, make_inner


@as_mi.register
def lightweight_convolution(
    module: LightweightConvolution,
    variables: Any,
    x: Array,
    mask: Array | None = None,
    deterministic: bool = True,
) -> Composition:
    """window · kernel, the kernel a parameter: the same z at all positions; without DropConnect."""
    kernel = jax.nn.softmax(variables['params']['W'])
    kernel = kernel.reshape((1,) * (x.ndim - 1) + kernel.shape)
    return _windows_times_kernel(module, x, kernel, mask, 'the kernel of the head, a parameter')


@as_mi.register
def dynamic_convolution(
    module: DynamicConvolution,
    variables: Any,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
    deterministic: bool = True,
) -> Composition:
    """window · kernel, the kernel a function of the context; without DropConnect."""
    z_is = 'the kernel of the position, a softmax of a linear map of '
    z_is += 'the input there' if z is None else 'the context there'
    x, z = align_streams(x, x if z is None else z)
    logits = z @ variables['params']['Q']
    kernel = jax.nn.softmax(logits.reshape(*z.shape[:-1], module.heads, module.width))
    return _windows_times_kernel(module, x, kernel, mask, z_is)


@as_mi.register
def conditional_convolution(
    module: ConditionalConvolution, variables: Any, x: Array, z: Array | None = None
) -> Composition:
    """gᵀK window + gᵀb: W is the stack of experts, U that of their biases."""
    p = variables['params']
    z = x.mean((1, 2)) if z is None else z
    g = nn.sigmoid(z @ p['G'] + p['a'][None])
    E, kh, kw, C, k = p['K'].shape
    strides = module.strides
    patches = jax.lax.conv_general_dilated_patches(
        x,
        (kh, kw),
        (strides, strides) if isinstance(strides, int) else strides,
        module.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    product = Product(
        name='convolution',
        x_is='the window of the input',
        z_is='the routing weights g, a sigmoid of an affine map of the context',
        x=patches,
        z=g[:, None, None],
        W=p['K'].transpose(0, 3, 1, 2, 4).reshape(E, C * kh * kw, k),
        U=p['b'],
    )
    return Composition((product,), product(), 'the sigmoid of the routing')


def _windows_times_kernel(
    module: LightweightConvolution | DynamicConvolution,
    x: Array,
    kernel: Array,
    mask: Array | None,
    z_is: str,
) -> Composition:
    """kernel [..., T or 1, H, K] times the windows of x [..., T, C]."""
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    (T, C), (H, K) = x.shape[-2:], kernel.shape[-2:]
    at = jnp.arange(T)[:, None] + jnp.arange(K)[None] - (K - 1 if module.causal else K // 2)
    window = jnp.where((at >= 0)[:, :, None] & (at < T)[:, :, None], x[..., at, :], 0)
    window = jnp.swapaxes(window, -1, -2).reshape(*x.shape[:-1], H, C // H, K)
    product = Product(
        name='convolution',
        x_is='the window of a channel around the position',
        z_is=z_is,
        x=window,
        z=kernel[..., None, :],
        W=make_inner(K),
    )
    y = product()
    return Composition((product,), y.reshape(*y.shape[:-3], C), 'the softmax of the kernel')
