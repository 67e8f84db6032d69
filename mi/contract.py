"""zᵀWx for two streams of any broadcastable leading axes, in the order that the shapes make cheap.

Pure functions; no parameters, no modules. Shapes: x [..., n], z [..., m], W [m, n, k] → [..., k].

Where x and z vary together, every order costs about 2·B·m·n·k operations and what differs is the
intermediate that is written and read back. Where one stream is shared over an axis that the other
varies over, contracting the shared one first does that part once instead of once per position.
"""

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Order = Literal['outer', 'x_first', 'z_first']

_FEW_ROWS = 32
_NARROW = 512
_CACHE = 4 * 2**20  # bytes: an outer product that fits a core's cache is free to keep


def plan(x_shape: Sequence[int], z_shape: Sequence[int], features: int) -> Order:
    """Chooses the order of evaluation of zᵀWx from static shapes alone.

    =========  =============  =====================================
    order      first product  intermediate (B rows together)
    =========  =============  =====================================
    `outer`    z ⊗ x          B·m·n, the input of a product
    `x_first`  xW             B_x·m·k, the output of a product
    `z_first`  zᵀW            B_z·n·k, generated weights W'(z)
    =========  =============  =====================================

    Where a stream is shared over some axis, the order with fewer operations; otherwise thresholds
    that were measured on one x86 core. They choose speed, never the value.

    Args:
      x_shape: [..., n].
      z_shape: [..., m].
      features: k.
    """
    x_axes, z_axes = _aligned(x_shape, z_shape)
    m, n, k = z_shape[-1], x_shape[-1], features
    x_rows, z_rows = math.prod(x_axes), math.prod(z_axes)
    rows = math.prod(max(pair) for pair in zip(x_axes, z_axes, strict=True))
    if x_axes != z_axes:
        z_first = z_rows * m * n * k + rows * n * k
        x_first = x_rows * m * n * k + rows * m * k
        return 'z_first' if z_first <= x_first else 'x_first'
    if rows <= _FEW_ROWS:
        return 'outer'
    if k < 64 or 4 * k <= n:
        return 'x_first'
    if m >= 2 * max(n, k):
        return 'z_first'
    return 'outer' if rows * m * n * 4 <= _CACHE else 'x_first'


def bilinear(
    x: Array,
    z: Array,
    W: Array,
    *,
    order: Order | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """zᵀWx, that is y_k = Σ_m Σ_n z_m W_mnk x_n.

    Products accumulate in f32 at least, whatever the dtype of the inputs.

    Args:
      x: [..., n], the input.
      z: [..., m], the context. Its leading axes broadcast against those of x; over an axis that is
        missing or of length 1 it is contracted once, not once per position.
      W: [m, n, k].
      order: one of the orders of `plan`; None lets `plan` choose.
      precision: as in `jax.lax.dot_general`.

    Returns:
      [..., k] in the promoted dtype of x, z and W.

    Raises:
      ValueError: if the shapes do not fit or the order is unknown.
    """
    if W.ndim != 3 or z.shape[-1:] != W.shape[:1] or x.shape[-1:] != W.shape[1:2]:
        raise ValueError(
            f'W must be [m, n, k] with z [..., m] and x [..., n]; '
            f'got W {W.shape}, z {z.shape}, x {x.shape}'
        )
    if order is not None and order not in get_args(Order):
        raise ValueError(f'unknown order {order!r}; known: {", ".join(get_args(Order))}')
    order = order or plan(x.shape, z.shape, W.shape[2])

    # One letter an axis; an axis of length 1 is dropped, so that each einsum is one dot_general.
    x_axes, z_axes = _aligned(x.shape, z.shape)
    out_shape = (*map(max, x_axes, z_axes), W.shape[2])
    letters = string.ascii_uppercase[: len(x_axes)]
    X = ''.join(c for c, size in zip(letters, x_axes, strict=True) if size != 1)
    Z = ''.join(c for c, size in zip(letters, z_axes, strict=True) if size != 1)
    Y = ''.join(c for c in letters if c in X or c in Z)
    x = x.reshape(*(size for size in x.shape[:-1] if size != 1), x.shape[-1])
    z = z.reshape(*(size for size in z.shape[:-1] if size != 1), z.shape[-1])

    def product(equation: str, a: Array, b: Array) -> Array:
        return _accumulated(jnp.einsum, equation, a, b, precision=precision)

    match order:
        case 'outer':
            zx = jnp.einsum(f'{Z}m,{X}n->{Y}mn', z, x)
            y = product(f'{Y}mn,mnk->{Y}k', zx, W)
        case 'x_first':
            xW = product(f'{X}n,mnk->{X}mk', x, W)
            y = product(f'{Z}m,{X}mk->{Y}k', z, xW)
        case 'z_first':
            zW = product(f'{Z}m,mnk->{Z}nk', z, W)
            y = product(f'{X}n,{Z}nk->{Y}k', x, zW)
    return y.reshape(out_shape)


def linear(
    x: Array,
    V: Array,
    *,
    out_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """Vx, [..., n] and [n, k] → [..., k], accumulated in f32 at least.

    Leading axes are flattened, so that the product and both of its gradients are plain matrix
    products: XLA on CPU takes twice as long for the gradient of a [T, B, n] by [n, k] product.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _matmul(rows, V, out_dtype, precision)
    return y.reshape(*x.shape[:-1], V.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _matmul(
    x: Array, V: Array, out_dtype: DTypeLike | None, precision: jax.lax.PrecisionLike
) -> Array:
    return _accumulated(jnp.matmul, x, V, out_dtype=out_dtype, precision=precision)


@_matmul.defjvp
def _matmul_jvp(
    out_dtype: DTypeLike | None,
    precision: jax.lax.PrecisionLike,
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Array, Array]:
    """x dV is written as (dVᵀ xᵀ)ᵀ with xᵀ in memory, where that makes ∂V, its transpose, faster.

    XLA on CPU has no fast product that contracts the first axes of both operands, as xᵀ dy does;
    for a narrow x its transpose costs less than it saves (8.0 → 4.9 ms for 64 × 2048 × 1024).
    """
    (x, V), (dx, dV) = primals, tangents
    dot = functools.partial(_accumulated, out_dtype=out_dtype, precision=precision)
    if jax.default_backend() == 'cpu' and x.shape[-1] <= _NARROW < x.shape[0]:
        x_T = jax.lax.optimization_barrier(x.T)
        of_V = dot(functools.partial(jnp.einsum, 'nk,nb->kb'), dV, x_T).T
    else:
        of_V = dot(jnp.matmul, x, dV)
    return _matmul(x, V, out_dtype, precision), dot(jnp.matmul, dx, V) + of_V


def _accumulated(
    product: Callable[..., Array],
    *operands: Any,
    out_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """The product, summed in f32 at least and rounded once, by default to the operands' dtype."""
    dtype = jnp.result_type(*(a for a in operands if not isinstance(a, str)))
    accumulator = jnp.promote_types(dtype, jnp.float32)
    y = product(*operands, precision=precision, preferred_element_type=accumulator)
    return y.astype(out_dtype or dtype)


def _aligned(
    x_shape: Sequence[int], z_shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The leading axes of both streams, padded with 1 on the left to the same number."""
    x_axes, z_axes = tuple(x_shape[:-1]), tuple(z_shape[:-1])
    ndim = max(len(x_axes), len(z_axes))
    x_axes = (1,) * (ndim - len(x_axes)) + x_axes
    z_axes = (1,) * (ndim - len(z_axes)) + z_axes
    if any(i != j and 1 not in (i, j) for i, j in zip(x_axes, z_axes, strict=True)):
        raise ValueError(
            f'the leading axes of x {tuple(x_shape)} and z {tuple(z_shape)} do not broadcast'
        )
    return x_axes, z_axes
