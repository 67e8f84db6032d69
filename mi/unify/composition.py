"""What a motif is in terms of f(x, z) = zᵀWx + zᵀU + Vx + b, and the function that says it.

Every motif registers a function with `as_mi` that computes its output again, with `Product`s alone
wherever two streams meet. The tests compare that output with the module's.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi.layers import streams


@dataclasses.dataclass(frozen=True)
class Product:
    """A place where two streams meet: f(x, z) = zᵀWx + zᵀU + Vx + b, and the streams there.

    Attributes:
      name: what is computed there, as 'gate' or 'scores'.
      x_is, z_is: what the streams are, in words.
      x: [..., n], the input as it comes to the product.
      z: [..., m], the context as it comes to the product; leading axes broadcast.
      W: [m, n, k].
      U: [m, k], V: [n, k], b: [k]; None for zeros.
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
        """f(x, z) by the equation as it is written: [..., k]."""
        highest = jax.lax.Precision.HIGHEST
        x, z = streams(self.x, self.z)
        y = jnp.einsum('...m,mnk,...n->...k', z, self.W, x, precision=highest)
        if self.U is not None:
            y = y + jnp.matmul(z, self.U, precision=highest)
        if self.V is not None:
            y = y + jnp.matmul(x, self.V, precision=highest)
        if self.b is not None:
            y = y + self.b.reshape((1,) * (y.ndim - 1) + self.b.shape)
        return y


@dataclasses.dataclass(frozen=True)
class Composition:
    """A module's output, computed again from products of the one equation.

    Attributes:
      products: in the order of the computation.
      output: what the module returns.
      around: what stands around the products, in words, as 'softmax of the scores'; '' where the
        module is the product and nothing else, and then W, U, V, b = composition.
    """

    products: tuple[Product, ...]
    output: Any
    around: str = ''

    def __iter__(self) -> Iterator[Array]:
        """W, U, V, b, zeros where a term is missing.

        Raises:
          ValueError: if the module is not the equation alone.
        """
        if self.around or len(self.products) != 1:
            raise ValueError(
                f'the module is not one product alone: there is {self.around or "more than one"}; '
                f'use .products and .output'
            )
        (product,) = self.products
        m, n, k = product.W.shape
        zeros = jnp.zeros
        yield product.W
        yield zeros((m, k)) if product.U is None else product.U
        yield zeros((n, k)) if product.V is None else product.V
        yield zeros((k,)) if product.b is None else product.b


@functools.singledispatch
def as_mi(module: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Composition:
    """module.apply(variables, *args, **kwargs), written with the one equation.

    A module that is affine in x and affine in z needs no function of its own: its tensors are its
    derivatives at zero, W = ∂²f/∂z∂x, U = ∂f/∂z, V = ∂f/∂x, b = f(0, 0), exact for such a function.

    Args:
      module: any motif of `mi`, or a module of your own, (x [..., n], z [..., m]) → [..., k].
      variables: as for `module.apply`.
      *args, **kwargs: the inputs.

    Returns:
      The products with their W, U, V, b, and the output computed from them.

    Raises:
      ValueError: for a module of no known motif whose output differs from that equation's.
    """
    return affine_in_both(module, variables, *args, **kwargs)


def affine_in_both(
    module: nn.Module, variables: Any, x: Array, z: Array, **kwargs: Any
) -> Composition:
    """`as_mi` by derivatives, for a module (x, z) → y that is affine in x and in z."""

    def f(x: Array, z: Array) -> Array:
        return module.apply(variables, x, z, **kwargs)  # type: ignore[return-value]

    at = jnp.zeros(x.shape[-1], jnp.float32), jnp.zeros(z.shape[-1], jnp.float32)
    W = jax.jacfwd(jax.jacrev(f, 0), 1)(*at)  # [k, n, m]
    product = Product(
        name=type(module).__name__,
        x_is='the input',
        z_is='the context',
        x=x,
        z=z,
        W=W.transpose(2, 1, 0),
        U=jax.jacrev(f, 1)(*at).T,
        V=jax.jacrev(f, 0)(*at).T,
        b=f(*at),
    )
    output, expected = product(), f(x, z)
    off = float(jnp.abs(output - expected).max())
    scale = float(jnp.abs(expected).max())
    if not off <= 1e-3 * (1 + scale):
        raise ValueError(
            f'{type(module).__name__} is not affine in x and in z: the equation with its '
            f'derivatives at zero is off by {off:.2g}, its outputs go to {scale:.2g}; register a '
            f'function for it: @mi.unify.as_mi.register'
        )
    return Composition((product,), output)


def diagonal(a: Array) -> Array:
    """[m, n] → W [m, n, n] with W[i, j, j] = a[i, j]: zᵀWx = (zᵀa) ⊙ x."""
    return a[:, :, None] * jnp.eye(a.shape[1])[None]


def pointwise(n: int) -> Array:
    """W [n, n, n] of z ⊙ x."""
    return diagonal(jnp.eye(n))


def inner(n: int) -> Array:
    """W [n, n, 1] of z · x."""
    return jnp.eye(n)[:, :, None]
