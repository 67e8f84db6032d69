"""Reductions and random keys for a batch whose rows `jax.shard_map` splits over devices.

Outside a `shard_map` a device has all rows, and every reduction is the identity.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

ROWS = ('data', 'fsdp')  # mesh axes that split a batch, see `mi.training.sharding`

Tree = TypeVar('Tree')

_selected_rows: contextvars.ContextVar[Array | None] = contextvars.ContextVar(
    '_selected_rows', default=None
)


def _get_row_axes() -> tuple[str, ...]:
    """Return the mesh axes over which the current `shard_map` splits the rows.

    Axes with one device are excluded, because XLA would keep a reduction over them as a copy.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in ROWS if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def sum_over_rows(tree: Tree) -> Tree:
    """Sum values over the devices that share a batch."""
    row_axes = _get_row_axes()
    return jax.lax.psum(tree, row_axes) if row_axes else tree


def mean_over_rows(tree: Tree) -> Tree:
    """Average values over the devices that share a batch, with equally many rows each."""
    row_axes = _get_row_axes()
    return jax.lax.pmean(tree, row_axes) if row_axes else tree


def max_over_rows(tree: Tree) -> Tree:
    """Return the elementwise maximum of values over the devices that share a batch."""
    row_axes = _get_row_axes()
    return jax.lax.pmax(tree, row_axes) if row_axes else tree


def get_row_indices(num_rows: int) -> Array:
    """Return the indices of this device's rows in the full batch, [num_rows] int32."""
    selected_rows = _selected_rows.get()
    if selected_rows is not None:
        assert selected_rows.shape == (num_rows,), (selected_rows.shape, num_rows)
        return selected_rows
    row_axes = _get_row_axes()
    first_row = num_rows * jax.lax.axis_index(row_axes) if row_axes else 0
    return first_row + jnp.arange(num_rows, dtype=jnp.int32)


@contextlib.contextmanager
def select_rows(indices: Array) -> Iterator[None]:
    """Make `get_row_indices` return these indices, to compute a batch in several parts.

    Args:
      indices: indices of the part's rows in the full batch, [rows] int32.
    """
    reset_token = _selected_rows.set(indices)
    try:
        yield
    finally:
        _selected_rows.reset(reset_token)


def make_row_keys(key: Array, num_rows: int) -> Array:
    """Return a random key for each row of this device, [num_rows].

    The key of a row does not depend on the number of devices that share the batch.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, get_row_indices(num_rows))
