"""Placement of independent seeds over devices that never communicate.

The number of seeds is arbitrary. If the devices do not divide it, some seeds are repeated, so that
every device has the same number, and the results of the repeats are dropped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import chex
import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mi.training import sharding as training_sharding

Tree = TypeVar('Tree')  # a pytree of arrays


def seed_mesh(num_seeds: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh that places `num_seeds` independent seeds as evenly as possible over 'seed'.

    No device has more than ceil(num_seeds / devices) seeds. Several processes use every device,
    because each process has to run the program. One process only uses devices that get a seed.

    Args:
      num_seeds: number of seeds, or of other independent items such as pairs of a seed and a
        learning rate.
      devices: the devices; None for all that are present.
    """
    devices = jax.devices() if devices is None else devices
    num_shards = len(devices)
    if len({device.process_index for device in devices}) == 1:
        num_shards = math.ceil(num_seeds / seeds_per_device(num_seeds, num_shards))
    device_grid = np.reshape(np.asarray(devices[:num_shards], object), (num_shards, 1, 1))
    return Mesh(device_grid, training_sharding.AXES)


def seeds_per_device(num_seeds: int, num_devices: int) -> int:
    """Return the largest number of seeds on a device if `num_seeds` seeds are placed evenly."""
    return math.ceil(num_seeds / num_devices)


def shard_map_seeds(function: Callable[..., Tree], mesh: Mesh) -> Callable[..., Tree]:
    """Return a function of one seed mapped over arrays [S, …] from `shard_seeds`.

    Each device maps over its own seeds and does not communicate.
    """
    seed_spec = PartitionSpec('seed')
    return jax.shard_map(
        jax.vmap(function), mesh=mesh, in_specs=seed_spec, out_specs=seed_spec, check_vma=False
    )


def padded_indices(num_seeds: int, mesh: Mesh) -> np.ndarray:
    """Return the index of the seed at each entry of a padded axis: all seeds, then repeats."""
    num_shards = mesh.shape['seed']
    return np.arange(num_shards * seeds_per_device(num_seeds, num_shards)) % num_seeds


def shard_seeds(tree: chex.ArrayTree, mesh: Mesh) -> Any:
    """Shard host arrays [S, …] over 'seed', padded with repeats; every process passes all."""
    sharding = training_sharding.seed_sharding(mesh)

    def shard(array: np.ndarray) -> Array:
        return training_sharding.shard_array(
            np.asarray(array)[padded_indices(len(array), mesh)], sharding
        )

    return jax.tree.map(shard, tree)


def gather_seeds(tree: chex.ArrayTree, num_seeds: int) -> Any:
    """Return arrays sharded over 'seed' as host arrays [S, …], on every process.

    Args:
      tree: arrays on one mesh.
      num_seeds: S, without the repeats that `shard_seeds` added.
    """
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        gather = jax.jit(_identity, out_shardings=training_sharding.replicated(mesh))
        tree = training_sharding.to_local(gather(tree))
    return jax.tree.map(lambda array: array[:num_seeds], jax.device_get(tree))


def gathered_shapes(tree: Tree, num_seeds: int) -> Tree:
    """Return the shapes that `gather_seeds` returns for arrays of these shapes."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((num_seeds, *array.shape[1:]), array.dtype), tree
    )


def _identity(tree: Tree) -> Tree:
    return tree
