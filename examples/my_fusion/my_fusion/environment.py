"""An environment in which the task decides what an observation means.

Each of eight steps shows a number x in [−1, 1]. Action 1 is right if s x > 0, otherwise action 0
is. The sign s is −1 in the task 'flipped' and 1 in 'plain'. The best policy therefore depends on
the product of x and the task. A policy that ignores the task is right half of the time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.config import UserError
from mi.rl.envs.spec import Observation, Spec, Transition

LENGTH = 8
TASKS = ('plain', 'flipped')


class State(NamedTuple):
    """The state of an episode: random key, number x, task, steps and right answers so far."""

    key: Array
    x: Array
    task: Array
    time: Array
    num_right: Array


class Signs:
    """The environment, a `mi.rl.envs.spec.JaxEnvironment`."""

    spec = Spec(
        name='signs',
        observation={
            'features': jax.ShapeDtypeStruct((1,), jnp.float32),
            'task': jax.ShapeDtypeStruct((), jnp.int32),
        },
        actions=2,
        tasks=TASKS,
        random=(LENGTH / 2, LENGTH / 2),
        reference=(LENGTH, LENGTH),
        sources='computed from the rules',
        episode=LENGTH,
    )

    def reset(self, key: Array, task: Array) -> tuple[State, Observation]:
        """Begin an episode of a task."""
        zero = jnp.zeros((), jnp.int32)
        return self._draw(State(key, jnp.zeros(()), task, zero, zero))

    def step(self, state: State, action: Array) -> tuple[State, Transition]:
        """Return the reward of an action and the next number."""
        sign = jnp.where(state.task == 1, -1.0, 1.0)
        is_right = (action == 1) == (sign * state.x > 0)
        time, num_right = state.time + 1, state.num_right + is_right
        state, observation = self._draw(state._replace(time=time, num_right=num_right))
        return state, Transition(
            observation,
            reward=is_right.astype(jnp.float32),
            terminated=time == LENGTH,
            success=num_right == LENGTH,
        )

    def _draw(self, state: State) -> tuple[State, Observation]:
        """Draw the next number."""
        key, draw_key = jax.random.split(state.key)
        x = jax.random.uniform(draw_key, (), minval=-1.0, maxval=1.0)
        return state._replace(key=key, x=x), {'features': x[None], 'task': state.task}


def make(suite: str) -> Signs:
    """Return the environment; the only suite is 'two', the default."""
    if suite not in ('', 'two'):
        raise UserError(f"config.env.name = 'my_fusion.environment:make/{suite}': expected 'two'")
    return Signs()
