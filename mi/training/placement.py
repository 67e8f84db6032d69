"""Placement of independent seeds over devices that never communicate.

The number of seeds is arbitrary. If the devices do not divide it, some seeds are repeated, so that
every device has the same number, and the results of the repeats are dropped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mi.training import sharding as training_sharding

Tree = TypeVar('Tree')  # a pytree of arrays


def seed_mesh(count: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh that places `count` independent seeds as evenly as possible over 'seed'.

    No device has more than ceil(count / devices) seeds. Several processes use every device, because
    each process has to run the program. One process only uses devices that get a seed.

    Args:
      count: number of seeds, or of other independent items such as pairs of a seed and a learning
        rate.
      devices: the devices; None for all that are present.
    """
    devices = jax.devices() if devices is None else devices
    shards = len(devices)
    if len({device.process_index for device in devices}) == 1:
        shards = math.ceil(count / seeds_per_device(count, shards))
    return Mesh(
        np.reshape(np.asarray(devices[:shards], object), (shards, 1, 1)), training_sharding.AXES
    )


def seeds_per_device(count: int, devices: int) -> int:
    """Return the largest number of seeds on a device if `count` seeds are placed evenly."""
    return math.ceil(count / devices)


def shard_map_seeds(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return a function of one seed mapped over arrays [S, …] from `shard_seeds`.

    Each device maps over its own seeds and does not communicate.
    """
    spec = PartitionSpec('seed')
    return jax.shard_map(
        jax.vmap(function), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )


def padded_indices(count: int, mesh: Mesh) -> np.ndarray:
    """Return the index of the seed at each entry of a padded axis: all seeds, then repeats."""
    shards = mesh.shape['seed']
    return np.arange(shards * seeds_per_device(count, shards)) % count


def shard_seeds(tree: Any, mesh: Mesh) -> Any:
    """Shard host arrays [S, …] over 'seed', padded with repeats; every process passes all."""
    sharding = training_sharding.seed_sharding(mesh)

    def shard(array: np.ndarray) -> Array:
        return training_sharding.shard_array(
            np.asarray(array)[padded_indices(len(array), mesh)], sharding
        )

    return jax.tree.map(shard, tree)


def gather_seeds(tree: Any, count: int) -> Any:
    """Return arrays sharded over 'seed' as host arrays [S, …], on every process.

    Args:
      tree: arrays on one mesh.
      count: S, without the repeats that `shard_seeds` added.
    """
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        gather = jax.jit(_identity, out_shardings=training_sharding.replicated(mesh))
        tree = training_sharding.to_local(gather(tree))
    return jax.tree.map(lambda array: array[:count], jax.device_get(tree))


def gathered_shapes(tree: Tree, count: int) -> Tree:
    """Return the shapes that `gather_seeds` returns for arrays of these shapes."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), tree)


def _identity(tree: Tree) -> Tree:
    return tree
