"""Training an agent: config → environment → agent → loop → run directory.

One agent, one loss and one update (`mi.rl.learner`), and three ways to feed it:

    fused     the environment is JAX: acting and learning are one program       mi.rl.fused
    threads   environments on the host, threads with batched inference          mi.rl.queued
    ray       the same workers in processes of Ray, on any host                 mi.rl.queued
"""

import ml_collections

from mi import run
from mi.rl import fused, queued, setup


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one.

    Args:
      profile: first and last of the updates that are recorded, as in `run.start`.

    Raises:
      UserError: for a config or directory that cannot work, and for a loss that is not finite.
    """
    setup.validate(config)
    if config.train.topology == 'fused':
        fused.train(config, workdir, profile)
    else:
        queued.train(config, workdir, profile)
