"""Catch: a ball falls, a paddle below catches it or not. One task, solved when every return is 1.

The game of bsuite (Osband et al., 2020), after Mnih et al. (2014): a board of 10 × 5, the ball
starts in a column of the top row drawn at random, the paddle in the middle of the bottom row;
actions left, stay, right; reward 1 or −1 when the ball reaches the bottom row, which ends the
episode after 9 steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.config import UserError
from mi.rl.envs.spec import Spec, Step

ROWS, COLUMNS = 10, 5


class State(NamedTuple):
    """Where ball and paddle are, and the random key of the episodes to come."""

    key: Array
    row: Array
    column: Array
    paddle: Array


class Catch:
    """A `JaxEnvironment`."""

    spec = Spec(
        name='catch',
        observation={
            'grid': jax.ShapeDtypeStruct((ROWS, COLUMNS, 1), jnp.int32),
            'task': jax.ShapeDtypeStruct((), jnp.int32),
        },
        actions=3,
        tasks=('catch',),
        reference=(1.0,),
        sources='the best possible return is 1',
        categories=(2,),
        episode=ROWS - 1,
    )

    def reset(self, key: Array, task: Array) -> tuple[State, Step]:
        state = self._start(key)
        no = jnp.zeros((), bool)
        return state, self._step(state, jnp.zeros(()), jnp.ones(()), ~no, no)

    def step(self, state: State, action: Array) -> tuple[State, Step]:
        moved = State(
            state.key,
            state.row + 1,
            state.column,
            jnp.clip(state.paddle + action - 1, 0, COLUMNS - 1),
        )
        ended = moved.row == ROWS - 1
        caught = ended & (moved.paddle == moved.column)
        reward = jnp.where(ended, jnp.where(caught, 1.0, -1.0), 0.0)
        new = jax.tree.map(lambda a, b: jnp.where(ended, a, b), self._start(state.key), moved)
        return new, self._step(new, reward, jnp.where(ended, 0.0, 1.0), ended, caught)

    def _start(self, key: Array) -> State:
        key, of_column = jax.random.split(key)
        column = jax.random.randint(of_column, (), 0, COLUMNS)
        zero = jnp.zeros((), jnp.int32)
        return State(key, zero, column, zero + COLUMNS // 2)

    def _step(
        self, state: State, reward: Array, discount: Array, first: Array, caught: Array
    ) -> Step:
        grid = jnp.zeros((ROWS, COLUMNS, 1), jnp.int32)
        grid = grid.at[state.row, state.column, 0].set(1).at[ROWS - 1, state.paddle, 0].set(1)
        observation = {'grid': grid, 'task': jnp.zeros((), jnp.int32)}
        never = jnp.zeros((), bool)
        return Step(observation, reward, discount, first, never, caught)


def make(suite: str) -> Catch:
    if suite:
        raise UserError(f"config.env.name = 'catch/{suite}': catch has no suites; give 'catch'")
    return Catch()
