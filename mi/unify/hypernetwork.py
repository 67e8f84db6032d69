"""Hypernetworks as the one equation: W'(z)x + b'(z) is zᵀWx + zᵀU + Vx + b."""

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

from mi.layers import Affine, align_streams
from mi.motifs.hypernetwork import Hypernetwork, LinearHypernetwork, MLPHypernetwork
from mi.unify.composition import Composition, Product, as_mi

HIDDEN = 'the last hidden layer of a network of the context'

# Where the layers of a target keep their weight and their bias.
LAYERS: dict[type[nn.Module], tuple[str, str]] = {Affine: ('V', 'b'), nn.Dense: ('kernel', 'bias')}


@as_mi.register
def linear_hypernetwork(
    module: LinearHypernetwork, variables: Any, x: Array, z: Array
) -> Composition:
    """Its parameters are W, U, V and b."""
    p = variables['params']
    product = Product(
        'generated layer', 'the input', 'the context', x, z, p['W'], p['U'], p['V'], p['b']
    )
    return Composition((product,), product())


@as_mi.register
def mlp_hypernetwork(module: MLPHypernetwork, variables: Any, x: Array, z: Array) -> Composition:
    """The head's parameters; with chunks, z is all of the h side by side and W a band matrix."""
    p = variables['params']
    x, z = align_streams(x, z)
    h = _hidden(p['hidden'], module.activation, z)
    if module.chunk is None:
        head = p['head']
        W, U, V, b = head['W'], head['U'], head['V'], head['b']
    else:
        V, b = p['V'], p['b']
        d = h.shape[-1]
        W = jnp.pad(_band(p['W'], V.size), [(0, d), (0, 0)]).reshape(-1, *V.shape)
        U = jnp.pad(p['U'], [(len(W) - d, 0), (0, 0)])
        h = h.reshape(*z.shape[:-1], -1)
    product = Product('generated layer', 'the input', HIDDEN, x, h, W, U, V, b)
    return Composition((product,), product(), 'the hidden layers that make z')


@as_mi.register
def hypernetwork(module: Hypernetwork, variables: Any, x: Array, z: Array) -> Composition:
    """One product for each Dense or Affine layer of the target; the rest of it stands around.

    Raises:
      ValueError: if the target has none.
    """
    p = variables['params']
    rows = z.shape[:-1]
    flat, unravel = ravel_pytree(p['V'])
    h = _hidden(p['hidden'], module.activation, z)
    W_flat = p['W']
    if module.chunk is not None:
        W_flat = _band(W_flat, flat.size)
        h = h.reshape(*rows, -1)
    W = jax.vmap(unravel)(W_flat)

    target = module.target.clone(parent=None)

    def of_row(x: Array, h: Array) -> tuple[Any, list[Product]]:
        products = []

        def layer(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != '__call__' or type(context.module) not in LAYERS:
                return call(*args, **kwargs)
            path = context.module.path
            weight, bias = LAYERS[type(context.module)]
            of_z, constant = _at(W, path), _at(p['V'], path)
            product = Product(
                name=' '.join(('generated layer', *path)),
                x_is='the input of the layer',
                z_is=HIDDEN,
                x=args[0],
                z=h,
                W=of_z[weight],
                U=of_z.get(bias),
                V=constant[weight],
                b=constant.get(bias),
            )
            products.append(product)
            return product()

        with nn.intercept_methods(layer):
            y = target.apply({'params': unravel(h @ W_flat + flat)}, x)
        return y, products

    each = [of_row(x[row], h[row]) for row in np.ndindex(rows)]
    if not each[0][1]:
        raise ValueError(
            f'{type(target).__name__} has no Dense or Affine layer to write as a product'
        )

    def stacked(*leaves: Array) -> Array:
        return jnp.stack(leaves).reshape(*rows, *leaves[0].shape)

    products = []
    for of_rows in zip(*(products for _, products in each), strict=True):
        xs = stacked(*(product.x for product in of_rows))
        zs = h.reshape(*rows, *(1,) * (xs.ndim - h.ndim), h.shape[-1])
        products.append(dataclasses.replace(of_rows[0], x=xs, z=zs))
    return Composition(
        tuple(products),
        jax.tree.map(stacked, *(y for y, _ in each)),
        'the hidden layers that make z, and what the target does between its layers',
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda branch, name: branch[name], path, tree)


def _hidden(p: Any, activation: Callable[[Array], Array], z: Array) -> Array:
    h = z @ p['0']['V'] + p['0']['b'].reshape((1,) * (z.ndim - 1) + (-1,))
    if 'e' in p:
        h = h[..., None, :] + p['e'].reshape((1,) * (z.ndim - 1) + p['e'].shape)
    for i in range(1, sum(name != 'e' for name in p)):
        h = activation(h) @ p[f'{i}']['V'] + p[f'{i}']['b'].reshape((1,) * (h.ndim - 1) + (-1,))
    return activation(h)


def _band(W: Array, size: int) -> Array:
    """W [d, chunk], applied to the h of each piece, as one matrix of all h: [pieces · d, size]."""
    pieces = -(-size // W.shape[1])
    return jnp.kron(jnp.eye(pieces), W)[:, :size]
