"""Placement of independent seeds on devices that never communicate.

The number of seeds is arbitrary. If the number of devices does not divide it, some seeds are
repeated, so that every device has the same number of seeds. The results of repeated seeds are
discarded.
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
    """Create a mesh that divides `num_seeds` independent seeds as evenly as possible.

    No device has more than ceil(num_seeds / devices) seeds. A single process only uses devices that
    get a seed. Several processes use all devices, because each process has to run the program.

    Args:
      num_seeds: number of seeds, or of other independent items such as pairs of a seed and a
        learning rate.
      devices: devices to use, or None for all available devices.
    """
    devices = jax.devices() if devices is None else devices
    num_shards = len(devices)
    if len({device.process_index for device in devices}) == 1:
        num_shards = math.ceil(num_seeds / seeds_per_device(num_seeds, num_shards))
    device_grid = np.reshape(np.asarray(devices[:num_shards], object), (num_shards, 1, 1))
    return Mesh(device_grid, training_sharding.AXES)


def seeds_per_device(num_seeds: int, num_devices: int) -> int:
    """Return the maximum number of seeds per device if seeds are divided evenly."""
    return math.ceil(num_seeds / num_devices)


def shard_map_seeds(function: Callable[..., Tree], mesh: Mesh) -> Callable[..., Tree]:
    """Map a function of one seed over arrays [S, …] from `shard_seeds`.

    Each device maps over its own seeds, without communication.
    """
    seed_spec = PartitionSpec('seed')
    return jax.shard_map(
        jax.vmap(function), mesh=mesh, in_specs=seed_spec, out_specs=seed_spec, check_vma=False
    )


def padded_indices(num_seeds: int, mesh: Mesh) -> np.ndarray:
    """Return the seed index of each entry in a padded axis: all seeds, then repeated ones."""
    num_shards = mesh.shape['seed']
    return np.arange(num_shards * seeds_per_device(num_seeds, num_shards)) % num_seeds


def shard_seeds(tree: chex.ArrayTree, mesh: Mesh) -> Any:
    """Shard host arrays [S, …] over 'seed', padded with repeated seeds.

    Every process passes the arrays of all seeds.
    """
    sharding = training_sharding.seed_sharding(mesh)

    def shard(array: np.ndarray) -> Array:
        return training_sharding.shard_array(
            np.asarray(array)[padded_indices(len(array), mesh)], sharding
        )

    return jax.tree.map(shard, tree)


def gather_seeds(tree: chex.ArrayTree, num_seeds: int) -> Any:
    """Gather arrays sharded over 'seed' into host arrays [S, …] on every process.

    Args:
      tree: arrays on one mesh.
      num_seeds: number of seeds S, without the repeated seeds that `shard_seeds` adds.
    """
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        gather = jax.jit(_identity, out_shardings=training_sharding.replicated(mesh))
        tree = training_sharding.to_local(gather(tree))
    return jax.tree.map(lambda array: array[:num_seeds], jax.device_get(tree))


def gathered_shapes(tree: Tree, num_seeds: int) -> Tree:
    """Return the shapes of the arrays that `gather_seeds` returns."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((num_seeds, *array.shape[1:]), array.dtype), tree
    )


def _identity(tree: Tree) -> Tree:
    return tree
