"""Training an agent: config → environment → agent → loop → run directory.

One agent, one loss and one update (`mi.rl.learner`), and three ways to feed it:

    fused     the environment is JAX: acting and learning are one program       mi.rl.fused
    threads   environments on the host, threads with batched inference          mi.rl.actors.loop
    ray       the same workers in processes of Ray, on any host                 mi.rl.actors.loop
"""

import ml_collections

from mi.rl import config as rl_config
from mi.rl.actors import loop as actors_loop
from mi.rl.fused import loop as fused
from mi.training import run_dir


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one.

    Args:
      profile: first and last of the updates that are recorded, as in `run.start`.

    Raises:
      UserError: for a config or directory that cannot work, and for a loss that is not finite.
    """
    rl_config.validate(config)
    if config.train.topology == 'fused':
        fused.train(config, workdir, profile)
    else:
        actors_loop.train(config, workdir, profile)
