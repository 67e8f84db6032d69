"""Conversion of modules that are affine in x and affine in z, by their derivatives at zero."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype
from mi.layers import align_streams, expand_rank, one_hot
from mi.unify.composition import Composition, Product, Variables

Function = Callable[[Array, Array], Array]

_PROBE_SCALES = (0.0, 1.0, 1e2, 1e4)


def convert_affine(
    module: nn.Module, variables: Variables, *args: Any, **kwargs: Any
) -> Composition:
    """Convert a module (x, z) → y that is affine in x and in z, for `as_mi`.

    An integer z holds ids of one-hot contexts, as in `mi.layers`. If the field `dtype` of the
    module is less precise than f32, the module is differentiated in f32.
    """
    module_name = type(module).__name__
    function, x, z = _get_function(module, variables, args, kwargs)
    raw_z = z
    if jnp.issubdtype(z.dtype, jnp.integer):
        contexts = getattr(module, 'contexts', None)
        if contexts is None:
            raise ValueError(
                f'{module_name}: z is {z.dtype}: expected a float dtype, or a module with a field '
                f'`contexts`, because as_mi differentiates with respect to z. Try '
                f'jax.nn.one_hot(z, m)'
            )
        z = one_hot(z, contexts, accumulation_dtype(x))
    if x.ndim < 1 or z.ndim < 1:
        raise ValueError(
            f'{module_name}: expected x [..., n] and z [..., m]; got {x.shape} and {z.shape}'
        )

    # Evaluate the module in f32 at least.
    output_spec = jax.eval_shape(function, x, raw_z)
    _check_output(module_name, output_spec, x, z)
    dtype = accumulation_dtype(x, z, output_spec.dtype)
    if hasattr(module, 'dtype') and jnp.dtype(output_spec.dtype) != dtype:
        function, *_ = _get_function(module.clone(dtype=dtype), variables, args, kwargs)

    # Compare the equation with the module at the inputs and at random points.
    product = _differentiate(module_name, function, x, z, dtype)
    probe_x, probe_z = _draw_probes(x.shape[-1], z.shape[-1], dtype)
    with jax.default_matmul_precision('highest'):
        probe_row = _make_row_function(function, x.ndim, z.ndim)
        probe_output = jax.vmap(probe_row)(probe_x, probe_z)
        error = jnp.maximum(
            _measure_error(product, function(x, raw_z)),
            _measure_error(dataclasses.replace(product, x=probe_x, z=probe_z), probe_output),
        )
    output = product()

    # The module may round its output to a dtype that cannot be changed.
    precision = jnp.finfo(jax.eval_shape(function, x, raw_z).dtype).eps
    tolerance = max(1e-4, 16 * float(precision))
    if isinstance(error, jax.core.Tracer):  # an error cannot be raised inside jit
        nan = jnp.where(error <= tolerance, 0.0, jnp.nan).astype(dtype)
        tensors = {letter: getattr(product, letter) + nan for letter in 'WUVb'}
        return Composition((dataclasses.replace(product, **tensors),), output + nan)
    if not error <= tolerance:
        raise ValueError(
            f'{module_name} is not affine in x and in z: its derivatives at zero predict '
            f'its output with a relative error of {float(error):.2g}. Try registering a '
            f'converter: mi.unify.CONVERTERS[{module_name}] = …'
        )
    return Composition((product,), output)


def _differentiate(
    module_name: str, function: Function, x: Array, z: Array, dtype: DTypeLike
) -> Product:
    """Return the product whose tensors are the derivatives of the function at zero."""
    row_function = _make_row_function(function, x.ndim, z.ndim)
    zeros = jnp.zeros(x.shape[-1], dtype), jnp.zeros(z.shape[-1], dtype)
    with jax.default_matmul_precision('highest'):
        W = jax.jacfwd(jax.jacrev(row_function, 0), 1)(*zeros)  # [k, n, m]
        return Product(
            name=module_name,
            x_is='the input',
            z_is='the context',
            x=x,
            z=z,
            W=W.transpose(2, 1, 0),
            U=jax.jacrev(row_function, 1)(*zeros).T,
            V=jax.jacrev(row_function, 0)(*zeros).T,
            b=row_function(*zeros),
        )


def _make_row_function(function: Function, x_ndim: int, z_ndim: int) -> Function:
    """Return a function of single rows, x [n] and z [m] → [k]."""

    def row_function(x: Array, z: Array) -> Array:
        return function(expand_rank(x, x_ndim), expand_rank(z, z_ndim)).reshape(-1)

    return row_function


def _get_function(
    module: nn.Module, variables: Variables, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Function, Array, Array]:
    """Return the module as a function of its two streams, and the streams.

    Raises:
      ValueError: if `module` is not a Linen module, or is not called with two streams.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f'as_mi expects a Linen module; got {getattr(module, "__name__", module)!r}. '
            'Try a module whose __call__(x, z) calls it'
        )
    parameters = list(inspect.signature(type(module).__call__).parameters)[1:3]  # without self
    unfilled = parameters[len(args) :]
    keywords = [parameter for parameter in unfilled if kwargs.get(parameter) is not None]
    streams = *args[:2], *(kwargs[keyword] for keyword in keywords)
    if len(streams) < 2 or any(stream is None for stream in streams):
        raise ValueError(
            f'{type(module).__name__}: expected the two streams x and z; got {len(args)} inputs '
            f'and the keywords {sorted(kwargs)}. A module with one stream needs a converter: '
            f'mi.unify.CONVERTERS[{type(module).__name__}] = …'
        )
    options = {keyword: kwargs[keyword] for keyword in kwargs if keyword not in keywords}

    def function(x: Array, z: Array) -> Array:
        return module.apply(variables, x, z, *args[2:], **options)  # type: ignore[return-value]

    x, z = (jnp.asarray(stream) for stream in streams)
    return function, x, z


def _check_output(module_name: str, output: object, x: Array, z: Array) -> None:
    """Raise ValueError unless the output is a float array with the leading axes of the streams."""
    leading = np.broadcast_shapes(x.shape[:-1], z.shape[:-1])
    if not isinstance(output, jax.ShapeDtypeStruct):
        shapes = jax.tree.map(lambda leaf: leaf.shape, output)
        raise ValueError(
            f'{module_name}: expected a single array as output; got the shapes {shapes}'
        )
    if output.ndim != len(leading) + 1 or output.shape[:-1] != leading:
        raise ValueError(
            f'{module_name}: expected an output [..., k] with the leading axes {leading} of '
            f'x {x.shape} and z {z.shape}; got {output.shape}'
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(f'{module_name}: expected an output in a float dtype; got {output.dtype}')


def _draw_probes(input_size: int, context_size: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """Draw x [R, n] and z [R, m] at several scales, because kinks can be far from zero."""
    rng = np.random.default_rng(0)
    scale_pairs = [pair for pair in itertools.product(_PROBE_SCALES, repeat=2) for _ in range(4)]
    scales = np.asarray(scale_pairs)
    x = rng.normal(size=(len(scales), input_size))
    z = rng.normal(size=(len(scales), context_size))
    return jnp.asarray(x * scales[:, :1], dtype), jnp.asarray(z * scales[:, 1:], dtype)


def _measure_error(product: Product, expected: Array) -> Array:
    """Return the product's largest error in any row, relative to the largest term in that row.

    The error is not relative to the output, because of the rounding errors of terms that cancel.
    """
    x, z = align_streams(product.x, product.z)
    no_x, no_z = jnp.zeros_like(x), jnp.zeros_like(z)
    actual, x_terms, z_terms, bias = (
        dataclasses.replace(product, x=x_input, z=z_input)()
        for x_input, z_input in ((x, z), (x, no_z), (no_x, z), (no_x, no_z))
    )
    terms = actual, x_terms, z_terms, bias, expected
    magnitude = functools.reduce(jnp.maximum, map(jnp.abs, terms)).max(-1)
    difference = jnp.abs(actual - expected).max(-1)
    is_zero = magnitude == 0
    return jnp.where(is_zero, 0, difference / jnp.where(is_zero, 1, magnitude)).max(initial=0)
