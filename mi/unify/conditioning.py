"""Converters for the fusions that are not affine in both streams."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import MultiHead, align_streams, one_hot
from mi.motifs.conditioning import ConcatMLP, FeatureAttention, Gate, SameWidth
from mi.motifs.normalization import ConditionalLayerNorm
from mi.unify.composition import Composition, Product, Variables, make_pointwise, map_affine
from mi.unify.derivatives import convert_affine
from mi.unify.normalization import convert_conditional_layer_norm


def convert_gate(module: Gate, variables: Variables, x: Array, z: Array) -> Composition:
    """Convert a sigmoid gate to its product with an affine map of x."""
    params = variables['params']
    x, z = align_streams(x, z)
    gate = 2 * nn.sigmoid(map_affine(params['gate'], z))
    V, b = params['x']['V'], params['x']['b']
    product = Product(
        name='gate',
        x_is='the input',
        z_is='the gate, 2σ of an affine map of the context',
        x=x,
        z=gate,
        W=jnp.eye(len(b))[:, None, :] * V[None],
        U=jnp.diag(b),
    )
    return Composition((product,), product(), around='2σ of the context')


def convert_concat_mlp(module: ConcatMLP, variables: Variables, x: Array, z: Array) -> Composition:
    """Convert the pre-activations of the hidden layer to a product with W = 0."""
    params = variables['params']
    hidden = params['hidden']
    W_shape = z.shape[-1], x.shape[-1], hidden['b'].shape[0]
    product = Product(
        name='concatenation',
        x_is='the input',
        z_is='the context',
        x=x,
        z=z,
        W=jnp.zeros(W_shape),
        U=hidden['U'],
        V=hidden['V'],
        b=hidden['b'],
    )
    output = map_affine(params['out'], nn.relu(product()))
    return Composition((product,), output, around='relu and an affine map of the sum')


def convert_multi_head(module: MultiHead, variables: Variables, x: Array, z: Array) -> Composition:
    """Convert a multi-head read-out to the full form, for one-hot z or integer ids."""
    params = variables['params']
    if jnp.issubdtype(z.dtype, jnp.integer):
        z = one_hot(z, params['U'].shape[0], x.dtype)
    product = Product(
        'heads', 'the input', 'the one-hot context', x, z, W=params['W'], U=params['U']
    )
    return Composition((product,), product())


def convert_feature_attention(
    module: FeatureAttention, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert feature attention to low-rank scores, and the product of their softmax and values."""
    params = variables['params']
    form = params['scores']
    scores = Product(
        name='scores',
        x_is='the input',
        z_is='the context',
        x=x,
        z=z,
        W=jnp.einsum('mr,nr,rk->mnk', form['P'], form['Q'], form['O']),
        U=form['U'],
        V=form['V'],
        b=form['b'],
    )
    attention = Product(
        name='attention',
        x_is='the values, an affine map of the input',
        z_is='k times the softmax of the scores',
        x=map_affine(params['value'], x),
        z=module.features * nn.softmax(scores()),
        W=make_pointwise(module.features),
    )
    return Composition((scores, attention), attention(), around='softmax of the scores')


def convert_same_width(module: SameWidth, variables: Variables, x: Array, z: Array) -> Composition:
    """Apply the affine map to x, and convert the inner module.

    An affine inner module gives a single product.
    """
    params = variables['params']
    if module.module is not ConditionalLayerNorm:
        return convert_affine(module, variables, x, z)
    if 'x' in params:
        x = map_affine(params['x'], x)
    if module.contexts and jnp.issubdtype(z.dtype, jnp.integer):
        z = one_hot(z, module.contexts, x.dtype)
    return convert_conditional_layer_norm(ConditionalLayerNorm(), {'params': params['form']}, x, z)
