"""Converters of hypernetworks: W'(z)x + b'(z) is zᵀWx + zᵀU + Vx + b."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.flatten_util import ravel_pytree

from mi.layers import Affine, add_bias, align_streams
from mi.motifs.hypernetwork import Hypernetwork, LinearHypernetwork, MLPHypernetwork
from mi.unify.composition import Composition, Params, Product, Variables

HIDDEN = 'the last hidden layer of a network of the context'

# Names of the weight and of the bias in each layer that a target may have.
LAYERS: dict[type[nn.Module], tuple[str, str]] = {Affine: ('V', 'b'), nn.Dense: ('kernel', 'bias')}


def convert_linear_hypernetwork(
    module: LinearHypernetwork, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert to one product, whose W, U, V and b are the parameters."""
    params = variables['params']
    product = Product(
        'generated layer',
        'the input',
        'the context',
        x,
        z,
        params['W'],
        params['U'],
        params['V'],
        params['b'],
    )
    return Composition((product,), product())


def convert_mlp_hypernetwork(
    module: MLPHypernetwork, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert to the head's product; with chunks, z is the h of all chunks and W a band matrix."""
    params = variables['params']
    x, z = align_streams(x, z)
    h = _compute_hidden(params['hidden'], module.activation, z)
    if module.chunk is None:
        head = params['head']
        W, U, V, b = head['W'], head['U'], head['V'], head['b']
    else:
        V, b = params['V'], params['b']
        d = h.shape[-1]
        W = jnp.pad(_make_band(params['W'], V.size), [(0, d), (0, 0)]).reshape(-1, *V.shape)
        U = jnp.pad(params['U'], [(len(W) - d, 0), (0, 0)])
        h = h.reshape(*z.shape[:-1], -1)
    product = Product('generated layer', 'the input', HIDDEN, x, h, W, U, V, b)
    return Composition((product,), product(), 'the hidden layers that compute z')


def convert_hypernetwork(
    module: Hypernetwork, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert to one product per Dense or Affine layer of the target.

    Raises:
      ValueError: if the target has no such layer.
    """
    params = variables['params']
    rows = z.shape[:-1]
    flat, unravel = ravel_pytree(params['V'])
    h = _compute_hidden(params['hidden'], module.activation, z)
    W_flat = params['W']
    if module.chunk is not None:
        W_flat = _make_band(W_flat, flat.size)
        h = h.reshape(*rows, -1)
    W = jax.vmap(unravel)(W_flat)

    target = module.target.clone(parent=None)

    def convert_row(x: Array, h: Array) -> tuple[Any, list[Product]]:
        products = []

        def call_layer(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != '__call__' or type(context.module) not in LAYERS:
                return call(*args, **kwargs)
            path = context.module.path
            weight, bias = LAYERS[type(context.module)]
            z_term, constant = _get_branch(W, path), _get_branch(params['V'], path)
            product = Product(
                name=' '.join(('generated layer', *path)),
                x_is='the input of the layer',
                z_is=HIDDEN,
                x=args[0],
                z=h,
                W=z_term[weight],
                U=z_term.get(bias),
                V=constant[weight],
                b=constant.get(bias),
            )
            products.append(product)
            return product()

        with nn.intercept_methods(call_layer):
            y = target.apply({'params': unravel(h @ W_flat + flat)}, x)
        return y, products

    # Apply the target to each row, and stack the products of the rows.
    outcomes = [convert_row(x[row], h[row]) for row in np.ndindex(rows)]
    if not outcomes[0][1]:
        raise ValueError(
            f'{type(target).__name__} has no Dense or Affine layer to write as a product'
        )

    def stack_rows(*leaves: Array) -> Array:
        return jnp.stack(leaves).reshape(*rows, *leaves[0].shape)

    products = []
    for row_products in zip(*(products for _, products in outcomes), strict=True):
        xs = stack_rows(*(product.x for product in row_products))
        zs = h.reshape(*rows, *(1,) * (xs.ndim - h.ndim), h.shape[-1])
        products.append(dataclasses.replace(row_products[0], x=xs, z=zs))
    return Composition(
        tuple(products),
        jax.tree.map(stack_rows, *(y for y, _ in outcomes)),
        'the hidden layers that compute z, and what the target does between its layers',
    )


def _get_branch(tree: Params, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda branch, name: branch[name], path, tree)


def _compute_hidden(params: Params, activation: Callable[[Array], Array], z: Array) -> Array:
    h = add_bias(z @ params['0']['V'], params['0']['b'])
    if 'e' in params:
        h = add_bias(h[..., None, :], params['e'])
    for i in range(1, sum(name != 'e' for name in params)):
        h = add_bias(activation(h) @ params[f'{i}']['V'], params[f'{i}']['b'])
    return activation(h)


def _make_band(W: Array, size: int) -> Array:
    """Return the matrix [pieces · d, size] that applies W [d, chunk] to the h of each piece."""
    num_pieces = -(-size // W.shape[1])
    return jnp.kron(jnp.eye(num_pieces), W)[:, :size]
