"""Places seeds, or whatever else is independent, over devices that never communicate.

As many seeds as there are devices, or any other number: where it does not divide, some seeds are
repeated so that every device has the same number, and the repeats' results are dropped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mi.training import sharding as training_sharding


def seed_mesh(count: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh that places `count` independent seeds, as evenly as they can be, over 'seed'.

    The largest share of a device is ceil(count / devices). Several processes use every device, as
    each of them has to run the program; one process uses no more than have a seed of their own.

    Args:
      count: seeds, or whatever else is independent, such as pairs of a seed and a learning rate.
      devices: all that there are, unless given.
    """
    devices = jax.devices() if devices is None else devices
    shards = len(devices)
    if len({device.process_index for device in devices}) == 1:
        shards = math.ceil(count / seeds_per_device(count, shards))
    return Mesh(
        np.reshape(np.asarray(devices[:shards], object), (shards, 1, 1)), training_sharding.AXES
    )


def seeds_per_device(count: int, devices: int) -> int:
    """Return the most seeds that a device has where `count` of them are placed over devices."""
    return math.ceil(count / devices)


def shard_map_seeds(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return the function of one seed, mapped over arrays [S, …] that `shard_seeds` has split.

    Each device maps over its own seeds, so there is nothing to communicate.
    """
    spec = PartitionSpec('seed')
    return jax.shard_map(
        jax.vmap(function), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )


def padded_indices(count: int, mesh: Mesh) -> np.ndarray:
    """Return which seed is at each place of a split axis: all, then repeats up to even shares."""
    shards = mesh.shape['seed']
    return np.arange(shards * seeds_per_device(count, shards)) % count


def shard_seeds(tree: Any, mesh: Mesh) -> Any:
    """Split host arrays [S, …] over 'seed', padded with repeats; every process has all of them."""
    sharding = training_sharding.seed_sharding(mesh)

    def shard(array: np.ndarray) -> Array:
        return training_sharding.shard_array(
            np.asarray(array)[padded_indices(len(array), mesh)], sharding
        )

    return jax.tree.map(shard, tree)


def gather_seeds(tree: Any, count: int) -> Any:
    """Return arrays that are split over 'seed' as host arrays [S, …], on every process.

    Args:
      tree: of arrays, all on the same mesh.
      count: S; the repeats that `shard_seeds` has added are dropped.
    """
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        gather = jax.jit(_identity, out_shardings=training_sharding.replicated(mesh))
        tree = training_sharding.to_local(gather(tree))
    return jax.tree.map(lambda a: a[:count], jax.device_get(tree))


def gathered_shapes(tree: Any, count: int) -> Any:
    """Return the shapes of what `gather_seeds` returns for arrays of these shapes."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), tree)


def _identity(tree: Any) -> Any:
    return tree
