"""The rows of a batch that a device has under `jax.shard_map`: reductions and random keys.

Outside of a `shard_map` a device has all rows, and every reduction is the identity.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

ROWS = ('data', 'fsdp')  # the mesh axes that a batch is split over, see `mi.training.sharding`

Tree = TypeVar('Tree')

_part: contextvars.ContextVar[Array | None] = contextvars.ContextVar('_part', default=None)


def _axes() -> tuple[str, ...]:
    """Return the mesh axes over which the program being traced has its rows split by hand.

    Not those of one device: XLA keeps a reduction over them, which copies all of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in ROWS if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def sum_over_rows(tree: Tree) -> Tree:
    """Return the sums over the devices that share a batch: what each device has is of its rows."""
    axes = _axes()
    return jax.lax.psum(tree, axes) if axes else tree


def mean_over_rows(tree: Tree) -> Tree:
    """Return the means over the devices that share a batch, each of which has as many rows."""
    axes = _axes()
    return jax.lax.pmean(tree, axes) if axes else tree


def max_over_rows(tree: Tree) -> Tree:
    """Return the maxima over the devices that share a batch."""
    axes = _axes()
    return jax.lax.pmax(tree, axes) if axes else tree


def get_row_indices(rows: int) -> Array:
    """Return the numbers in the whole batch of the rows that this device has, [rows] int32."""
    part = _part.get()
    if part is not None:
        assert part.shape == (rows,), (part.shape, rows)
        return part
    axes = _axes()
    first = rows * jax.lax.axis_index(axes) if axes else 0
    return first + jnp.arange(rows, dtype=jnp.int32)


@contextlib.contextmanager
def select_rows(numbers: Array) -> Iterator[None]:
    """Trace what is computed of these rows alone, as one of several parts of the batch.

    Args:
      numbers: of the rows in the whole batch, [rows] int32.
    """
    token = _part.set(numbers)
    try:
        yield
    finally:
        _part.reset(token)


def make_row_keys(key: Array, rows: int) -> Array:
    """Return a random key for each row that this device has, [rows].

    A row has the same key however many devices share the batch.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, get_row_indices(rows))
