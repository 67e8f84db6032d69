"""The kernel for W[ids] x: rows with the same id are multiplied together, a block at a time.

Shapes: x [B, n], ids [B], W [m, n, k] → [B, k].
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from mi.kernels.linear import Precision, accumulate, accumulation_dtype

BLOCK_ROWS = 32  # rows with the same id that are multiplied together


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply_by_id(x: Array, ids: Array, W: Array, precision: Precision) -> Array:
    """Compute W[ids] x for rows x [B, n], sorted by id; reverse mode only."""
    order, sizes, starts = _sort_by_id(ids, W.shape[0])
    y = _multiply_sorted(_pad_block(x[order]), sizes, starts, W, precision)
    return y[jnp.argsort(order)]


def _multiply_by_id_forward(
    x: Array, ids: Array, W: Array, precision: Precision
) -> tuple[Array, tuple[Array, Array, Array]]:
    return multiply_by_id(x, ids, W, precision), (x, ids, W)


def _multiply_by_id_backward(
    precision: Precision, residuals: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, None, Array]:
    # Sort both streams; the gradient of x is a product of the same kind.
    x, ids, W = residuals
    order, sizes, starts = _sort_by_id(ids, W.shape[0])
    sorted_x, sorted_dy = _pad_block(x[order]), _pad_block(dy[order])
    dx = _multiply_sorted(sorted_dy, sizes, starts, W.swapaxes(1, 2), precision)

    # The gradient of W, one group after another.
    accumulator = accumulation_dtype(x, dy)

    def compute_group_grad(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        size, start = group

        def add_block(i: Array, dW: Array) -> Array:
            offset = start + i * BLOCK_ROWS
            is_in_group = jnp.arange(BLOCK_ROWS)[:, None] < size - i * BLOCK_ROWS
            x_block = jax.lax.dynamic_slice_in_dim(sorted_x, offset, BLOCK_ROWS)
            dy_block = jax.lax.dynamic_slice_in_dim(sorted_dy, offset, BLOCK_ROWS)
            return dW + jnp.matmul(
                jnp.where(is_in_group, x_block, 0).T,
                dy_block,
                precision=precision,
                preferred_element_type=accumulator,
            )

        zeros = jnp.zeros(W.shape[1:], accumulator)
        num_blocks = -(-size // BLOCK_ROWS)
        return None, jax.lax.fori_loop(0, num_blocks, add_block, zeros).astype(W.dtype)

    _, dW = jax.lax.scan(compute_group_grad, None, (sizes, starts))
    return dx[jnp.argsort(order)], None, dW


multiply_by_id.defvjp(_multiply_by_id_forward, _multiply_by_id_backward)


def _sort_by_id(ids: Array, num_ids: int) -> tuple[Array, Array, Array]:
    """Return the permutation that sorts the ids, and the size and start of each id's group."""
    sizes = jnp.bincount(ids, length=num_ids)
    return jnp.argsort(ids), sizes, jnp.cumsum(sizes) - sizes


def _pad_block(rows: Array) -> Array:
    return jnp.concatenate([rows, jnp.zeros((BLOCK_ROWS, rows.shape[1]), rows.dtype)])


def _multiply_sorted(
    x: Array, sizes: Array, starts: Array, W: Array, precision: Precision
) -> Array:
    """Multiply rows that are sorted by id and padded by a block, [B + BLOCK_ROWS, n] → [B, k].

    The last block of a group runs over the group's end; the next groups overwrite those rows.
    """

    def multiply_group(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        W_i, size, start = group

        def multiply_block(i: Array, y: Array) -> Array:
            offset = start + i * BLOCK_ROWS
            rows = jax.lax.dynamic_slice_in_dim(x, offset, BLOCK_ROWS)
            block = accumulate(jnp.matmul, rows, W_i, precision=precision)
            return jax.lax.dynamic_update_slice_in_dim(y, block, offset, 0)

        return jax.lax.fori_loop(0, -(-size // BLOCK_ROWS), multiply_block, y), None

    zeros = jnp.zeros((x.shape[0], W.shape[2]), jnp.result_type(x, W))
    y, _ = jax.lax.scan(multiply_group, zeros, (W, sizes, starts))
    return y[:-BLOCK_ROWS]
