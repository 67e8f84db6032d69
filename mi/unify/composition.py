"""What a motif is in terms of f(x, z) = zᵀWx + zᵀU + Vx + b, and the function that says it.

Every motif registers a function with `as_mi` that computes its output again, with `Product`s alone
wherever two streams meet. The tests compare that output with the module's.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from mi.kernels.bilinear import accumulation_dtype
from mi.layers import align_streams, one_hot
from mi.precision import use_highest


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
        x, z = align_streams(self.x, self.z)
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
        zeros = functools.partial(jnp.zeros, dtype=product.W.dtype)
        yield product.W
        yield zeros((m, k)) if product.U is None else product.U
        yield zeros((n, k)) if product.V is None else product.V
        yield zeros((k,)) if product.b is None else product.b


@use_highest
@functools.singledispatch
def as_mi(module: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Composition:
    """module.apply(variables, *args, **kwargs), written with the one equation.

    A module that is affine in x and affine in z needs no function of its own: its tensors are its
    derivatives at zero, W = ∂²f/∂z∂x, U = ∂f/∂z, V = ∂f/∂x, b = f(0, 0), exact for such a function.
    Whether it is one is checked row by row, at the inputs and at random points with entries up to
    some 1e4: the equation may be off by 1e-4 of the largest term of a row. Inside `jax.jit` the
    check cannot raise; the tensors and the output are NaN then.

    Args:
      module: any motif of `mi`, or a module of your own, (x [..., n], z [..., m]) → [..., k].
      variables: as for `module.apply`.
      *args, **kwargs: the inputs.

    Returns:
      The products with their W, U, V, b, and the output computed from them.

    Raises:
      ValueError: for a module of no known motif whose output differs from that equation's, which
        has not two streams or not one output [..., k], or which is not a Linen module.
    """
    return affine_in_both(module, variables, *args, **kwargs)


def affine_in_both(module: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Composition:
    """`as_mi` by derivatives, for a module (x, z) → y that is affine in x and in z.

    Integers for z stand for the one-hot contexts with their 1 there, as the layers of `mi.layers`
    take them. A module with a field `dtype` of less precision than f32 is differentiated in f32.
    """
    kind = type(module).__name__
    f, x, z = _as_function(module, variables, args, kwargs)
    ids, contexts = z, getattr(module, 'contexts', None)
    if jnp.issubdtype(z.dtype, jnp.integer):
        if contexts is None:
            raise ValueError(
                f'{kind}: z is {z.dtype}, and as_mi takes derivatives by it: expected a float '
                f'dtype, or a module with a field `contexts`. Try jax.nn.one_hot(z, m)'
            )
        z = one_hot(z, contexts, accumulation_dtype(x))
    if x.ndim < 1 or z.ndim < 1:
        raise ValueError(f'{kind}: expected x [..., n] and z [..., m]; got {x.shape} and {z.shape}')

    # One row, with as many leading axes as the inputs have, in f32 at least.
    shape = jax.eval_shape(f, x, ids)
    _check_output(kind, shape, x, z)
    wide = accumulation_dtype(x, z, shape.dtype)
    if hasattr(module, 'dtype') and jnp.dtype(shape.dtype) != wide:
        f, *_ = _as_function(module.clone(dtype=wide), variables, args, kwargs)

    def row(x: Array, z: Array) -> Array:
        x, z = x.reshape((1,) * (x_ndim - 1) + x.shape), z.reshape((1,) * (z_ndim - 1) + z.shape)
        return f(x, z).reshape(-1)

    x_ndim, z_ndim = x.ndim, z.ndim
    at = jnp.zeros(x.shape[-1], wide), jnp.zeros(z.shape[-1], wide)
    with jax.default_matmul_precision('highest'):
        product = Product(
            name=kind,
            x_is='the input',
            z_is='the context',
            x=x,
            z=z,
            W=jax.jacfwd(jax.jacrev(row, 0), 1)(*at).transpose(2, 1, 0),  # [k, n, m] → [m, n, k]
            U=jax.jacrev(row, 1)(*at).T,
            V=jax.jacrev(row, 0)(*at).T,
            b=row(*at),
        )
        xs, zs = _probes(x.shape[-1], z.shape[-1], wide)
        on_probes = dataclasses.replace(product, x=xs, z=zs)
        off = jnp.maximum(_off(product, f(x, ids)), _off(on_probes, jax.vmap(row)(xs, zs)))
    output = product()
    # Rounding of the module itself, where it cannot be asked for more precision.
    precision = jnp.finfo(jax.eval_shape(f, x, ids).dtype).eps
    tolerance = max(1e-4, 16 * float(precision))
    if isinstance(off, jax.core.Tracer):  # inside jit nothing can raise
        nan = jnp.where(off <= tolerance, 0.0, jnp.nan).astype(wide)
        tensors = {name: getattr(product, name) + nan for name in ('W', 'U', 'V', 'b')}
        return Composition((dataclasses.replace(product, **tensors),), output + nan)
    if not off <= tolerance:
        raise ValueError(
            f'{kind} is not affine in x and in z: the equation with its derivatives at zero is off '
            f'by {float(off):.2g} of the size of its terms; register a function for it: '
            f'@mi.unify.as_mi.register'
        )
    return Composition((product,), output)


def _as_function(
    module: nn.Module, variables: Any, args: Any, kwargs: Any
) -> tuple[Callable[[Array, Array], Any], Array, Array]:
    """The module as a function of its two streams, and these; ValueError if it has not two."""
    if not isinstance(module, nn.Module):
        raise ValueError(
            f'as_mi takes a Linen module; got {getattr(module, "__name__", module)!r}. Try a '
            f'module whose __call__(x, z) calls it'
        )
    parameters = list(inspect.signature(type(module).__call__).parameters)[1:3]  # without self
    by_name = [name for name in parameters[len(args) :] if kwargs.get(name) is not None]
    streams = *args[:2], *(kwargs[name] for name in by_name)
    if len(streams) < 2 or any(stream is None for stream in streams):
        raise ValueError(
            f'{type(module).__name__}: expected the two streams x and z; got {len(args)} inputs '
            f'and the keywords {sorted(kwargs)}. A module of one stream needs a function of its '
            f'own: @mi.unify.as_mi.register'
        )
    others = {name: value for name, value in kwargs.items() if name not in by_name}

    def f(x: Array, z: Array) -> Any:
        return module.apply(variables, x, z, *args[2:], **others)

    x, z = (jnp.asarray(stream) for stream in streams)
    return f, x, z


def _check_output(kind: str, output: Any, x: Array, z: Array) -> None:
    """Raise ValueError unless the output is one array [..., k] beside x [..., n], z [..., m]."""
    lead = np.broadcast_shapes(x.shape[:-1], z.shape[:-1])
    if not isinstance(output, jax.ShapeDtypeStruct):
        shapes = jax.tree.map(lambda a: a.shape, output)
        raise ValueError(f'{kind}: expected one array as its output; got the shapes {shapes}')
    if output.ndim != len(lead) + 1 or output.shape[:-1] != lead:
        raise ValueError(
            f'{kind}: expected an output [..., k] with the leading axes {lead} of x {x.shape} and '
            f'z {z.shape}; got {output.shape}'
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(f'{kind}: expected an output in a float dtype; got {output.dtype}')


_SCALES = (0.0, 1.0, 1e2, 1e4)


def _probes(n: int, m: int, dtype: Any) -> tuple[Array, Array]:
    """Random x [R, n] and z [R, m], small and large beside each other: kinks can be far away."""
    rng = np.random.default_rng(0)
    pairs = [pair for pair in itertools.product(_SCALES, _SCALES) for _ in range(4)]
    scales = np.asarray(pairs)
    xs, zs = (rng.normal(size=(len(pairs), size)) for size in (n, m))
    return jnp.asarray(xs * scales[:, :1], dtype), jnp.asarray(zs * scales[:, 1:], dtype)


def _off(product: Product, expected: Array) -> Array:
    """The largest difference in a row between the equation and what is expected, of its terms.

    The size of a row is that of its largest term, so that terms that cancel leave their rounding.
    """
    x, z = align_streams(product.x, product.z)
    zeros = jnp.zeros_like(x), jnp.zeros_like(z)
    both, of_x, of_z, alone = (
        dataclasses.replace(product, x=a, z=c)()
        for a, c in ((x, z), (x, zeros[1]), (zeros[0], z), zeros)
    )
    size = functools.reduce(jnp.maximum, map(jnp.abs, (both, of_x, of_z, alone)))
    size = jnp.maximum(size, jnp.abs(expected)).max(-1)
    difference = jnp.abs(both - expected).max(-1)
    return jnp.where(size == 0, 0, difference / jnp.where(size == 0, 1, size)).max(initial=0)


def make_diagonal(a: Array) -> Array:
    """[m, n] → W [m, n, n] with W[i, j, j] = a[i, j]: zᵀWx = (zᵀa) ⊙ x."""
    return a[:, :, None] * jnp.eye(a.shape[1])[None]


def make_pointwise(n: int) -> Array:
    """W [n, n, n] of z ⊙ x."""
    return make_diagonal(jnp.eye(n))


def make_inner(n: int) -> Array:
    """W [n, n, 1] of z · x."""
    return jnp.eye(n)[:, :, None]
