"""The kernel for Vx, and the f32 accumulation that all products share."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

Platform = Literal['cpu', 'gpu', 'tpu']
Precision = jax.lax.PrecisionLike

NARROW_FEATURES = 512  # up to this many, an input is transposed for the gradient of V on CPU


def target_platform() -> Platform:
    """Return the platform that the current function is traced for.

    This is the platform of the mesh in the enclosing `jax.set_mesh` or `jax.shard_map`, whose
    devices need not be present when a program is only compiled for them. Without a mesh, it is
    JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform  # type: ignore[return-value]


def linear(
    x: Array,
    V: Array,
    *,
    out_dtype: DTypeLike | None = None,
    precision: Precision = None,
) -> Array:
    """Compute Vx [..., k] for x [..., n] and V [n, k], accumulated in at least f32.

    Integers x [...] select rows of V. As in `bilinear`, out-of-range integers are clipped.

    Leading axes are flattened, so that the product and both gradients are plain matrix products.
    Without flattening, XLA on CPU takes twice as long for the gradient of a [T, B, n] by [n, k]
    product.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return V[jnp.clip(x, 0, len(V) - 1)].astype(out_dtype or V.dtype)
    x_rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    output_rows = _matmul(x_rows, V, out_dtype, precision)
    return output_rows.reshape(*x.shape[:-1], V.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _matmul(x: Array, V: Array, out_dtype: DTypeLike | None, precision: Precision) -> Array:
    return accumulate(jnp.matmul, x, V, out_dtype=out_dtype, precision=precision)


@_matmul.defjvp
def _matmul_jvp(
    out_dtype: DTypeLike | None,
    precision: Precision,
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Write x dV as (dVᵀ xᵀ)ᵀ with xᵀ in memory if that makes its transpose, ∂V, faster.

    XLA on CPU does not have a fast product that contracts the first axes of both operands, as xᵀ dy
    does. For a narrow x, transposing it costs less than this saves. The barrier around dV prevents
    XLA from transposing the product back if V is itself a transpose, such as an output embedding.
    """
    (x, V), (x_tangent, V_tangent) = primals, tangents
    multiply = functools.partial(accumulate, out_dtype=out_dtype, precision=precision)
    if target_platform() == 'cpu' and x.shape[-1] <= NARROW_FEATURES < x.shape[0]:
        x_transposed = jax.lax.optimization_barrier(x.T)
        V_tangent = jax.lax.optimization_barrier(V_tangent)
        product = functools.partial(jnp.einsum, 'nk,nb->kb')
        V_term = multiply(product, V_tangent, x_transposed).T
    else:
        V_term = multiply(jnp.matmul, x, V_tangent)
    return _matmul(x, V, out_dtype, precision), multiply(jnp.matmul, x_tangent, V) + V_term


def accumulation_dtype(*operands: ArrayLike | DTypeLike) -> jnp.dtype:
    """Return the dtype in which products of these arrays or dtypes accumulate, at least f32."""
    return jnp.promote_types(jnp.result_type(*operands), jnp.float32)


def accumulate(
    product: Callable[..., Array],
    left: Array,
    right: Array,
    *,
    out_dtype: DTypeLike | None = None,
    precision: Precision = None,
) -> Array:
    """Return product(left, right), accumulated in at least f32 and rounded once.

    By default, the output has the promoted dtype of the operands.
    """
    dtype = jnp.result_type(left, right)
    accumulator = accumulation_dtype(dtype)
    output = product(left, right, precision=precision, preferred_element_type=accumulator)
    return output.astype(out_dtype or dtype)
