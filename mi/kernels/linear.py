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

# On CPU, the gradient of V is transposed for products of this many rows, up to this many entries.
MIN_ROWS = 512
MAX_TRANSPOSED = 2**19


def target_platform() -> Platform:
    """Return the platform that the current function is traced for.

    This is `mesh_platform()` or, without a mesh, the platform of JAX's default backend.
    """
    return mesh_platform() or jax.default_backend()  # type: ignore[return-value]


def mesh_platform() -> Platform | None:
    """Return the platform of the mesh in the enclosing `jax.set_mesh` or `jax.shard_map`, if any.

    Its devices need not be present when a program is only compiled for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


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
        return V[clip_ids(x, len(V))].astype(out_dtype or V.dtype)
    x_rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    output_rows = _matmul(x_rows, V, out_dtype, precision)
    return output_rows.reshape(*x.shape[:-1], V.shape[-1])


def clip_ids(ids: Array, num_ids: int) -> Array:
    """Clip integer ids of any dtype to [0, num_ids)."""
    if ids.dtype.itemsize < 4:  # num_ids may not be a number of this dtype
        ids = ids.astype(jnp.int32)
    return jnp.clip(ids, 0, num_ids - 1)


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
    """Write x dV so that its transpose, the gradient of V, is a product with a wide output.

    XLA on CPU computes dyᵀx [k, n] faster than xᵀdy [n, k] if n > k, and slower otherwise. A
    transpose of the result costs less than that difference if there are many rows, and if it fits
    into the cache. The barriers keep XLA from transposing the product instead, which it would also
    do if V itself is a transpose, such as that of an output embedding.
    """
    (x, V), (x_tangent, V_tangent) = primals, tangents
    multiply = functools.partial(accumulate, out_dtype=out_dtype, precision=precision)
    is_worth_it = x.shape[0] >= MIN_ROWS and V.size <= MAX_TRANSPOSED
    if target_platform() != 'cpu' or not is_worth_it:
        V_term = multiply(jnp.matmul, x, V_tangent)
    elif V.shape[0] > V.shape[1]:
        V_transposed = jax.lax.optimization_barrier(V_tangent.T)
        V_term = multiply(functools.partial(jnp.einsum, 'rn,kn->rk'), x, V_transposed)
    else:
        V_term = multiply(jnp.matmul, x, jax.lax.optimization_barrier(V_tangent))
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
