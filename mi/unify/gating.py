"""Converters for gates, whose W is diagonal, or low-rank if affine maps are multiplied into it."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import add_bias, align_streams
from mi.motifs.gating import (
    ACTIVATIONS,
    GatedFeedForward,
    GatedLinearUnit,
    Highway,
    SqueezeExcitation,
    expand_mask,
)
from mi.unify.composition import (
    Composition,
    Params,
    Product,
    Variables,
    make_pointwise,
    map_affine,
)


def convert_gated_linear_unit(
    module: GatedLinearUnit, variables: Variables, x: Array, z: Array | None = None
) -> Composition:
    """Convert (zᵀA + a) ⊙ (xᵀB + b): W_mnk = A_mk B_nk, U = A ⊙ b, V = B ⊙ a, b = a ⊙ b.

    With an activation, act(Az + a) takes the place of z, with A = 1 and a = 0.
    """
    params = variables['params']
    product = _make_gate_product(params, module.activation, x, z)
    return Composition((product,), product(), _describe_activation(module.activation))


def convert_gated_feed_forward(
    module: GatedFeedForward, variables: Variables, x: Array, deterministic: bool = True
) -> Composition:
    """Convert a gated feed-forward layer to one product, with C multiplied into W, U, V and b.

    Raises:
      ValueError: if dropout is enabled, because its mask cannot be drawn again.
    """
    if module.dropout and not deterministic:
        raise ValueError(
            f'dropout = {module.dropout}: expected a call without dropout, because its mask '
            'cannot be drawn again. Try deterministic=True'
        )
    params = variables['params']
    inner = _make_gate_product(params['glu'], module.activation, x, None)
    W, U, V, b = (
        jnp.asarray(tensor) @ params['C'] for tensor in (inner.W, inner.U, inner.V, inner.b)
    )
    product = Product(
        'feed-forward', inner.x_is, inner.z_is, inner.x, inner.z, W, U, V, b + params.get('c', 0)
    )
    return Composition((product,), product(), _describe_activation(module.activation))


def convert_highway(
    module: Highway, variables: Variables, x: Array, z: Array | None = None
) -> Composition:
    """Convert a highway layer to T ⊙ H and (1 − T) ⊙ x, with diagonals of −1 in W and 1 in V."""
    params = variables['params']
    x, z = align_streams(x, x if z is None else z)
    pointwise = make_pointwise(x.shape[-1])
    H = ACTIVATIONS[module.activation](map_affine(params['H'], x))
    T = nn.sigmoid(map_affine(params['T'], z))
    z_is = 'the gate T, a sigmoid of an affine map of the context'
    transform = Product('transform', 'H, of the input', z_is, H, T, pointwise)
    carry = Product('carry', 'the input', z_is, x, T, -pointwise, V=jnp.eye(x.shape[-1]))
    around = f'the sigmoid of T, the {module.activation} of H, and a sum'
    return Composition((transform, carry), transform() + carry(), around)


def convert_squeeze_excitation(
    module: SqueezeExcitation, variables: Variables, x: Array, mask: Array | None = None
) -> Composition:
    """Convert squeeze-and-excitation to s ⊙ x, where s depends on x."""
    params = variables['params']
    valid = expand_mask(x, mask)
    num_valid = valid.sum(module.axes, keepdims=True).clip(1)
    pooled = jnp.where(valid, x, 0).sum(module.axes, keepdims=True) / num_valid
    s = nn.sigmoid(nn.relu(pooled @ params['W1']) @ params['W2'])
    product = Product(
        name='excitation',
        x_is='the feature map',
        z_is='the gate s, a sigmoid of a small network of its mean over space',
        x=x,
        z=s,
        W=make_pointwise(x.shape[-1]),
    )
    return Composition((product,), product(), 'the mean over space and the network that computes s')


def _make_gate_product(params: Params, activation: str, x: Array, z: Array | None) -> Product:
    A, B = params['A'], params['B']
    features = A.shape[1]
    no_bias = jnp.zeros(features)
    a, b = params.get('a', no_bias), params.get('b', no_bias)
    x, z = align_streams(x, x if z is None else z)
    z_is = 'the context'
    if activation != 'identity':
        z, A, a = ACTIVATIONS[activation](add_bias(z @ A, a)), jnp.eye(features), no_bias
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


def _describe_activation(activation: str) -> str:
    return '' if activation == 'identity' else f'the {activation} of the gate'
