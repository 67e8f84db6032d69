"""Converters for hypernetworks, based on W'(z)x + b'(z) = zᵀWx + zᵀU + Vx + b."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.flatten_util import ravel_pytree

from mi.layers import Affine, add_bias, align_streams
from mi.motifs.hypernetwork import Hypernetwork, LinearHypernetwork, MLPHypernetwork
from mi.unify.composition import Composition, Params, Product, Variables, map_affine

if TYPE_CHECKING:
    import chex

HIDDEN = 'the last hidden layer of a network of the context'

# Names of the weight and of the bias in each layer that a target may have.
LAYERS: dict[type[nn.Module], tuple[str, str]] = {Affine: ('V', 'b'), nn.Dense: ('kernel', 'bias')}


def convert_linear_hypernetwork(
    module: LinearHypernetwork, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert a linear hypernetwork to one product, whose W, U, V and b are its parameters."""
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
    """Convert an MLP hypernetwork to the product of its head.

    With chunks, z is the concatenated h of all chunks, and W is banded.
    """
    params = variables['params']
    x, z = align_streams(x, z)
    hidden = _compute_hidden(params['hidden'], module.activation, z)
    if module.chunk is None:
        head = params['head']
        W, U, V, b = head['W'], head['U'], head['V'], head['b']
    else:
        V, b = params['V'], params['b']
        hidden_size = hidden.shape[-1]
        band = _make_band(params['W'], V.size)
        W = jnp.pad(band, [(0, hidden_size), (0, 0)]).reshape(-1, *V.shape)
        U = jnp.pad(params['U'], [(len(W) - hidden_size, 0), (0, 0)])
        hidden = hidden.reshape(*z.shape[:-1], -1)
    product = Product('generated layer', 'the input', HIDDEN, x, hidden, W, U, V, b)
    return Composition((product,), product(), 'the hidden layers that compute z')


def convert_hypernetwork(
    module: Hypernetwork, variables: Variables, x: Array, z: Array
) -> Composition:
    """Convert a hypernetwork to one product for each Dense or Affine layer of its target.

    Raises:
      ValueError: if the target has no such layer.
    """
    params = variables['params']
    rows = z.shape[:-1]
    V_flat, unravel = ravel_pytree(params['V'])
    hidden = _compute_hidden(params['hidden'], module.activation, z)
    W_flat = params['W']
    if module.chunk is not None:
        W_flat = _make_band(W_flat, V_flat.size)
        hidden = hidden.reshape(*rows, -1)
    W = jax.vmap(unravel)(W_flat)
    target = module.target.clone(parent=None)

    # Apply the target to each row, with a product in place of each of its layers.
    def convert_row(x: Array, hidden: Array) -> 'tuple[chex.ArrayTree, list[Product]]':
        products = []

        def call_layer(
            call: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: Mapping[str, object],
            context: nn.module.InterceptorContext,
        ) -> object:
            if context.method_name != '__call__' or type(context.module) not in LAYERS:
                return call(*args, **kwargs)
            product = _make_layer_product(context.module, args[0], hidden, W, params['V'])
            products.append(product)
            return product()

        with nn.intercept_methods(call_layer):
            output = target.apply({'params': unravel(hidden @ W_flat + V_flat)}, x)
        return output, products

    row_outputs, row_products = [], []
    for row in np.ndindex(rows):
        output, products = convert_row(x[row], hidden[row])
        row_outputs.append(output)
        row_products.append(products)
    if not row_products[0]:
        raise ValueError(
            f'target = {type(target).__name__}: expected a target with a Dense or Affine '
            'layer, which can be written as a product'
        )

    # Stack the outputs and the products of the rows.
    stack_rows = functools.partial(_stack_rows, rows)
    stacked_products = []
    for layer_products in zip(*row_products, strict=True):
        layer_x = stack_rows(*(product.x for product in layer_products))
        layer_z = hidden.reshape(*rows, *(1,) * (layer_x.ndim - hidden.ndim), hidden.shape[-1])
        stacked_products.append(dataclasses.replace(layer_products[0], x=layer_x, z=layer_z))
    return Composition(
        tuple(stacked_products),
        jax.tree.map(stack_rows, *row_outputs),
        'the hidden layers that compute z, and what the target does between its layers',
    )


def _stack_rows(rows: tuple[int, ...], *leaves: Array) -> Array:
    return jnp.stack(leaves).reshape(*rows, *leaves[0].shape)


def _make_layer_product(layer: nn.Module, x: Array, hidden: Array, W: Params, V: Params) -> Product:
    """Return a layer of the target as a product, using its entries in W and V."""
    weight, bias = LAYERS[type(layer)]
    z_term, constant = _get_branch(W, layer.path), _get_branch(V, layer.path)
    return Product(
        name=' '.join(('generated layer', *layer.path)),
        x_is='the input of the layer',
        z_is=HIDDEN,
        x=x,
        z=hidden,
        W=z_term[weight],
        U=z_term.get(bias),
        V=constant[weight],
        b=constant.get(bias),
    )


def _get_branch(tree: Params, path: tuple[str, ...]) -> Params:
    return functools.reduce(lambda branch, submodule: branch[submodule], path, tree)


def _compute_hidden(params: Params, activation: Callable[[Array], Array], z: Array) -> Array:
    hidden = map_affine(params['0'], z)
    if 'e' in params:
        hidden = add_bias(hidden[..., None, :], params['e'])
    for layer_index in range(1, sum(param_name != 'e' for param_name in params)):
        hidden = map_affine(params[f'{layer_index}'], activation(hidden))
    return activation(hidden)


def _make_band(W: Array, size: int) -> Array:
    """Return the matrix [pieces · d, size] that applies W [d, chunk] to the h of every piece."""
    num_pieces = -(-size // W.shape[1])
    return jnp.kron(jnp.eye(num_pieces), W)[:, :size]
