"""A module as a composition of products f(x, z) = zᵀWx + zᵀU + Vx + b."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from mi.layers import add_bias, align_streams

if TYPE_CHECKING:
    import chex

Params = Mapping[str, Any]  # nested by submodule
Variables = Mapping[str, Params]  # by collection, as for `module.apply`


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of two streams, f(x, z) = zᵀWx + zᵀU + Vx + b, with its tensors and inputs.

    Attributes:
      name: name of the result, such as 'gate' or 'scores'.
      x_is, z_is: descriptions of the streams.
      x: the input of the product, [..., n].
      z: the context of the product, [..., m]. Leading axes broadcast.
      W: the tensor of the interaction, [m, n, k].
      U, V, b: the other terms, [m, k], [n, k] and [k], or None for zeros.
    """

    name: str
    x_is: str
    z_is: str
    x: Array
    z: Array
    W: Array
    U: Array | None = None
    V: Array | None = None
    b: Array | None = None

    def __call__(self) -> Array:
        """Return f(x, z), evaluated term by term: [..., k]."""
        highest = jax.lax.Precision.HIGHEST
        x, z = align_streams(self.x, self.z)
        output = jnp.einsum('...m,mnk,...n->...k', z, self.W, x, precision=highest)
        if self.U is not None:
            output = output + jnp.matmul(z, self.U, precision=highest)
        if self.V is not None:
            output = output + jnp.matmul(x, self.V, precision=highest)
        if self.b is not None:
            output = add_bias(output, self.b)
        return output


@dataclasses.dataclass(frozen=True)
class Composition:
    """The output of a module, computed from products f(x, z) = zᵀWx + zᵀU + Vx + b.

    If the module is a single product and nothing else, it can be unpacked as
    W, U, V, b = composition.

    Attributes:
      products: the products in the order of the computation.
      output: the output of the module.
      around: a description of the operations around the products, such as 'softmax of the scores',
        or '' if there are none.
    """

    products: tuple[Product, ...]
    output: 'chex.ArrayTree'
    around: str = ''

    def __iter__(self) -> Iterator[Array]:
        """Yield W, U, V and b, with zeros for missing terms.

        Raises:
          ValueError: if the module is more than one product.
        """
        if self.around or len(self.products) != 1:
            raise ValueError(
                f'the module is not a single product; it has {self.around or "several products"}. '
                f'Try .products and .output'
            )
        (product,) = self.products
        context_size, input_size, output_size = product.W.shape
        zeros = functools.partial(jnp.zeros, dtype=product.W.dtype)
        yield product.W
        yield zeros((context_size, output_size)) if product.U is None else product.U
        yield zeros((input_size, output_size)) if product.V is None else product.V
        yield zeros((output_size,)) if product.b is None else product.b


def map_affine(params: Params, x: Array) -> Array:
    """Return Vx + b for the parameters of an `Affine` module."""
    return add_bias(x @ params['V'], params['b'])


def make_diagonal(a: Array) -> Array:
    """Return W [m, n, n] with W[i, j, j] = a[i, j], so that zᵀWx = (zᵀa) ⊙ x."""
    return a[:, :, None] * jnp.eye(a.shape[1])[None]


def make_pointwise(n: int) -> Array:
    """Return W [n, n, n] such that zᵀWx = z ⊙ x."""
    return make_diagonal(jnp.eye(n))


def make_inner(n: int) -> Array:
    """Return W [n, n, 1] such that zᵀWx = z · x."""
    return jnp.eye(n)[:, :, None]
