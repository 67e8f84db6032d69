"""Modulations as the one equation: W is diagonal over input and output, V = 1 + the bias of γ."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import align_streams
from mi.motifs.gating import expand_mask
from mi.motifs.normalization import (
    AdaLNZero,
    ConditionalBatchNorm,
    ConditionalLayerNorm,
    FeatureWiseModulation,
)
from mi.unify.composition import Composition, Product, as_mi, make_diagonal


@as_mi.register
def feature_wise_modulation(
    module: FeatureWiseModulation, variables: Any, x: Array, z: Array
) -> Composition:
    """(1 + γ(z)) ⊙ x + β(z): W and V diagonal, U and b those of β."""
    product = _modulation(variables['params'], 'the input', x, z)
    return Composition((product,), product())


@as_mi.register
def conditional_layer_norm(
    module: ConditionalLayerNorm, variables: Any, x: Array, z: Array
) -> Composition:
    """That of the modulation, of x normalised over its features."""
    product = _modulation(
        variables['params']['modulation'],
        'the input, normalised over its features',
        _normalised(x, module.epsilon),
        z,
    )
    return Composition((product,), product(), 'the normalisation of x')


@as_mi.register
def conditional_batch_norm(
    module: ConditionalBatchNorm,
    variables: Any,
    x: Array,
    z: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
) -> Composition:
    """That of the modulation, of x normalised by statistics of the batch, on one device."""
    row = (1,) * (x.ndim - 1) + x.shape[-1:]
    if nn.merge_param('use_running_average', module.use_running_average, use_running_average):
        running = variables['batch_stats']['norm']
        mean, variance = running['mean'].reshape(row), running['var'].reshape(row)
    else:
        axes = tuple(range(x.ndim - 1))
        valid = expand_mask(x, mask)
        mean = jnp.mean(x, axes, keepdims=True, where=valid)
        variance = jnp.var(x, axes, keepdims=True, where=valid)
    product = _modulation(
        variables['params']['modulation'],
        'the input, normalised over the batch',
        (x - mean) * jax.lax.rsqrt(variance + module.epsilon),
        z,
    )
    return Composition((product,), product(), 'the normalisation of x')


@as_mi.register
def ada_ln_zero(
    module: AdaLNZero, variables: Any, x: Array, z: Array, *args: Any, **kwargs: Any
) -> Composition:
    """The modulation before F, and g(z) ⊙ F after it."""
    head = variables['params']['head']
    B, S, G = jnp.split(head['V'], 3, axis=-1)
    b, s, g = jnp.split(head['b'], 3)
    x, z = align_streams(x, z)
    z = nn.silu(z)
    z_is = 'silu of the context'
    modulation = Product(
        name='modulation',
        x_is='the input, normalised over its features',
        z_is=z_is,
        x=_normalised(x, module.epsilon),
        z=z,
        W=make_diagonal(S),
        U=B,
        V=jnp.diag(1 + s),
        b=b,
    )
    F: Any = module.F
    if isinstance(F, nn.Module):
        F = functools.partial(
            F.apply, {name: tree['F'] for name, tree in variables.items() if 'F' in tree}
        )
    y = F(modulation(), *args, **kwargs)
    gate = Product('gate', 'the output of F', z_is, y, z, make_diagonal(G), V=jnp.diag(g))
    around = 'the normalisation of x, F between the products, and x added after them'
    return Composition((modulation, gate), x + gate(), around)


def _modulation(p: Any, x_is: str, x: Array, z: Array) -> Product:
    gamma, beta = p['gamma'], p['beta']
    return Product(
        name='modulation',
        x_is=x_is,
        z_is='the context',
        x=x,
        z=z,
        W=make_diagonal(gamma['V']),
        U=beta['V'],
        V=jnp.diag(1 + gamma['b']),
        b=beta['b'],
    )


def _normalised(x: Array, epsilon: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
