"""Automatic resets, which turn a `JaxEnvironment` into a stream of episodes.

The functions apply to one environment; vmap them over a batch. When an episode terminates, the same
step begins the next one. When it is truncated, the next one begins a step later, so that the
learner sees the last observation (see `mi.rl.envs.spec`).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from mi.config import UserError
from mi.rl.envs.spec import JaxEnvironment, Spec, Step


class StreamState(NamedTuple):
    """The state of an environment and the random key of its next episodes.

    Attributes:
      env_state: state of the environment.
      key: random key, which together with `episode` determines the next episode.
      episode: int32, index of the current episode.
      length: int32, steps of the current episode so far, or 0 if it has ended.
      is_last: bool, whether the last step truncated it, so that the next step restarts.
    """

    env_state: chex.ArrayTree
    key: Array
    episode: Array
    length: Array
    is_last: Array


def reset(
    environment: JaxEnvironment, rng_key: Array, task_index: Array
) -> tuple[StreamState, Step]:
    """Begin a stream with an episode of the given task. Later episodes draw tasks uniformly."""
    reset_key, rng_key = jax.random.split(rng_key)
    env_state, observation = environment.reset(reset_key, task_index)
    zero_steps, no_flag = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    env_state, observation = jax.tree.map(_without_weak_type, (env_state, dict(observation)))
    step = Step(observation, jnp.zeros(()), jnp.ones(()), ~no_flag, no_flag, no_flag)
    return StreamState(env_state, rng_key, zero_steps, zero_steps, no_flag), step


def step(
    environment: JaxEnvironment, state: StreamState, action: Array
) -> tuple[StreamState, Step]:
    """Step the stream. After a truncation, ignore the action and begin the next episode."""
    env_state, transition = environment.step(state.env_state, action)
    terminated = transition.terminated & ~state.is_last
    truncated = transition.truncated & ~(terminated | state.is_last)
    restarts = terminated | state.is_last

    # The first state of the next episode, which is used if the stream restarts.
    episode = state.episode + restarts
    reset_key, task_key = jax.random.split(jax.random.fold_in(state.key, state.episode))
    num_tasks = len(environment.spec.tasks)
    task_index = (jax.random.bits(task_key) % num_tasks).astype(jnp.int32)
    first_state, first_observation = environment.reset(reset_key, task_index)
    env_state, observation = jax.tree.map(
        lambda new, old: _without_weak_type(jnp.where(restarts, new, old)),
        (first_state, dict(first_observation)),
        (env_state, dict(transition.observation)),
    )
    length = jnp.where(restarts | truncated, 0, state.length + 1)
    return StreamState(env_state, state.key, episode, length, truncated), Step(
        observation,
        reward=jnp.where(state.is_last, 0, transition.reward).astype(jnp.float32),
        discount=(~terminated).astype(jnp.float32),
        is_first=restarts,
        is_last=truncated,
        success=transition.success & (terminated | truncated),
    )


def _without_weak_type(array: Array) -> Array:
    """Return the array without a weak type, so that the state of a loop keeps its type."""
    array = jnp.asarray(array)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return array if is_key else array.astype(array.dtype)


def check_length(spec: Spec, unfinished: int) -> None:
    """Check that an episode is not longer than the spec allows.

    Args:
      spec: spec of the environment.
      unfinished: length of an episode that has not ended.

    Raises:
      UserError: if the episode should have ended by now.
    """
    if unfinished >= spec.episode:
        raise UserError(
            f'Spec.episode = {spec.episode} of environment {spec.name!r}: expected the maximum '
            f'length of an episode (got a longer one). Raise it, or return truncated=True after '
            f'{spec.episode} steps'
        )
