"""The fusions of `mi.fusion` that are not affine in both streams as they stand."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.fusion import ConcatMLP, FeatureAttention, Gate, SameWidth
from mi.layers import MultiHead, align_streams, one_hot
from mi.motifs.normalization import ConditionalLayerNorm
from mi.unify.composition import Composition, Product, affine_in_both, as_mi, make_pointwise


@as_mi.register
def gate(module: Gate, variables: Any, x: Array, z: Array) -> Composition:
    """The product of an affine map of x with the open gate."""
    p = variables['params']
    x, z = align_streams(x, z)
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
        z = one_hot(z, p['U'].shape[0], x.dtype)
    product = Product('heads', 'the input', 'the one-hot context', x, z, W=p['W'], U=p['U'])
    return Composition((product,), product())


@as_mi.register
def feature_attention(module: FeatureAttention, variables: Any, x: Array, z: Array) -> Composition:
    """The scores, a low-rank form, and their softmax times the values."""
    p = variables['params']
    s = p['scores']
    scores = Product(
        name='scores',
        x_is='the input',
        z_is='the context',
        x=x,
        z=z,
        W=jnp.einsum('mr,nr,rk->mnk', s['P'], s['Q'], s['O']),
        U=s['U'],
        V=s['V'],
        b=s['b'],
    )
    attended = Product(
        name='attention',
        x_is='the values, an affine map of the input',
        z_is='k times the softmax of the scores',
        x=_affine(p['value'], x),
        z=module.features * nn.softmax(scores()),
        W=make_pointwise(module.features),
    )
    return Composition((scores, attended), attended(), around='softmax of the scores')


@as_mi.register
def same_width(module: SameWidth, variables: Any, x: Array, z: Array) -> Composition:
    """That of the module inside, after the affine map of x; one product where that is affine."""
    p = variables['params']
    if module.module is not ConditionalLayerNorm:
        return affine_in_both(module, variables, x, z)
    if 'x' in p:
        x = _affine(p['x'], x)
    if module.contexts and jnp.issubdtype(z.dtype, jnp.integer):
        z = one_hot(z, module.contexts, x.dtype)
    return as_mi(ConditionalLayerNorm(), {'params': p['form']}, x, z)


def _affine(p: Any, x: Array) -> Array:
    return x @ p['V'] + p['b'].reshape((1,) * (x.ndim - 1) + p['b'].shape)
