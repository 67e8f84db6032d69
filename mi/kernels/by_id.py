"""The kernel for W[ids] x, which multiplies rows with the same id together, in blocks.

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
    """Compute W[ids] x for x [B, n], sorting rows by id internally. Only supports reverse mode."""
    permutation, group_sizes, group_starts = _sort_by_id(ids, W.shape[0])
    outputs = multiply_sorted_rows(x[permutation], W, group_sizes, group_starts, precision)
    return outputs[jnp.argsort(permutation)]


def _multiply_by_id_forward(
    x: Array, ids: Array, W: Array, precision: Precision
) -> tuple[Array, tuple[Array, Array, Array]]:
    return multiply_by_id(x, ids, W, precision), (x, ids, W)


def _multiply_by_id_backward(
    precision: Precision, residuals: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, None, Array]:
    # Sort both streams; the gradient of x is a product of the same kind.
    x, ids, W = residuals
    permutation, group_sizes, group_starts = _sort_by_id(ids, W.shape[0])
    sorted_x, sorted_cotangent = x[permutation], cotangent[permutation]
    x_cotangent = multiply_sorted_rows(
        sorted_cotangent, W.swapaxes(1, 2), group_sizes, group_starts, precision
    )
    W_cotangent = sum_sorted_products(
        sorted_x, sorted_cotangent, group_sizes, group_starts, precision
    )
    return x_cotangent[jnp.argsort(permutation)], None, W_cotangent.astype(W.dtype)


multiply_by_id.defvjp(_multiply_by_id_forward, _multiply_by_id_backward)


def _sort_by_id(ids: Array, num_ids: int) -> tuple[Array, Array, Array]:
    """Return the permutation that sorts the ids, and the size and start of each id's group."""
    group_sizes = jnp.bincount(ids, length=num_ids)
    return jnp.argsort(ids), group_sizes, jnp.cumsum(group_sizes) - group_sizes


def _append_zero_block(rows: Array) -> Array:
    return jnp.concatenate([rows, jnp.zeros((BLOCK_ROWS, rows.shape[1]), rows.dtype)])


# `mi.counting` recognizes the next two functions by their names, because the number of blocks in
# their loops is not in the jaxpr.
@functools.partial(jax.jit, static_argnames='precision')
def multiply_sorted_rows(
    x: Array, W: Array, group_sizes: Array, group_starts: Array, precision: Precision
) -> Array:
    """Multiply rows x [B, n], sorted by id, by the W [n, k] of their id, and return [B, k].

    The last block of a group can extend into the next groups, which then overwrite those rows.
    """
    x = _append_zero_block(x)

    def multiply_group(outputs: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        group_W, group_size, group_start = group

        def multiply_block(block_index: Array, outputs: Array) -> Array:
            offset = group_start + block_index * BLOCK_ROWS
            x_block = jax.lax.dynamic_slice_in_dim(x, offset, BLOCK_ROWS)
            output_block = accumulate(jnp.matmul, x_block, group_W, precision=precision)
            return jax.lax.dynamic_update_slice_in_dim(outputs, output_block, offset, 0)

        num_blocks = -(-group_size // BLOCK_ROWS)
        return jax.lax.fori_loop(0, num_blocks, multiply_block, outputs), None

    zeros = jnp.zeros((x.shape[0], W.shape[2]), jnp.result_type(x, W))
    outputs, _ = jax.lax.scan(multiply_group, zeros, (W, group_sizes, group_starts))
    return outputs[:-BLOCK_ROWS]


@functools.partial(jax.jit, static_argnames='precision')
def sum_sorted_products(
    x: Array, cotangent: Array, group_sizes: Array, group_starts: Array, precision: Precision
) -> Array:
    """Sum xᵀdy over the rows of each id, for x [B, n] and dy [B, k] sorted by id.

    Returns:
      The sums, [m, n, k], in the promoted dtype of x and dy.
    """
    dtype, accumulator = jnp.result_type(x, cotangent), accumulation_dtype(x, cotangent)
    x, cotangent = _append_zero_block(x), _append_zero_block(cotangent)

    def sum_group(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        group_size, group_start = group

        def add_block(block_index: Array, group_sum: Array) -> Array:
            offset = group_start + block_index * BLOCK_ROWS
            num_remaining = group_size - block_index * BLOCK_ROWS
            is_in_group = jnp.arange(BLOCK_ROWS)[:, None] < num_remaining
            x_block = jax.lax.dynamic_slice_in_dim(x, offset, BLOCK_ROWS)
            cotangent_block = jax.lax.dynamic_slice_in_dim(cotangent, offset, BLOCK_ROWS)
            return group_sum + jnp.matmul(
                jnp.where(is_in_group, x_block, 0).T,
                cotangent_block,
                precision=precision,
                preferred_element_type=accumulator,
            )

        zeros = jnp.zeros((x.shape[1], cotangent.shape[1]), accumulator)
        num_blocks = -(-group_size // BLOCK_ROWS)
        return None, jax.lax.fori_loop(0, num_blocks, add_block, zeros).astype(dtype)

    return jax.lax.scan(sum_group, None, (group_sizes, group_starts))[1]
