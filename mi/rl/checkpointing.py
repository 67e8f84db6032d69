"""Steps of the training loop that all topologies share: resume a run, save it, and stop it."""

from typing import Any, NamedTuple

import ml_collections

from mi.rl import learner
from mi.rl.config import count_updates
from mi.training import checkpoint, logger, run_dir


class Resumed(NamedTuple):
    """Where a run continues.

    Attributes:
      state: state from the newest checkpoint; None for a new run.
      meta: meta that was saved with it.
      records_end: offset at which metrics.jsonl continues, bytes; None if the evaluation of this
        step is missing, because the run ended between the checkpoint and the evaluation.
    """

    state: Any
    meta: dict[str, Any]
    records_end: int | None


class Snapshot(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      state: the arrays to save.
      learner: the learner's part of the arrays, which must be finite.
      env_steps: environment steps so far, of each seed or of the only one.
    """

    state: Any
    learner: learner.LearnerState
    env_steps: list[int] | int


def resume(
    run: run_dir.Run, checkpoints: checkpoint.Checkpoints, like: Any, num_splits: int
) -> Resumed:
    """Restore the newest checkpoint if there is one, and set `run.step`.

    Args:
      run: the open run.
      checkpoints: checkpoints of the run.
      like: a state with the structure and the shardings to restore.
      num_splits: number of environments that are evaluated.
    """
    state, meta = checkpoints.restore(like) or (None, {'step': 0, 'metrics': 0})
    run.step = meta['step']
    num_records = 0
    if meta.get('is_evaluated') is False:
        policies = 1 + run.config.eval.greedy
        num_records = num_splits * policies * len(run.config.seeds)
    records_end = logger.find_records_end(run.path, meta['metrics'], run.step, num_records)
    return Resumed(state, meta, records_end)


def is_evaluation_due(config: ml_collections.ConfigDict, step: int) -> bool:
    """Return whether to evaluate after this many updates."""
    return step % config.train.eval_every == 0 or step == count_updates(config)


def save_or_stop(
    run: run_dir.Run,
    checkpoints: checkpoint.Checkpoints,
    log: logger.RunLogger,
    snapshot: Snapshot,
    will_evaluate: bool,
    is_stopping: bool,
) -> None:
    """Save a checkpoint, and end the run if it is asked to stop.

    The checkpoint comes before the evaluation, which may take long and be interrupted. A run that
    is complete is not stopped.

    Raises:
      UserError: if the learner's state is not finite.
    """
    logger.refuse_broken_state(run.config.seeds, run.step, learner.name_parts(snapshot.learner))
    meta = {'metrics': log.position(), 'env_steps': snapshot.env_steps}
    checkpoints.save(run.step, snapshot.state, meta | {'is_evaluated': not will_evaluate})
    is_complete = run.step == count_updates(run.config)
    if is_stopping and (will_evaluate or not is_complete):
        run.exit_preempted()
