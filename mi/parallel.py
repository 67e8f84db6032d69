"""Several devices: one mesh of one axis, 'data', over which batches are split."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh(batch: int) -> Mesh:
    """All devices, or as many of them as divide the batch evenly."""
    count = max(n for n in range(1, jax.device_count() + 1) if batch % n == 0)
    return jax.make_mesh(
        (count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Every array's `axis` split over the devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*[None] * axis, 'data')))
