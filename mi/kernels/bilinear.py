"""The kernel for zᵀWx: a pure function with several orders of evaluation.

Shapes: x [..., n], z [..., m], W [m, n, k] → [..., k]; leading axes of x and z broadcast.

If x and z vary along the same axes, every order of evaluation costs about 2·B·m·n·k operations, and
the orders differ only in the intermediate array that they write and read back. If one stream is
shared along an axis, contracting that stream first does this part of the work once instead of once
per position. If the context is given as integer ids, only W[i] x is computed, which takes m times
fewer operations. docs/evaluation.md has the measurements.
"""

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.by_id import BLOCK_ROWS, multiply_by_id
from mi.kernels.linear import (
    Platform,
    Precision,
    accumulate,
    accumulation_dtype,
    clip_ids,
    linear,
    target_platform,
)

Order = Literal[
    'outer', 'outer_chunks', 'x_first', 'z_first', 'z_first_chunks', 'groups', 'rows', 'one_hot'
]

DENSE_ORDERS: tuple[Order, ...] = ('outer', 'outer_chunks', 'x_first', 'z_first', 'z_first_chunks')
ID_ORDERS: tuple[Order, ...] = ('groups', 'rows', 'one_hot')

_FEW_ROWS = 64
_TPU_LANES = 128  # columns in one TPU product
_MAX_BYTES = {'cpu': 2**26, 'gpu': 2**30, 'tpu': 2**26}  # largest intermediate kept in one piece
_CHUNK_FEATURES = 1024  # m·n of a chunk of z ⊗ x
_CHUNK_BYTES = 12 * 2**20  # generated weights per chunk


def choose_order(
    x_shape: Sequence[int],
    z_shape: Sequence[int],
    features: int,
    context: Literal['dense', 'ids'] = 'dense',
    platform: Platform = 'cpu',
    contexts: int = 0,
) -> Order:
    """Choose the evaluation order of zᵀWx from static shapes and the kind of context.

    ================  =================  ====================================  ===================
    order             first product      intermediate (B rows)                 kept for backward
    ================  =================  ====================================  ===================
    `outer`           z ⊗ x              B·m·n, the input of a product         it; x, z, W on TPU
    `outer_chunks`    z ⊗ x, by parts    for some rows of W at a time          x, z and W
    `x_first`         xW                 B_x·m·k, the output of a product      it
    `z_first`         zᵀW                B_z·n·k, generated weights W'(z)      it
    `z_first_chunks`  zᵀW, by parts      some columns of W'(z) at a time       x, z and W
    `rows`            W[ids]             B_z·n·k, the selected rows of W       it
    `groups`          none               x sorted by id                        x and W
    `one_hot`         as a dense order, with m times the operations of `rows` and `groups`
    ================  =================  ====================================  ===================

    The chunked orders recompute their intermediate in the backward pass. If a stream is shared
    along some axis, this returns the order with the fewest operations. Otherwise it returns the
    order with the smallest intermediate, with thresholds that were measured on two x86 cores and on
    one H200, in f32 (TF32 on the H200) and bf16. On a TPU it returns `outer`, which the compiler
    fuses, unless k is small; this threshold comes from the compiler's cost estimates. The order
    affects the speed but not the result.

    Args:
      x_shape: shape of x, [..., n].
      z_shape: shape of z: [..., m], or [...] if `context` is 'ids'.
      features: k, the number of output features.
      context: 'dense', or 'ids' for integer ids in [0, m).
      platform: the platform that the product runs on.
      contexts: m, the number of contexts. Required if `context` is 'ids'.
    """
    # A symbolic size counts as 1: a step that is exported for any batch mostly has few rows.
    x_shape, z_shape = _fix_sizes(x_shape), _fix_sizes(z_shape)
    if context == 'ids':
        return _choose_id_order(x_shape, z_shape, features, platform, contexts)
    x_axes, z_axes = _align_leading_axes(x_shape, z_shape)
    m, n, k = z_shape[-1], x_shape[-1], features
    x_rows, z_rows = math.prod(x_axes), math.prod(z_axes)
    num_rows = math.prod(np.broadcast_shapes(x_axes, z_axes))
    max_bytes = _MAX_BYTES[platform]

    # One stream is shared: count operations.
    if x_axes != z_axes:
        z_first_cost = z_rows * m * n * k + num_rows * n * k
        x_first_cost = x_rows * m * n * k + num_rows * m * k
        if x_first_cost < z_first_cost:
            return 'x_first'
        return 'z_first' if 4 * z_rows * n * k <= max_bytes else 'z_first_chunks'

    # Both streams vary together: choose the smallest intermediate.
    if platform == 'tpu':
        return 'x_first' if k < _TPU_LANES and 4 * k <= n else 'outer'
    weight_bytes = 4 * num_rows * n * k
    if platform == 'cpu' and num_rows <= _FEW_ROWS:
        return 'z_first' if k < m and weight_bytes <= max_bytes else 'outer'
    if m > max(n, k) and weight_bytes <= max_bytes:
        return 'z_first'
    if 4 * num_rows * m * min(n, k) > max_bytes:
        return 'outer_chunks'
    if n == k and platform == 'gpu':
        return 'outer'
    return 'x_first' if k <= n else 'outer'


def _fix_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 1 for size in shape)


def _choose_id_order(
    x_shape: Sequence[int],
    id_shape: Sequence[int],
    features: int,
    platform: Platform,
    contexts: int,
) -> Order:
    x_axes, id_axes = _align_leading_axes(x_shape, (*id_shape, 1))
    has_few_rows = math.prod(np.broadcast_shapes(x_axes, id_axes)) <= BLOCK_ROWS
    is_shared = math.prod(x_axes) >= BLOCK_ROWS * math.prod(id_axes)
    if platform != 'cpu' and not is_shared and contexts <= max(x_shape[-1], features):
        return 'one_hot'  # one large product instead of a loop over small ones
    return 'rows' if has_few_rows or is_shared else 'groups'


def bilinear(
    x: Array,
    z: Array,
    W: Array,
    *,
    order: Order | None = None,
    precision: Precision = None,
) -> Array:
    """Compute y = zᵀWx, i.e. y_k = Σ_m Σ_n z_m W_mnk x_n.

    Products accumulate in at least f32, whatever the dtype of the inputs.

    Args:
      x: the input, [..., n].
      z: the context, [..., m], or integer ids [...] of one-hot contexts. Its leading axes broadcast
        against those of x. A missing axis or an axis of length 1 is contracted once, not once per
        position. Ids outside of [0, m) are clipped.
      W: the weights, [m, n, k].
      order: one of the orders that `choose_order` lists. Defaults to the one that it chooses.
        'groups' does not support forward-mode differentiation.
      precision: as in `jax.lax.dot_general`.

    Returns:
      zᵀWx, [..., k], in the promoted dtype of x, z and W.

    Raises:
      ValueError: if the shapes do not match, or the order is unknown or unsuitable for z.
    """
    # Choose an order.
    has_ids = jnp.issubdtype(z.dtype, jnp.integer)
    _check_operands(x, z, W, order)
    if order is None:
        context: Literal['dense', 'ids'] = 'ids' if has_ids else 'dense'
        order = choose_order(x.shape, z.shape, W.shape[2], context, target_platform(), len(W))

    # Evaluate by it: ids first, then dense contexts.
    if order == 'one_hot':
        dense_context = jax.nn.one_hot(clip_ids(z, len(W)), len(W), dtype=x.dtype)
        return bilinear(x, dense_context, W, precision=precision)
    if order == 'rows':
        return _multiply_selected_rows(x, z, W, precision)
    if order == 'groups':
        return _multiply_groups(x, z, W, precision)
    return _multiply_dense(x, z, W, order, precision)


def _check_operands(x: Array, z: Array, W: Array, order: Order | None) -> None:
    if order is not None and order not in get_args(Order):
        raise ValueError(f'unknown order {order!r}; known: {", ".join(get_args(Order))}')
    has_ids = jnp.issubdtype(z.dtype, jnp.integer)
    if W.ndim != 3 or x.shape[-1:] != W.shape[1:2] or not (has_ids or z.shape[-1:] == W.shape[:1]):
        raise ValueError(
            f'W must be [m, n, k] with z [..., m] and x [..., n]; '
            f'got W {W.shape}, z {z.shape}, x {x.shape}'
        )
    known_orders = ID_ORDERS if has_ids else DENSE_ORDERS
    if order is not None and order not in known_orders:
        context_kind = 'integer ids' if has_ids else 'a dense context'
        raise ValueError(
            f'order = {order!r}: expected an order for {context_kind}, because z is '
            f'{z.dtype}. Try {", ".join(known_orders)}'
        )


class _Operands(NamedTuple):
    """The operands of zᵀWx for einsum, without leading axes of length 1.

    Attributes:
      x, z, W: the operands, [X…, n], [Z…, m] and [m, n, k].
      x_labels, z_labels, output_labels: one letter for each leading axis of x, z and the output.
      x_axes, z_axes: lengths of the leading axes before axes of length 1 were removed.
      precision: as in `jax.lax.dot_general`.
    """

    x: Array
    z: Array
    W: Array
    x_labels: str
    z_labels: str
    output_labels: str
    x_axes: tuple[int, ...]
    z_axes: tuple[int, ...]
    precision: Precision

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.result_type(self.x, self.z, self.W)

    def label(self, equation: str) -> str:
        """Replace X, Z and Y with the labels of the leading axes of x, z and the output."""
        labels = {'X': self.x_labels, 'Z': self.z_labels, 'Y': self.output_labels}
        return ''.join(labels.get(letter, letter) for letter in equation)


def _multiply_dense(x: Array, z: Array, W: Array, order: Order, precision: Precision) -> Array:
    x_axes, z_axes = _align_leading_axes(x.shape, z.shape)
    output_axes = jnp.broadcast_shapes(x_axes, z_axes)  # lengths 0 and 1 broadcast to 0
    is_tpu = target_platform() == 'tpu'
    if is_tpu and x_axes == z_axes:  # XLA:TPU is slow if rows have more than one axis
        x_axes = z_axes = (math.prod(x_axes),)
        x, z = x.reshape(*x_axes, x.shape[-1]), z.reshape(*z_axes, z.shape[-1])
    labels = _label_axes(x_axes, z_axes)
    x, z = _squeeze_leading(x, 1), _squeeze_leading(z, 1)
    operands = _Operands(x, z, W, *labels, x_axes, z_axes, precision)
    evaluators = _TPU_EVALUATORS if is_tpu else _EVALUATORS
    return evaluators[order](operands).reshape(*output_axes, W.shape[2])


def _evaluate_outer(operands: _Operands) -> Array:
    m, n, k = operands.W.shape
    products = jnp.einsum(operands.label('Zm,Xn->Ymn'), operands.z, operands.x)
    products = products.reshape(*products.shape[:-2], m * n)
    output = linear(products, operands.W.reshape(m * n, k), precision=operands.precision)
    return output.astype(operands.dtype)


def _evaluate_outer_chunks(operands: _Operands) -> Array:
    m, n, k = operands.W.shape
    chunk_size = _find_divisor(m, limit=max(1, _CHUNK_FEATURES // max(1, n)))

    def multiply_chunk(z: Array, W: Array) -> Array:
        products = jnp.einsum(operands.label('Zm,Xn->Ymn'), z, operands.x)
        return linear(
            products.reshape(*products.shape[:-2], chunk_size * n),
            W.reshape(chunk_size * n, k),
            out_dtype=accumulation_dtype(operands.dtype),
            precision=operands.precision,
        )

    z_chunks = _split_axis(operands.z, -1, chunk_size)
    W_chunks = _split_axis(operands.W, 0, chunk_size)
    return _sum_chunks(operands, multiply_chunk, z_chunks, W_chunks)


def _evaluate_x_first(operands: _Operands) -> Array:
    m, n, k = operands.W.shape
    W = operands.W.swapaxes(0, 1).reshape(n, m * k)
    xW = linear(operands.x, W, precision=operands.precision).astype(operands.dtype)
    xW = xW.reshape(*xW.shape[:-1], m, k)
    return _einsum(operands, 'Zm,Xmk->Yk', operands.z, xW)


def _evaluate_z_first(operands: _Operands) -> Array:
    m, n, k = operands.W.shape
    W = operands.W.reshape(m, n * k)
    zW = linear(operands.z, W, precision=operands.precision).astype(operands.dtype)
    zW = zW.reshape(*zW.shape[:-1], n, k)
    return _einsum(operands, 'Xn,Znk->Yk', operands.x, zW)


def _evaluate_z_first_chunks(operands: _Operands) -> Array:
    _, n, k = operands.W.shape
    column_bytes = 4 * max(1, math.prod(operands.z_axes) * k)
    chunk_size = _find_divisor(n, limit=max(1, _CHUNK_BYTES // column_bytes))

    def multiply_chunk(x: Array, W: Array) -> Array:
        zW = _einsum(operands, 'Zm,mnk->Znk', operands.z, W)
        out_dtype = accumulation_dtype(operands.dtype)
        return _einsum(operands, 'Xn,Znk->Yk', x, zW, out_dtype)

    x_chunks = _split_axis(operands.x, -1, chunk_size)
    W_chunks = _split_axis(operands.W, 1, chunk_size)
    return _sum_chunks(operands, multiply_chunk, x_chunks, W_chunks)


def _evaluate_outer_on_tpu(operands: _Operands) -> Array:
    """Compute `outer` so that neither z ⊗ x nor its gradient is written to memory.

    XLA:TPU fuses a matrix product with the elementwise operations before it and the sums after it,
    unless they are separated by a reshape of the last two axes. An einsum for z ⊗ x would turn
    these sums into matrix products.
    """
    accumulator = accumulation_dtype(operands.dtype)

    def multiply(x: Array, z: Array, W: Array) -> Array:
        z_column = z.astype(accumulator).reshape(*operands.z_axes, z.shape[-1], 1)
        x_row = x.astype(accumulator).reshape(*operands.x_axes, 1, x.shape[-1])
        products = _squeeze_leading(z_column * x_row, 2).astype(operands.dtype)
        return _einsum(operands, 'Ymn,mnk->Yk', products, W)

    return jax.checkpoint(multiply, prevent_cse=False)(operands.x, operands.z, operands.W)


def _evaluate_x_first_on_tpu(operands: _Operands) -> Array:
    xW = _einsum(operands, 'Xn,mnk->Xmk', operands.x, operands.W)
    return _einsum(operands, 'Zm,Xmk->Yk', operands.z, xW)


def _evaluate_z_first_on_tpu(operands: _Operands) -> Array:
    zW = _einsum(operands, 'Zm,mnk->Znk', operands.z, operands.W)
    return _einsum(operands, 'Xn,Znk->Yk', operands.x, zW)


_EVALUATORS: dict[Order, Callable[[_Operands], Array]] = {
    'outer': _evaluate_outer,
    'outer_chunks': _evaluate_outer_chunks,
    'x_first': _evaluate_x_first,
    'z_first': _evaluate_z_first,
    'z_first_chunks': _evaluate_z_first_chunks,
}
_TPU_EVALUATORS: dict[Order, Callable[[_Operands], Array]] = _EVALUATORS | {
    'outer': _evaluate_outer_on_tpu,
    'x_first': _evaluate_x_first_on_tpu,
    'z_first': _evaluate_z_first_on_tpu,
}


def _einsum(
    operands: _Operands,
    equation: str,
    left: Array,
    right: Array,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Compute an einsum of two arrays in at least f32, replacing X, Z and Y as in `label`."""
    return accumulate(
        functools.partial(jnp.einsum, operands.label(equation)),
        left,
        right,
        precision=operands.precision,
        out_dtype=out_dtype or operands.dtype,
    )


def _sum_chunks(operands: _Operands, multiply_chunk: Callable[..., Array], *chunks: Array) -> Array:
    """Return Σ multiply_chunk(*chunk), accumulated in at least f32.

    The backward pass recomputes each chunk.
    """

    def add_chunk(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return total + multiply_chunk(*chunk), None

    output_axes = jnp.broadcast_shapes(operands.x_axes, operands.z_axes)
    shape = *(length for length in output_axes if length != 1), operands.W.shape[2]
    zeros = jnp.zeros(shape, accumulation_dtype(operands.dtype))
    total, _ = jax.lax.scan(jax.checkpoint(add_chunk, prevent_cse=False), zeros, chunks)
    return total.astype(operands.dtype)


def _split_axis(array: Array, axis: int, chunk_size: int) -> Array:
    """Split an axis into chunks of this size, and stack them along a new first axis."""
    axis %= array.ndim
    leading, length, trailing = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    chunks = array.reshape(*leading, length // chunk_size, chunk_size, *trailing)
    return jnp.moveaxis(chunks, axis, 0)


def _find_divisor(size: int, limit: int) -> int:
    """Return the largest divisor of `size` that is at most `limit`, or 1 if `size` is 0."""
    candidates = range(min(size, limit), 0, -1)
    return next((divisor for divisor in candidates if size % divisor == 0), 1)


def _multiply_selected_rows(x: Array, ids: Array, W: Array, precision: Precision) -> Array:
    """Compute W[ids] x [..., k] for x [..., n] and ids [...] from a copy of W[i] for every id."""
    x_axes, id_axes = _align_leading_axes(x.shape, (*ids.shape, 1))
    x_labels, id_labels, output_labels = _label_axes(x_axes, id_axes)
    ids = clip_ids(ids, W.shape[0]).reshape(id_axes)
    selected = _squeeze_leading(W.astype(jnp.result_type(x, W))[ids], 2)
    product = functools.partial(jnp.einsum, f'{x_labels}n,{id_labels}nk->{output_labels}k')
    output = accumulate(product, _squeeze_leading(x, 1), selected, precision=precision)
    return output.reshape(*jnp.broadcast_shapes(x_axes, id_axes), W.shape[2])


def _multiply_groups(x: Array, ids: Array, W: Array, precision: Precision) -> Array:
    """Compute W[ids] x [..., k] for x [..., n] and ids [...] in groups of rows with the same id."""
    x_axes, id_axes = _align_leading_axes(x.shape, (*ids.shape, 1))
    output_axes = jnp.broadcast_shapes(x_axes, id_axes)
    n, dtype = x.shape[-1], jnp.result_type(x, W)
    ids = clip_ids(ids, W.shape[0])
    x = jnp.broadcast_to(x.reshape(*x_axes, n), (*output_axes, n))
    ids = jnp.broadcast_to(ids.reshape(id_axes), output_axes).reshape(-1)
    output = multiply_by_id(x.reshape(-1, n).astype(dtype), ids, W.astype(dtype), precision)
    return output.reshape(*output_axes, W.shape[2])


def _label_axes(x_axes: Sequence[int], z_axes: Sequence[int]) -> tuple[str, str, str]:
    """Return one letter for each leading axis of x, z and the output that is longer than 1.

    Without the axes of length 1, every einsum of two operands is a single dot_general.
    """
    letters = string.ascii_uppercase[: len(x_axes)]

    def select_letters(axes: Sequence[int]) -> str:
        pairs = zip(letters, axes, strict=True)
        return ''.join(letter for letter, length in pairs if length != 1)

    x_labels, z_labels = select_letters(x_axes), select_letters(z_axes)
    return x_labels, z_labels, ''.join(sorted({*x_labels, *z_labels}))


def _squeeze_leading(array: Array, num_trailing: int) -> Array:
    """Remove axes of length 1 from all but the last `num_trailing` axes of an array."""
    leading, trailing = array.shape[:-num_trailing], array.shape[-num_trailing:]
    return array.reshape(*(length for length in leading if length != 1), *trailing)


def _align_leading_axes(
    x_shape: Sequence[int], z_shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the leading axes of both streams, padded on the left with ones to equal rank."""
    x_axes, z_axes = tuple(x_shape[:-1]), tuple(z_shape[:-1])
    ndim = max(len(x_axes), len(z_axes))
    x_axes = (1,) * (ndim - len(x_axes)) + x_axes
    z_axes = (1,) * (ndim - len(z_axes)) + z_axes
    pairs = zip(x_axes, z_axes, strict=True)
    if any(x_axis != z_axis and 1 not in (x_axis, z_axis) for x_axis, z_axis in pairs):
        raise ValueError(
            f'the leading axes of x {tuple(x_shape)} and z {tuple(z_shape)} do not broadcast'
        )
    return x_axes, z_axes
