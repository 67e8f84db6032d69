"""The entry point of training: it validates a config and runs the loop of its topology.

Agent, loss and update (`mi.rl.learner`) are the same; the topologies differ in what feeds them:

    fused     the environment is in JAX: acting and learning are one program   mi.rl.fused
    threads   environments on the host, in threads with batched inference       mi.rl.actors.loop
    ray       the same workers in Ray processes, on any host                    mi.rl.actors.loop
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
    """Train and evaluate in a run directory, or resume the run that it holds.

    Args:
      config: config of the run.
      workdir: the run directory.
      profile: first and last update to profile; None for none.

    Raises:
      UserError: if the config or the directory cannot work, or the loss is not finite.
    """
    rl_config.validate(config)
    with factory.name_environment_keys():
        if config.train.topology == 'fused':
            fused.train(config, workdir, profile)
        else:
            actors_loop.train(config, workdir, profile)
