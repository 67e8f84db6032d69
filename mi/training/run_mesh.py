"""The device mesh that the config of a run describes."""

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
    """Create the mesh on which a language model or an agent trains.

    Args:
      config: config of the run.
      devices: devices to use, or None for all available devices.

    Raises:
      UserError: if the devices cannot divide the work.
    """
    train = config.train
    with name_config_keys(KEYS):
        return sharding.make_mesh(
            count_mesh_seeds(config), train.batch, _get_fsdp(config), train.mesh, devices
        )


def choose_run_mesh_shape(config: ml_collections.ConfigDict, num_devices: int) -> tuple[int, ...]:
    """Return the mesh shape of `make_run_mesh` for a hypothetical number of devices.

    Raises:
      UserError: if the devices cannot divide the work.
    """
    train = config.train
    with name_config_keys(KEYS):
        return sharding.choose_mesh_shape(
            count_mesh_seeds(config), train.batch, _get_fsdp(config), train.mesh, num_devices
        )


def count_mesh_seeds(config: ml_collections.ConfigDict) -> int:
    """Return the number of seeds per program, or 1 for agents with external actors."""
    has_seeds = config.task == 'lm' or config.train.topology == 'fused'
    return len(config.seeds) if has_seeds else 1


def _get_fsdp(config: ml_collections.ConfigDict) -> int:
    """Return the number of devices that share one copy of the parameters, or 1 for small agents."""
    return config.train.fsdp if config.task == 'lm' else 1
