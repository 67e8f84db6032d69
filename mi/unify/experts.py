"""Converters for mixtures of experts, where W stacks the experts and z holds their weights."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from mi.layers import add_bias, align_streams
from mi.motifs.experts import DenseMixture, RoutedMixture
from mi.unify.composition import Composition, Product, Variables


def convert_dense_mixture(
    module: DenseMixture, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert a dense mixture to gᵀEx + gᵀe, where g holds the mixture weights."""
    params = variables['params']
    x, z = align_streams(x, z)
    product = Product(
        name='mixture',
        x_is='the input',
        z_is='the gate g, a softmax of a linear map of the context',
        x=x,
        z=jax.nn.softmax(z @ params['G']),
        W=params['E'],
        U=params['e'],
    )
    return Composition((product,), product(), 'the softmax of the gate')


def convert_routed_mixture(
    module: RoutedMixture,
    variables: Variables,
    x: Array,
    z: Array | None = None,
    mask: Array | None = None,
) -> Composition:
    """Convert a routed mixture to gᵀAh + gᵀa, with hidden units h and g = 0 for unused experts."""
    params = variables['params']
    num_experts, hidden_size, output_size = params['A'].shape
    leading = x.shape[:-1]
    logits = (x if z is None else z) @ params['G']

    # The weights of the chosen experts; a masked row chooses none.
    gates = jnp.broadcast_to(jax.nn.softmax(logits), (*leading, num_experts))
    gates = gates.reshape(-1, num_experts)
    choices = jax.nn.one_hot(jax.lax.top_k(gates, module.top_k)[1], num_experts)  # [N, S, E]
    gates = gates * choices.sum(1)
    if module.top_k > 1:
        gates = gates / gates.sum(-1, keepdims=True)
    if mask is not None:
        choices = choices * jnp.broadcast_to(mask, leading).reshape(-1, 1, 1)

    # With a capacity, first choices come first and earlier tokens before later ones.
    if module.capacity_factor is not None:
        capacity = math.ceil(module.capacity_factor * len(gates) * module.top_k / num_experts)
        queue = choices.transpose(1, 0, 2).reshape(-1, num_experts)
        queue = queue * (jnp.cumsum(queue, axis=0) <= capacity)
        choices = queue.reshape(-1, *gates.shape).transpose(1, 0, 2)
    gates = (gates * choices.sum(1)).reshape(*leading, num_experts)

    # The product of the gates with the output layers of all experts.
    hidden = jnp.einsum('...n,enh->...eh', x, params['V'])
    hidden = module.activation(add_bias(hidden, params['b']))
    W = jnp.eye(num_experts)[:, :, None, None] * params['A'][None]
    product = Product(
        name='mixture',
        x_is='the hidden units of all experts',
        z_is='the gate g, a softmax of the router, zero for the experts not chosen',
        x=hidden.reshape(*leading, num_experts * hidden_size),
        z=gates,
        W=W.reshape(num_experts, num_experts * hidden_size, output_size),
        U=params['a'],
    )
    return Composition((product,), product(), 'the router, and the hidden layer of each expert')
