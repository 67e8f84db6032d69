"""Gates as the one equation: W is diagonal, or low-rank where affine maps are multiplied in."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import align_streams
from mi.motifs.gating import (
    ACTIVATIONS,
    GatedFeedForward,
    GatedLinearUnit,
    Highway,
    SqueezeExcitation,
    expand_mask,
)
from mi.unify.composition import Composition, Product, as_mi, make_pointwise


@as_mi.register
def gated_linear_unit(
    module: GatedLinearUnit, variables: Any, x: Array, z: Array | None = None
) -> Composition:
    """(zᵀA + a) ⊙ (xᵀB + b): W_mnk = A_mk B_nk, U = A ⊙ b, V = B ⊙ a, b = a ⊙ b.

    An activation takes the gate out of the tensors: z is act(Az + a) then, and A = 1, a = 0.
    """
    p = variables['params']
    product, around = _glu(p, module.activation, x, z), _around(module.activation)
    return Composition((product,), product(), around)


@as_mi.register
def gated_feed_forward(
    module: GatedFeedForward, variables: Any, x: Array, deterministic: bool = True
) -> Composition:
    """That of the gated linear unit, with C multiplied into W, U, V and b.

    Raises:
      ValueError: where dropout is on, as its mask cannot be drawn again.
    """
    if module.dropout and not deterministic:
        raise ValueError(
            f'the mask of dropout {module.dropout} cannot be drawn again; '
            f'call as_mi with deterministic=True'
        )
    p = variables['params']
    inner = _glu(p['glu'], module.activation, x, None)
    W, U, V, b = (jnp.asarray(tensor) @ p['C'] for tensor in (inner.W, inner.U, inner.V, inner.b))
    product = Product(
        'feed-forward', inner.x_is, inner.z_is, inner.x, inner.z, W, U, V, b + p.get('c', 0)
    )
    return Composition((product,), product(), _around(module.activation))


@as_mi.register
def highway(module: Highway, variables: Any, x: Array, z: Array | None = None) -> Composition:
    """T ⊙ H, and (1 − T) ⊙ x with W = −1 on the diagonal and V = 1."""
    p = variables['params']
    x, z = align_streams(x, x if z is None else z)
    n = x.shape[-1]
    H = ACTIVATIONS[module.activation](_affine(x, p['H']['V'], p['H']['b']))
    T = nn.sigmoid(_affine(z, p['T']['V'], p['T']['b']))
    is_T = 'the gate T, a sigmoid of an affine map of the context'
    transform = Product('transform', 'H, of the input', is_T, H, T, make_pointwise(n))
    carry = Product('carry', 'the input', is_T, x, T, -make_pointwise(n), V=jnp.eye(n))
    around = f'the sigmoid of T, the {module.activation} of H, and a sum'
    return Composition((transform, carry), transform() + carry(), around)


@as_mi.register
def squeeze_excitation(
    module: SqueezeExcitation, variables: Any, x: Array, mask: Array | None = None
) -> Composition:
    """s ⊙ x, with s made of x."""
    p = variables['params']
    valid = expand_mask(x, mask)
    count = valid.sum(module.axes, keepdims=True).clip(1)
    pooled = jnp.where(valid, x, 0).sum(module.axes, keepdims=True) / count
    s = nn.sigmoid(nn.relu(pooled @ p['W1']) @ p['W2'])
    product = Product(
        name='excitation',
        x_is='the feature map',
        z_is='the gate s, a sigmoid of a small network of its mean over space',
        x=x,
        z=s,
        W=make_pointwise(x.shape[-1]),
    )
    return Composition((product,), product(), 'the mean over space and the network that makes s')


def _glu(p: Any, activation: str, x: Array, z: Array | None) -> Product:
    A, B = p['A'], p['B']
    k = A.shape[1]
    a, b = p.get('a', jnp.zeros(k)), p.get('b', jnp.zeros(k))
    x, z = align_streams(x, x if z is None else z)
    z_is = 'the context'
    if activation != 'identity':
        z, A, a = ACTIVATIONS[activation](_affine(z, A, a)), jnp.eye(k), jnp.zeros(k)
        z_is = f'the gate, {activation} of an affine map of the context'
    return Product(
        name='gate',
        x_is='the input',
        z_is=z_is,
        x=x,
        z=z,
        W=A[:, None, :] * B[None, :, :],
        U=A * b[None],
        V=B * a[None],
        b=a * b,
    )


def _around(activation: str) -> str:
    return '' if activation == 'identity' else f'the {activation} of the gate'


def _affine(x: Array, V: Array, b: Array) -> Array:
    return x @ V + b.reshape((1,) * (x.ndim - 1) + b.shape)
