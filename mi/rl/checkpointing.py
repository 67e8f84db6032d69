"""Parts of the training loop that all topologies share: costs, resuming, saving and stopping."""

from typing import Generic, NamedTuple

import chex
import ml_collections

from mi.rl import factory, learner
from mi.rl.agent import Agent
from mi.rl.config import count_updates
from mi.training import checkpoint, logger, run_dir
from mi.training.sharding import Tree


class Resumed(NamedTuple, Generic[Tree]):
    """The point from which a run continues.

    Attributes:
      state: state from the newest checkpoint, or None for a new run.
      meta: metadata of the checkpoint.
      records_end: byte offset at which metrics.jsonl continues. None if the evaluation of this step
        is missing because the run ended between the checkpoint and the evaluation.
    """

    state: Tree | None
    meta: checkpoint.Meta
    records_end: int | None


class Snapshot(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      state: the arrays to save.
      learner: the learner's part of the arrays, which must be finite.
      env_steps: environment steps so far, or a list if there can be several seeds.
    """

    state: chex.ArrayTree
    learner: learner.LearnerState
    env_steps: list[int] | int


def write_costs(run: run_dir.Run, agent: Agent) -> int:
    """Write the number of updates and the agent's parameters and FLOPs to cost.json.

    Returns:
      The FLOPs of a forward pass per environment step.
    """
    num_updates, training = count_updates(run.config), run.config.train
    costs = factory.compute_costs(agent, training.batch, training.length)
    run.write('cost.json', {'steps': num_updates, **costs})
    return costs['flops_per_step']['model']


def resume(
    run: run_dir.Run, checkpoints: checkpoint.Checkpoints, like: Tree, num_splits: int
) -> Resumed[Tree]:
    """Restore the newest checkpoint if there is one, and set `run.step`.

    Args:
      run: the open run.
      checkpoints: checkpoints of the run.
      like: a state with the same structure and shardings as the one to restore.
      num_splits: number of environments in which the agent is evaluated.
    """
    state, meta = checkpoints.restore(like) or (None, {'step': 0, 'metrics': 0})
    run.step = meta['step']

    # A checkpoint is saved before its evaluation, so records of the evaluation may be missing.
    num_records = 0
    if meta.get('is_evaluated') is False:
        num_policies = 1 + run.config.eval.greedy
        num_records = num_splits * num_policies * len(run.config.seeds)
    records_end = logger.find_records_end(run.path, meta['metrics'], run.step, num_records)
    return Resumed(state, meta, records_end)


def is_evaluation_due(config: ml_collections.ConfigDict, step: int) -> bool:
    """Return whether to evaluate after `step` updates."""
    return step % config.train.eval_every == 0 or step == count_updates(config)


def save_or_stop(
    run: run_dir.Run,
    checkpoints: checkpoint.Checkpoints,
    log: logger.RunLogger,
    snapshot: Snapshot,
    will_evaluate: bool,
    is_stopping: bool,
) -> None:
    """Save a checkpoint, and end the run if a stop is requested.

    The checkpoint precedes the evaluation, which may take long and be interrupted.

    Raises:
      UserError: if the learner's state is not finite.
    """
    logger.refuse_broken_state(run.config.seeds, run.step, learner.name_parts(snapshot.learner))
    meta = {'metrics': log.position(), 'env_steps': snapshot.env_steps}
    checkpoints.save(run.step, snapshot.state, meta | {'is_evaluated': not will_evaluate})
    if is_stopping:
        run.exit_preempted()
