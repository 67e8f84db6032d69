"""A `JaxEnvironment` whose values are known, and an agent that knows them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mi.rl.agent import Outputs
from mi.rl.envs.spec import Spec, Transition

GAMMA = 0.9
LIMIT = 7
TASKS = ('one', 'two', 'three')
RETURN = LIMIT * (LIMIT + 1) / 2  # of an episode of the first task


class State(NamedTuple):
    time: Any
    task: Any


class Ramp:
    """Step t = 1, 2, … is worth t, 2 t or 3 t, by task; the time is not shown.

    Args:
      terminates: whether the seventh step terminates the episode; else it truncates it.
      episode: of the spec.
    """

    def __init__(self, terminates=False, episode=LIMIT):
        self._terminates = terminates
        self.spec = Spec(
            name='ramp',
            observation={
                'features': jax.ShapeDtypeStruct((1,), jnp.float32),
                'task': jax.ShapeDtypeStruct((), jnp.int32),
            },
            actions=4,
            tasks=TASKS,
            episode=episode,
        )

    def reset(self, key, task):
        return State(0, task), self._observe(task)

    def step(self, state, action):
        state = State(state.time + 1, state.task)
        over = state.time == LIMIT
        return state, Transition(
            self._observe(state.task),
            reward=state.time * (state.task + 1),
            terminated=over & self._terminates,
            truncated=over & (not self._terminates),
            success=state.task == 1,
        )

    def _observe(self, task):
        return {'features': jnp.ones(1), 'task': task}


class Knows:
    """The exact values of `Ramp`, for which it counts the steps of the episode; acts at random.

    Args:
      terminates: as the environment's.
      statistics: of PopArt, in whose units the values are; None for those of the rewards.
    """

    def __init__(self, terminates=False, statistics=None):
        self.spec = Ramp(terminates).spec
        times = np.arange(LIMIT + 1)
        if terminates:
            ahead = times[None] > times[:, None]
            powers = GAMMA ** (times[None] - times[:, None] - 1.0)
            self._values = np.where(ahead, powers * times[None], 0).sum(1)
        else:  # Σ γ^(j − 1) (t + j), j = 1, 2, …
            self._values = times / (1 - GAMMA) + 1 / (1 - GAMMA) ** 2
        self._statistics = statistics

    def initial_carry(self, batch):
        return {'time': jnp.zeros(batch, jnp.int32)}

    def apply(self, variables, carry, inputs):
        def count(time, is_first):
            time = jnp.where(is_first, 0, time)
            return time + 1, time

        end, times = jax.lax.scan(count, carry['time'], inputs.is_first)
        task = inputs.observation['task']
        value = jnp.asarray(self._values, jnp.float32)[times] * (task + 1)
        if self._statistics is not None:
            mu, variance = self._statistics.mu, self._statistics.variance
            value = (value - mu[task]) / jnp.sqrt(variance)[task]
        logits = jnp.zeros((*task.shape, self.spec.actions)) + variables['params']['logits']
        return {'time': end}, Outputs(logits, value)


PARAMS = {'logits': np.zeros(()), 'gain': np.ones(3), 'shift': np.zeros(3)}
