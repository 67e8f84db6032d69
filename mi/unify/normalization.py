"""Converters for modulations, where W is diagonal over (n, k), and V is 1 + the bias of γ."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import align_streams, expand_rank
from mi.motifs.gating import expand_mask
from mi.motifs.normalization import (
    AdaLNZero,
    ConditionalBatchNorm,
    ConditionalLayerNorm,
    FeatureWiseModulation,
)
from mi.unify.composition import Composition, Params, Product, Variables, make_diagonal


def convert_feature_wise_modulation(
    module: FeatureWiseModulation, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert (1 + γ(z)) ⊙ x + β(z), where W and V are diagonal, and U and b are from β."""
    product = _make_modulation(variables['params'], 'the input', x, z)
    return Composition((product,), product())


def convert_conditional_layer_norm(
    module: ConditionalLayerNorm, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert conditional layer norm to the modulation of the normalized x."""
    product = _make_modulation(
        variables['params']['modulation'],
        'the input, normalized over its features',
        _normalize(x, module.epsilon),
        z,
    )
    return Composition((product,), product(), 'the normalization of x')


def convert_conditional_batch_norm(
    module: ConditionalBatchNorm,
    variables: Variables,
    x: Array,
    z: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
) -> Composition:
    """Convert conditional batch norm to a modulation, with running or single-device statistics."""
    if nn.merge_param('use_running_average', module.use_running_average, use_running_average):
        running = variables['batch_stats']['norm']
        statistics = (running['mean'], running['var'])
        mean, variance = (expand_rank(statistic, x.ndim) for statistic in statistics)
    else:
        axes = tuple(range(x.ndim - 1))
        valid = expand_mask(x, mask)
        mean = jnp.mean(x, axes, keepdims=True, where=valid)
        variance = jnp.var(x, axes, keepdims=True, where=valid)
    product = _make_modulation(
        variables['params']['modulation'],
        'the input, normalized over the batch',
        (x - mean) * jax.lax.rsqrt(variance + module.epsilon),
        z,
    )
    return Composition((product,), product(), 'the normalization of x')


def convert_ada_ln_zero(
    module: AdaLNZero, variables: Variables, x: Array, z: Array, *args: object, **kwargs: object
) -> Composition:
    """Convert adaLN-Zero to the modulation before F, and to g(z) ⊙ F after it."""
    # The affine maps of silu(z) that give shift, scale and gate.
    head = variables['params']['head']
    shift_V, scale_V, gate_V = jnp.split(head['V'], 3, axis=-1)
    shift_b, scale_b, gate_b = jnp.split(head['b'], 3)
    x, z = align_streams(x, z)
    z = nn.silu(z)
    z_is = 'silu of the context'
    modulation = Product(
        name='modulation',
        x_is='the input, normalized over its features',
        z_is=z_is,
        x=_normalize(x, module.epsilon),
        z=z,
        W=make_diagonal(scale_V),
        U=shift_V,
        V=jnp.diag(1 + scale_b),
        b=shift_b,
    )

    # F between the products, with its own parameters if it is a module.
    F: Any = module.F
    if isinstance(F, nn.Module):
        F_variables = {
            collection: tree['F'] for collection, tree in variables.items() if 'F' in tree
        }
        F = functools.partial(F.apply, F_variables)
    gate = Product(
        name='gate',
        x_is='the output of F',
        z_is=z_is,
        x=F(modulation(), *args, **kwargs),
        z=z,
        W=make_diagonal(gate_V),
        V=jnp.diag(gate_b),
    )
    around = 'the normalization of x, F between the products, and x added after them'
    return Composition((modulation, gate), x + gate(), around)


def _make_modulation(params: Params, x_is: str, x: Array, z: Array) -> Product:
    gamma, beta = params['gamma'], params['beta']
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


def _normalize(x: Array, epsilon: float) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + epsilon)
