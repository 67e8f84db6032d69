"""The device mesh of a run, from its config."""

from collections.abc import Sequence

import jax
import ml_collections

from mi.config import name_config_keys
from mi.training import sharding

KEYS = {
    'batch_size': 'config.train.batch',
    'fsdp': 'config.train.fsdp',
    'shape': 'config.train.mesh',
}
"""Argument of `sharding.make_mesh` → its config key."""


def make_run_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Return the mesh on which a language model or an agent trains, by default on all devices.

    Raises:
      UserError: if the devices cannot divide the work.
    """
    train = config.train
    with name_config_keys(KEYS):
        return sharding.make_mesh(
            count_mesh_seeds(config), train.batch, _get_fsdp(config), train.mesh, devices
        )


def choose_run_mesh_shape(config: ml_collections.ConfigDict, num_devices: int) -> tuple[int, ...]:
    """Return the shape of `make_run_mesh` for a number of devices, present or not.

    Raises:
      UserError: if the devices cannot divide the work.
    """
    train = config.train
    with name_config_keys(KEYS):
        return sharding.choose_mesh_shape(
            count_mesh_seeds(config), train.batch, _get_fsdp(config), train.mesh, num_devices
        )


def count_mesh_seeds(config: ml_collections.ConfigDict) -> int:
    """Return the number of seeds in a program; one if actors outside of it act."""
    has_seeds = config.task == 'lm' or config.train.topology == 'fused'
    return len(config.seeds) if has_seeds else 1


def _get_fsdp(config: ml_collections.ConfigDict) -> int:
    """Return how many devices share one copy of the parameters; agents are too small for it."""
    return config.train.fsdp if config.task == 'lm' else 1
