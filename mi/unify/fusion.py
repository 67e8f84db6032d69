"""The fusions of `mi.fusion` that are not affine in both streams as they stand."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.fusion import ConcatMLP, Gate
from mi.layers import MultiHead
from mi.unify.composition import Composition, Product, as_mi


@as_mi.register
def gate(module: Gate, variables: Any, x: Array, z: Array) -> Composition:
    """The product of an affine map of x with the open gate."""
    p = variables['params']
    opening = 2 * nn.sigmoid(_affine(p['gate'], z))
    V, b = p['x']['V'], p['x']['b']
    product = Product(
        name='gate',
        x_is='the input',
        z_is='the gate, 2σ of an affine map of the context',
        x=x,
        z=opening,
        W=jnp.eye(len(b))[:, None, :] * V[None],
        U=jnp.diag(b),
    )
    return Composition((product,), product(), around='2σ of the context')


@as_mi.register
def concat_mlp(module: ConcatMLP, variables: Any, x: Array, z: Array) -> Composition:
    """W = 0 in the hidden layer, the context of zeros in the other."""
    p = variables['params']
    hidden = p['hidden']
    n, m, k = x.shape[-1], z.shape[-1], hidden['b'].shape[0]
    product = Product(
        name='concatenation',
        x_is='the input',
        z_is='the context',
        x=x,
        z=z,
        W=jnp.zeros((m, n, k)),
        U=hidden['U'],
        V=hidden['V'],
        b=hidden['b'],
    )
    output = _affine(p['out'], nn.relu(product()))
    return Composition((product,), output, around='relu and an affine map of the sum')


@as_mi.register
def multi_head(module: MultiHead, variables: Any, x: Array, z: Array) -> Composition:
    """The full form with one row of W and of U for each context; z one-hot, or integers."""
    p = variables['params']
    if jnp.issubdtype(z.dtype, jnp.integer):
        z = nn.one_hot(z, p['U'].shape[0])
    product = Product('heads', 'the input', 'the one-hot context', x, z, W=p['W'], U=p['U'])
    return Composition((product,), product())


def _affine(p: Any, x: Array) -> Array:
    return x @ p['V'] + p['b'].reshape((1,) * (x.ndim - 1) + p['b'].shape)
