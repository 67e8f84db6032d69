"""Catch, a game with one task: catch a falling ball with a paddle.

This is the game of bsuite (Osband et al., 2020), after Mnih et al. (2014), on a board of 10 × 5.
The ball starts in a random column of the top row, and the paddle in the middle of the bottom row.
The actions are left, stay and right. After 9 steps the ball reaches the bottom row, and the episode
ends with reward 1 if the paddle catches it, otherwise −1. The game is solved if every return is 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.config import UserError
from mi.rl.envs.spec import Observation, Spec, Transition

ROWS, COLUMNS = 10, 5


class State(NamedTuple):
    """Positions of the ball and the paddle, int32."""

    row: Array
    column: Array
    paddle: Array


class Catch:
    """The game of Catch as a `JaxEnvironment`. See the module docstring."""

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

    def reset(self, key: Array, task: Array) -> tuple[State, Observation]:
        del task
        first_row = jnp.zeros((), jnp.int32)
        state = State(first_row, jax.random.randint(key, (), 0, COLUMNS), first_row + COLUMNS // 2)
        return state, self._observe(state)

    def step(self, state: State, action: Array) -> tuple[State, Transition]:
        paddle = jnp.clip(state.paddle + action - 1, 0, COLUMNS - 1)
        state = State(state.row + 1, state.column, paddle)
        landed = state.row == ROWS - 1
        caught = landed & (state.paddle == state.column)
        reward = jnp.where(landed, jnp.where(caught, 1.0, -1.0), 0.0)
        return state, Transition(self._observe(state), reward, terminated=landed, success=caught)

    def _observe(self, state: State) -> Observation:
        grid = jnp.zeros((ROWS, COLUMNS, 1), jnp.int32)
        grid = grid.at[state.row, state.column, 0].set(1).at[ROWS - 1, state.paddle, 0].set(1)
        return {'grid': grid, 'task': jnp.zeros((), jnp.int32)}


def make(suite: str) -> Catch:
    """Return the environment, or raise UserError if `suite` is not empty."""
    if suite:
        raise UserError(f"catch/{suite}: expected no suite, because catch has none. Try 'catch'")
    return Catch()
