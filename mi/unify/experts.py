"""Mixtures of experts as the one equation: W is the stack of experts, z what weighs them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mi.layers import align_streams
from mi.motifs.experts import DenseMixture, RoutedMixture
from mi.unify.composition import Composition, Product, as_mi


@as_mi.register
def dense_mixture(module: DenseMixture, variables: Any, x: Array, z: Array) -> Composition:
    """gᵀEx + gᵀe."""
    p = variables['params']
    x, z = align_streams(x, z)
    product = Product(
        name='mixture',
        x_is='the input',
        z_is='the gate g, a softmax of a linear map of the context',
        x=x,
        z=jax.nn.softmax(z @ p['G']),
        W=p['E'],
        U=p['e'],
    )
    return Composition((product,), product(), 'the softmax of the gate')


@as_mi.register
def routed_mixture(
    module: RoutedMixture,
    variables: Any,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
) -> Composition:
    """gᵀAh + gᵀa: h are the hidden units of all experts, g is zero for those not chosen."""
    p = variables['params']
    E, h, k = p['A'].shape
    lead = x.shape[:-1]
    logits = (x if z is None else z) @ p['G']
    g = jnp.broadcast_to(jax.nn.softmax(logits), (*lead, E)).reshape(-1, E)
    choice = jax.nn.one_hot(jax.lax.top_k(g, module.top_k)[1], E)  # [N, S, E]
    g = g * choice.sum(1)
    if module.top_k > 1:
        g = g / g.sum(-1, keepdims=True)
    if mask is not None:
        choice = choice * jnp.broadcast_to(mask, lead).reshape(-1, 1, 1)
    if module.capacity_factor is not None:
        capacity = math.ceil(module.capacity_factor * g.shape[0] * module.top_k / E)
        queue = choice.transpose(1, 0, 2).reshape(-1, E)
        taken = (queue * (jnp.cumsum(queue, axis=0) <= capacity)).reshape(-1, *g.shape)
        choice = taken.transpose(1, 0, 2)
    g = (g * choice.sum(1)).reshape(*lead, E)
    hidden = jnp.einsum('...n,enh->...eh', x, p['V'])
    hidden = module.activation(hidden + p['b'].reshape((1,) * len(lead) + p['b'].shape))
    W = jnp.eye(E)[:, :, None, None] * p['A'][None]
    product = Product(
        name='mixture',
        x_is='the hidden units of all experts',
        z_is='the gate g, a softmax of the router, zero for the experts not chosen',
        x=hidden.reshape(*lead, E * h),
        z=g,
        W=W.reshape(E, E * h, k),
        U=p['a'],
    )
    return Composition((product,), product(), 'the router, and the hidden layer of each expert')
