"""Actuator inversion: an agent walks to a goal, and the task decides what its actions do.

The room has 5 × 5 cells. Agent and goal start in two different cells, drawn at random for every
episode. Each of the four actions moves the agent by one cell, unless a wall is in the way. The task
is a permutation p of the directions 0 up, 1 right, 2 down and 3 left: action a moves the agent in
direction p[a]. The observation contains the cells and the index of the task, but not p. The best
action in the same cells therefore depends on the task:

    optimal action = p⁻¹[direction towards the goal]

The suites:

    symmetries    the 8 symmetries of the square, the default: p[a] = r + a or r − a (mod 4), with
                  r = 0 … 3; opposite actions stay opposite
    inversions    4 of the symmetries, which invert neither axis, one, or both
    permutations  all 24

Source: the name and the idea come from the Actuator Inversion Benchmark (Benad et al., 2026, arXiv
2602.06550), in which a binary context inverts the actuators of continuous control tasks. Room,
tasks and sizes are ours. Unlike there, the context is observed.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi.config import UserError, suggest
from mi.rl.envs.spec import Observation, Spec, Transition

SIZE = 5  # side of the room
STEPS = 2 * (SIZE - 1)  # maximum length of an episode: the largest distance of two cells
DIRECTIONS = {'up': (-1, 0), 'right': (0, 1), 'down': (1, 0), 'left': (0, -1)}  # as (y, x)
EMPTY, AGENT, GOAL = range(3)  # categories of a cell

# Mean return of the uniform random policy, the same for every task: exact, to six digits.
RANDOM = 0.177497

_MOVES = np.array(list(DIRECTIONS.values()), np.int32)
_ACTIONS = np.arange(len(DIRECTIONS))

Permutation = tuple[int, ...]  # action → direction
ROTATIONS = tuple(tuple(((r + _ACTIONS) % 4).tolist()) for r in range(4))
REFLECTIONS = tuple(tuple(((r - _ACTIONS) % 4).tolist()) for r in range(4))
SUITES: dict[str, tuple[Permutation, ...]] = {
    'symmetries': (*ROTATIONS, *REFLECTIONS),
    'inversions': (ROTATIONS[0], REFLECTIONS[2], REFLECTIONS[0], ROTATIONS[2]),
    'permutations': tuple(itertools.permutations(range(4))),
}


class State(NamedTuple):
    """The state of one environment.

    Attributes:
      task: int32, index into the tasks.
      position, goal: int32 [2], the cells of agent and goal as (y, x).
      time: int32, number of steps so far.
    """

    task: Array
    position: Array
    goal: Array
    time: Array


class ActuatorInversion:
    """A `JaxEnvironment` that draws a start and a goal for each episode.

    Observations: 'grid' [5, 5, 1], which is 1 at the agent, 2 at the goal and 0 elsewhere, and
    'task'.

    Reaching the goal gives reward 1 and terminates the episode. Otherwise it is truncated after 8
    steps. A policy that knows the task can always reach the goal.

    Args:
      permutations: the tasks, in the order of their indices: action → direction.
    """

    def __init__(self, permutations: tuple[Permutation, ...]):
        self._permutations = np.array(permutations, np.int32)
        self.spec = Spec(
            name='actuator_inversion',
            observation={
                'grid': jax.ShapeDtypeStruct((SIZE, SIZE, 1), jnp.int32),
                'task': jax.ShapeDtypeStruct((), jnp.int32),
            },
            actions=len(DIRECTIONS),
            tasks=tuple(map(name_task, permutations)),
            random=(RANDOM,) * len(permutations),
            reference=(1.0,) * len(permutations),
            sources='random: the exact mean return of the uniform policy; reference: the best one',
            categories=(3,),
            episode=STEPS,
        )

    def reset(self, key: Array, task: Array) -> tuple[State, Observation]:
        """Place agent and goal in two different cells, with equal probability for every pair."""
        agent_key, goal_key = jax.random.split(key)
        num_cells = SIZE * SIZE
        agent_cell = jax.random.randint(agent_key, (), 0, num_cells, jnp.int32)
        offset = jax.random.randint(goal_key, (), 1, num_cells, jnp.int32)
        goal_cell = (agent_cell + offset) % num_cells
        state = State(
            task.astype(jnp.int32),
            jnp.stack(jnp.divmod(agent_cell, SIZE)),
            jnp.stack(jnp.divmod(goal_cell, SIZE)),
            jnp.zeros((), jnp.int32),
        )
        return state, self._observe(state)

    def step(self, state: State, action: Array) -> tuple[State, Transition]:
        direction = jnp.asarray(self._permutations)[state.task, action]
        position = jnp.clip(state.position + jnp.asarray(_MOVES)[direction], 0, SIZE - 1)
        state = state._replace(position=position, time=state.time + 1)
        reached = (position == state.goal).all()
        return state, Transition(
            self._observe(state),
            reward=reached.astype(jnp.float32),
            terminated=reached,
            truncated=state.time == STEPS,
            success=reached,
        )

    def _observe(self, state: State) -> Observation:
        cells = jnp.arange(SIZE * SIZE)
        agent_cell, goal_cell = (y * SIZE + x for y, x in (state.position, state.goal))
        grid = jnp.where(cells == agent_cell, AGENT, jnp.where(cells == goal_cell, GOAL, EMPTY))
        grid = grid.astype(jnp.int32).reshape(SIZE, SIZE, 1)
        return {'grid': grid, 'task': state.task}


def name_task(permutation: Permutation) -> str:
    """Return the name of a task: the directions of actions 0 to 3, such as 'down right up left'."""
    words = tuple(DIRECTIONS)
    return ' '.join(words[direction] for direction in permutation)


def make(suite: str) -> ActuatorInversion:
    """Make the environment of a suite, where '' is 'symmetries'.

    Raises:
      UserError: if the suite is unknown.
    """
    suite_name = suite or 'symmetries'
    if suite_name not in SUITES:
        hint = suggest(suite, SUITES)
        raise UserError(f'actuator_inversion/{suite} is unknown; {hint}')
    return ActuatorInversion(SUITES[suite_name])
