"""The entry point of training, which validates a config and runs the loop of its topology.

Agent, loss and update (`mi.rl.learner`) are the same in all topologies. The actors differ:

    fused     JAX environments; acting and learning are one program           mi.rl.fused
    threads   environments on the host, in threads with batched inference     mi.rl.actors.loop
    ray       the same workers in Ray processes, on any host                  mi.rl.actors.loop
"""

import ml_collections

from mi.rl import config as rl_config
from mi.rl import factory
from mi.rl.actors import loop as actors_loop
from mi.rl.fused import loop as fused
from mi.training import run_dir


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Train and evaluate an agent in a run directory, or resume the run stored there.

    Args:
      config: config of the run.
      workdir: the run directory.
      profile: first and last update to profile, or None for no profile.

    Raises:
      UserError: if the config is invalid, the directory cannot be used, or the loss is not finite.
    """
    rl_config.validate(config)
    with factory.name_environment_keys():
        if config.train.topology == 'fused':
            fused.train(config, workdir, profile)
        else:
            actors_loop.train(config, workdir, profile)
