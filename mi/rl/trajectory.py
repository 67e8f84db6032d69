"""What actors send to a learner: trajectories and the episodes that ended."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.rl.agent import (
    Carry,
    Inputs,
)
from mi.rl.envs.spec import Step


class Trajectory(NamedTuple):
    """T transitions of B environments.

    Attributes:
      inputs: [T + 1, B, …].
      action: int32 [T, B].
      log_prob: float32 [T, B].
      discount: float32 [T, B], 0 where the action terminated the episode, 1 elsewhere.
      valid: bool [T, B], false where the action was ignored, as the episode had ended before.
      carry: of the agent, before row 0.
    """

    inputs: Inputs
    action: Array
    log_prob: Array
    discount: Array
    valid: Array
    carry: Carry


class Episodes(NamedTuple):
    """How many episodes ended, and sums over them, by task, [tasks] float32."""

    number: Array
    returns: Array
    lengths: Array
    successes: Array


def log_probability(logits: Array, action: Array) -> Array:
    """log π(a): logits [..., A], actions [...] → [...]."""
    log_pi = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_pi, action[..., None], axis=-1)[..., 0]


def finished(
    ended: Array, task: Array, returned: Array, length: Array, step: Step, tasks: int
) -> Episodes:
    """What ended in this step, summed by task: all arguments but the last are [B]."""
    of_task = functools.partial(jax.ops.segment_sum, segment_ids=task, num_segments=tasks)
    weight = ended.astype(jnp.float32)
    return Episodes(
        of_task(weight),
        of_task(weight * returned),
        of_task(weight * length),
        of_task(weight * step.success),
    )
