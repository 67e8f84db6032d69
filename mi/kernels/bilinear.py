"""zᵀWx for two streams of any broadcastable leading axes, in the order that the shapes make cheap.

Pure functions; no parameters, no modules. Shapes: x [..., n], z [..., m], W [m, n, k] → [..., k].

Where x and z vary together, every order costs about 2·B·m·n·k operations and what differs is the
intermediate that is written and read back. Where one stream is shared over an axis that the other
varies over, contracting the shared one first does that part once instead of once per position.
Where the context is one of m choices, given as integers, only its own W[i] x is computed: m times
fewer operations. docs/evaluation.md has what was measured.
"""

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

Order = Literal[
    'outer', 'outer_chunks', 'x_first', 'z_first', 'z_first_chunks', 'groups', 'rows', 'one_hot'
]
Platform = Literal['cpu', 'gpu', 'tpu']

DENSE_ORDERS: tuple[Order, ...] = ('outer', 'outer_chunks', 'x_first', 'z_first', 'z_first_chunks')
ID_ORDERS: tuple[Order, ...] = ('groups', 'rows', 'one_hot')

_FEW_ROWS = 64
_NARROW = 512
_LANES = 128  # columns of a TPU's products
_KEPT = {'cpu': 2**26, 'gpu': 2**30, 'tpu': 2**26}  # bytes: of an intermediate kept whole
_CHUNK = 12 * 2**20  # bytes of generated weights in a chunk
_BLOCK = 32  # rows with the same id that are multiplied together


def target_platform() -> Platform:
    """Return the platform that a function is traced for: that of the devices of the mesh around it.

    The mesh is that of `jax.set_mesh` or `jax.shard_map`. It may have devices that are not here, as
    those of a topology that is compiled for. Without one it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform  # type: ignore[return-value]


def choose_order(
    x_shape: Sequence[int],
    z_shape: Sequence[int],
    features: int,
    context: Literal['dense', 'ids'] = 'dense',
    platform: Platform = 'cpu',
    contexts: int = 0,
) -> Order:
    """Chooses the order of evaluation of zᵀWx from static shapes and the kind of context alone.

    ================  =================  ====================================  ===================
    order             first product      intermediate (B rows together)        kept for backward
    ================  =================  ====================================  ===================
    `outer`           z ⊗ x              B·m·n, the input of a product         it; x, z, W on TPU
    `outer_chunks`    z ⊗ x, by parts    of some rows of W at a time           x, z and W
    `x_first`         xW                 B_x·m·k, the output of a product      it
    `z_first`         zᵀW                B_z·n·k, generated weights W'(z)      it
    `z_first_chunks`  zᵀW, by parts      of some columns of W'(z) at a time    x, z and W
    `rows`            W[ids]             B_z·n·k, the rows of W                it
    `groups`          none               x sorted by id                        x and W
    `one_hot`         a dense order's, m times the operations of the two above
    ================  =================  ====================================  ===================

    The chunks recompute their intermediate in the backward pass. Where a stream is shared over some
    axis, the order with fewer operations is chosen; otherwise the smallest intermediate, and by
    thresholds that were measured on two x86 cores and on one H200, in f32 (TF32 there) and bf16.
    On a TPU it is `outer`, which its compiler fuses, unless k is narrow, by the estimates of that
    compiler. All of this chooses speed, never the value.

    Args:
      x_shape: [..., n].
      z_shape: [..., m]; with `context='ids'` the shape of the integers, [...].
      features: k.
      context: 'dense', or 'ids' for integers in [0, m).
      platform: where it runs.
      contexts: m, with `context='ids'`.
    """
    n, k, kept = x_shape[-1], features, _KEPT[platform]
    if context == 'ids':
        x_axes, z_axes = _aligned(x_shape, (*z_shape, 1))
        few = math.prod(np.broadcast_shapes(x_axes, z_axes)) <= _BLOCK
        shared = math.prod(x_axes) >= _BLOCK * math.prod(z_axes)
        if platform != 'cpu' and not shared and contexts <= max(n, k):
            return 'one_hot'  # one large product instead of a loop of small ones
        return 'rows' if few or shared else 'groups'
    x_axes, z_axes = _aligned(x_shape, z_shape)
    m = z_shape[-1]
    x_rows, z_rows = math.prod(x_axes), math.prod(z_axes)
    rows = math.prod(np.broadcast_shapes(x_axes, z_axes))
    if x_axes != z_axes:
        z_first = z_rows * m * n * k + rows * n * k
        x_first = x_rows * m * n * k + rows * m * k
        if x_first < z_first:
            return 'x_first'
        return 'z_first' if 4 * z_rows * n * k <= kept else 'z_first_chunks'
    if platform == 'tpu':
        return 'x_first' if k < _LANES and 4 * k <= n else 'outer'
    generated = 4 * rows * n * k
    if platform == 'cpu' and rows <= _FEW_ROWS:
        return 'z_first' if k < m and generated <= kept else 'outer'
    if m > max(n, k) and generated <= kept:
        return 'z_first'
    if 4 * rows * m * min(n, k) > kept:
        return 'outer_chunks'
    if n == k and platform == 'gpu':
        return 'outer'
    return 'x_first' if k <= n else 'outer'


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
        missing or of length 1 it is contracted once, not once per position. Or integers [...] in
        [0, m), each standing for the one-hot context with its 1 there; out of range they are
        clipped.
      W: [m, n, k].
      order: one of the orders of `plan`; None lets `plan` choose. 'groups' has no forward-mode
        derivative.
      precision: as in `jax.lax.dot_general`.

    Returns:
      [..., k] in the promoted dtype of x, z and W.

    Raises:
      ValueError: if the shapes do not fit or the order is unknown.
    """
    if order is not None and order not in get_args(Order):
        raise ValueError(f'unknown order {order!r}; known: {", ".join(get_args(Order))}')
    by_id = jnp.issubdtype(z.dtype, jnp.integer)
    if W.ndim != 3 or x.shape[-1:] != W.shape[1:2] or not (by_id or z.shape[-1:] == W.shape[:1]):
        raise ValueError(
            f'W must be [m, n, k] with z [..., m] and x [..., n]; '
            f'got W {W.shape}, z {z.shape}, x {x.shape}'
        )
    if order is not None and order not in (ID_ORDERS if by_id else DENSE_ORDERS):
        raise ValueError(
            f'the order {order!r} is for {"a dense context" if by_id else "integer ids"}, but z is '
            f'{z.dtype}; known for it: {", ".join(ID_ORDERS if by_id else DENSE_ORDERS)}'
        )
    if order is None:
        context = 'ids' if by_id else 'dense'
        order = choose_order(x.shape, z.shape, W.shape[2], context, target_platform(), len(W))  # type: ignore
    if order == 'one_hot':
        one_hot = jax.nn.one_hot(jnp.clip(z, 0, len(W) - 1), len(W), dtype=x.dtype)
        return bilinear(x, one_hot, W, precision=precision)
    if by_id:
        return _by_id(x, z, W, order, precision)
    return _dense(x, z, W, order, precision)


def _dense(x: Array, z: Array, W: Array, order: Order, precision: jax.lax.PrecisionLike) -> Array:
    x_axes, z_axes = _aligned(x.shape, z.shape)
    out_axes = np.broadcast_shapes(x_axes, z_axes)  # an axis of 0 and one of 1 make one of 0
    m, n, k = W.shape
    is_tpu = target_platform() == 'tpu'
    if is_tpu and x_axes == z_axes:  # XLA:TPU is slow where rows have more than one axis
        x_axes = z_axes = (math.prod(x_axes),)
        x, z = x.reshape(*x_axes, n), z.reshape(*z_axes, m)
    X, Z, Y = _letters(x_axes, z_axes)
    x, z = _squeezed(x, 1), _squeezed(z, 1)
    dtype = jnp.result_type(x, z, W)
    accumulator = accumulation_dtype(dtype)

    def product(equation: str, a: Array, b: Array, out_dtype: DTypeLike | None = None) -> Array:
        return _accumulated(
            jnp.einsum, equation, a, b, precision=precision, out_dtype=out_dtype or dtype
        )

    def chunks(part: Callable[..., Array], *rows: Array) -> Array:
        """Σ of part over the rows, in f32 at least; the backward pass computes each part again."""

        def add(y: Array, row: tuple[Array, ...]) -> tuple[Array, None]:
            return y + part(*row), None

        axes = (size for size in np.broadcast_shapes(x_axes, z_axes) if size != 1)
        zeros = jnp.zeros((*axes, k), accumulator)
        y, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zeros, rows)
        return y.astype(dtype)

    match order:
        # XLA:TPU fuses a product with the elementwise operations that make its inputs and with the
        # sums of its output, as long as no reshape of the last two axes is between them. So neither
        # z ⊗ x nor its gradient is written; an einsum for z ⊗ x would make products of these sums.
        case 'outer' if is_tpu:

            def fused(x: Array, z: Array, W: Array) -> Array:
                x, z = x.astype(accumulator), z.astype(accumulator)
                zx = z.reshape(*z_axes, m, 1) * x.reshape(*x_axes, 1, n)
                return product(f'{Y}mn,mnk->{Y}k', _squeezed(zx, 2).astype(dtype), W)

            y = jax.checkpoint(fused, prevent_cse=False)(x, z, W)
        case 'x_first' if is_tpu:
            xW = product(f'{X}n,mnk->{X}mk', x, W)
            y = product(f'{Z}m,{X}mk->{Y}k', z, xW)
        case 'z_first' if is_tpu:
            zW = product(f'{Z}m,mnk->{Z}nk', z, W)
            y = product(f'{X}n,{Z}nk->{Y}k', x, zW)
        case 'outer':
            zx = jnp.einsum(f'{Z}m,{X}n->{Y}mn', z, x)
            zx = zx.reshape(*zx.shape[:-2], m * n)
            y = linear(zx, W.reshape(m * n, k), precision=precision).astype(dtype)
        case 'outer_chunks':
            size = _divisor(m, at_most=max(1, 2 * _NARROW // max(1, n)))

            def outer(z: Array, W: Array) -> Array:
                zx = jnp.einsum(f'{Z}m,{X}n->{Y}mn', z, x)
                zx = zx.reshape(*zx.shape[:-2], size * n)
                W = W.reshape(size * n, k)
                return linear(zx, W, out_dtype=accumulator, precision=precision)

            zs = jnp.moveaxis(z.reshape(*z.shape[:-1], m // size, size), -2, 0)
            y = chunks(outer, zs, W.reshape(m // size, size, n, k))
        case 'x_first':
            xW = linear(x, W.swapaxes(0, 1).reshape(n, m * k), precision=precision).astype(dtype)
            y = product(f'{Z}m,{X}mk->{Y}k', z, xW.reshape(*x.shape[:-1], m, k))
        case 'z_first':
            zW = linear(z, W.reshape(m, n * k), precision=precision).astype(dtype)
            y = product(f'{X}n,{Z}nk->{Y}k', x, zW.reshape(*z.shape[:-1], n, k))
        case 'z_first_chunks':
            row = 4 * max(1, math.prod(z_axes) * k)  # bytes
            size = _divisor(n, at_most=max(1, _CHUNK // row))

            def generated(x: Array, W: Array) -> Array:
                zW = product(f'{Z}m,mnk->{Z}nk', z, W)
                return product(f'{X}n,{Z}nk->{Y}k', x, zW, accumulator)

            xs = jnp.moveaxis(x.reshape(*x.shape[:-1], n // size, size), -2, 0)
            y = chunks(generated, xs, jnp.moveaxis(W.reshape(m, n // size, size, k), 1, 0))
    return y.reshape(*out_axes, k)


def _divisor(size: int, at_most: int) -> int:
    """The largest divisor of size that is not above `at_most`."""
    parts = range(min(size, at_most), 0, -1)
    return next((part for part in parts if size % part == 0), 1)  # 1 for no rows


def _by_id(x: Array, ids: Array, W: Array, order: Order, precision: jax.lax.PrecisionLike) -> Array:
    """W[ids] x: x [..., n], ids [...], W [m, n, k] → [..., k]."""
    x_axes, axes = _aligned(x.shape, (*ids.shape, 1))
    out_axes = np.broadcast_shapes(x_axes, axes)
    ids = jnp.clip(ids, 0, W.shape[0] - 1)
    dtype = jnp.result_type(x, W)
    if order == 'rows':
        X, Z, Y = _letters(x_axes, axes)
        rows = _squeezed(W.astype(dtype)[ids.reshape(axes)], 2)
        y = _accumulated(
            jnp.einsum, f'{X}n,{Z}nk->{Y}k', _squeezed(x, 1), rows, precision=precision
        )
        return y.reshape(*out_axes, W.shape[2])
    x = jnp.broadcast_to(x.reshape(*x_axes, x.shape[-1]), (*out_axes, x.shape[-1]))
    ids = jnp.broadcast_to(ids.reshape(axes), out_axes).reshape(-1)
    y = _groups(x.reshape(-1, x.shape[-1]).astype(dtype), ids, W.astype(dtype), precision)
    return y.reshape(*out_axes, W.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _groups(x: Array, ids: Array, W: Array, precision: jax.lax.PrecisionLike) -> Array:
    """W[ids] x by rows [B, n] sorted by id, so many of one id at a time; reverse mode only."""
    order, sizes, starts = _sorted(ids, W.shape[0])
    ys = _grouped(_padded(x[order]), sizes, starts, W, precision)
    return ys[jnp.argsort(order)]


def _groups_forward(
    x: Array, ids: Array, W: Array, precision: jax.lax.PrecisionLike
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _groups(x, ids, W, precision), (x, ids, W)


def _groups_backward(
    precision: jax.lax.PrecisionLike, residuals: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, None, Array]:
    x, ids, W = residuals
    order, sizes, starts = _sorted(ids, W.shape[0])
    xs, dys = _padded(x[order]), _padded(dy[order])
    dx = _grouped(dys, sizes, starts, W.swapaxes(1, 2), precision)[jnp.argsort(order)]
    accumulator = accumulation_dtype(x, dy)

    def group(_: None, of: tuple[Array, Array]) -> tuple[None, Array]:
        size, start = of

        def block(i: Array, dW: Array) -> Array:
            at = start + i * _BLOCK
            row = jnp.arange(_BLOCK)[:, None] < size - i * _BLOCK
            x_block = jnp.where(row, jax.lax.dynamic_slice_in_dim(xs, at, _BLOCK), 0)
            dy_block = jax.lax.dynamic_slice_in_dim(dys, at, _BLOCK)
            return dW + jnp.matmul(
                x_block.T, dy_block, precision=precision, preferred_element_type=accumulator
            )

        zeros = jnp.zeros(W.shape[1:], accumulator)
        return None, jax.lax.fori_loop(0, -(-size // _BLOCK), block, zeros).astype(W.dtype)

    _, dW = jax.lax.scan(group, None, (sizes, starts))
    return dx, None, dW


_groups.defvjp(_groups_forward, _groups_backward)


def _sorted(ids: Array, m: int) -> tuple[Array, Array, Array]:
    """The order that sorts the ids; how many there are of each, and where each begins: [m]."""
    sizes = jnp.bincount(ids, length=m)
    return jnp.argsort(ids), sizes, jnp.cumsum(sizes) - sizes


def _padded(rows: Array) -> Array:
    return jnp.concatenate([rows, jnp.zeros((_BLOCK, rows.shape[1]), rows.dtype)])


def _grouped(
    xs: Array, sizes: Array, starts: Array, W: Array, precision: jax.lax.PrecisionLike
) -> Array:
    """Rows sorted by id and padded by a block, [B + _BLOCK, n] → [B, k].

    The last block of a group runs over its end; the groups after it write their rows again.
    """

    def group(ys: Array, of: tuple[Array, Array, Array]) -> tuple[Array, None]:
        W_i, size, start = of

        def block(i: Array, ys: Array) -> Array:
            at = start + i * _BLOCK
            rows = jax.lax.dynamic_slice_in_dim(xs, at, _BLOCK)
            y = _accumulated(jnp.matmul, rows, W_i, precision=precision)
            return jax.lax.dynamic_update_slice_in_dim(ys, y, at, 0)

        return jax.lax.fori_loop(0, -(-size // _BLOCK), block, ys), None

    zeros = jnp.zeros((xs.shape[0], W.shape[2]), jnp.result_type(xs, W))
    ys, _ = jax.lax.scan(group, zeros, (W, sizes, starts))
    return ys[:-_BLOCK]


def linear(
    x: Array,
    V: Array,
    *,
    out_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """Vx, [..., n] and [n, k] → [..., k], accumulated in f32 at least.

    Of integers [...], the rows of V; out of range they are clipped, as in `bilinear`.

    Leading axes are flattened, so that the product and both of its gradients are plain matrix
    products: XLA on CPU takes twice as long for the gradient of a [T, B, n] by [n, k] product.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return V[jnp.clip(x, 0, len(V) - 1)].astype(out_dtype or V.dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
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
    for a narrow x its transpose costs less than it saves (8.0 → 4.9 ms for 64 × 2048 × 1024). The
    barrier around dV keeps XLA from turning the product around where V itself is a transpose, as an
    output embedding is (7.9 → 3.1 ms of CPU for the same sizes on another machine).
    """
    (x, V), (dx, dV) = primals, tangents
    dot = functools.partial(_accumulated, out_dtype=out_dtype, precision=precision)
    if target_platform() == 'cpu' and x.shape[-1] <= _NARROW < x.shape[0]:
        x_T, dV = jax.lax.optimization_barrier(x.T), jax.lax.optimization_barrier(dV)
        of_V = dot(functools.partial(jnp.einsum, 'nk,nb->kb'), dV, x_T).T
    else:
        of_V = dot(jnp.matmul, x, dV)
    return _matmul(x, V, out_dtype, precision), dot(jnp.matmul, dx, V) + of_V


def accumulation_dtype(*operands: Any) -> Any:
    """Return the dtype in which products of these arrays or dtypes add up: f32 at least."""
    return jnp.promote_types(jnp.result_type(*operands), jnp.float32)


def _accumulated(
    product: Callable[..., Array],
    *operands: Any,
    out_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """The product, summed in f32 at least and rounded once, by default to the operands' dtype."""
    dtype = jnp.result_type(*(a for a in operands if not isinstance(a, str)))
    y = product(*operands, precision=precision, preferred_element_type=accumulation_dtype(dtype))
    return y.astype(out_dtype or dtype)


def _letters(x_axes: Sequence[int], z_axes: Sequence[int]) -> tuple[str, str, str]:
    """A letter for each leading axis of x, of z and of both, none for an axis of length 1.

    Without those axes each einsum of two is one dot_general.
    """
    letters = string.ascii_uppercase[: len(x_axes)]
    X = ''.join(c for c, size in zip(letters, x_axes, strict=True) if size != 1)
    Z = ''.join(c for c, size in zip(letters, z_axes, strict=True) if size != 1)
    return X, Z, ''.join(c for c in letters if c in X or c in Z)


def _squeezed(a: Array, kept: int) -> Array:
    """a without its axes of length 1, but for the last `kept`."""
    return a.reshape(*(size for size in a.shape[:-kept] if size != 1), *a.shape[-kept:])


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
