"""Trajectories and episode statistics, which actors send to the learner.

    row t of inputs     what the agent sees before action t; row T is only for bootstrapping
    action[t]           action t, with log_prob[t] under the policy that acted
    inputs.reward[t+1], discount[t]
                        reward and discount of action t
    carry               state of the agent before row 0

The reward of action t is in row t + 1 of the inputs, where the agent also sees it. The last
observation of a truncated episode has its own row. The action in this row is ignored and marked as
not valid, and the next row is the first of a new episode (`mi.rl.envs.spec`).
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from mi.rl.agent import Carry, Inputs


class Trajectory(NamedTuple):
    """T transitions of B environments.

    Attributes:
      inputs: inputs of the agent, [T + 1, B, …].
      action: actions, int32 [T, B].
      log_prob: log-probabilities of the actions, float32 [T, B].
      discount: float32 [T, B], 0 where the action terminated the episode, 1 elsewhere.
      valid: bool [T, B], False where the action was ignored because the episode had ended.
      carry: carry of the agent before row 0.
    """

    inputs: Inputs
    action: Array
    log_prob: Array
    discount: Array
    valid: Array
    carry: Carry


class Episodes(NamedTuple):
    """The number of episodes that ended in each task, and sums over them, float32 [tasks]."""

    number: chex.Array
    returns: chex.Array
    lengths: chex.Array
    successes: chex.Array


def compute_log_prob(logits: Array, action: Array) -> Array:
    """Return log π(a) [...] for logits [..., A] and actions [...]."""
    log_pi = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_pi, action[..., None], axis=-1)[..., 0]


def sum_episodes(
    is_over: Array,
    task: Array,
    episode_return: Array,
    length: Array,
    success: Array,
    num_tasks: int,
) -> Episodes:
    """Sum the episodes that ended in a step for each task. All arguments but the last are [B]."""
    sum_by_task = functools.partial(jax.ops.segment_sum, segment_ids=task, num_segments=num_tasks)
    weight = is_over.astype(jnp.float32)
    return Episodes(
        sum_by_task(weight),
        sum_by_task(weight * episode_return),
        sum_by_task(weight * length),
        sum_by_task(weight * success),
    )
