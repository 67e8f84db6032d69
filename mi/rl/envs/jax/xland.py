"""XLand-MiniGrid with many goals in one world; the task selects the goal.

Source: Nikulin et al., XLand-MiniGrid (NeurIPS 2024), package `xminigrid`: tiles, actions, field of
view, goals and reward are its own, and tests/rl/envs/test_xland.py runs both side by side. What is
rewritten is the step, for speed: tiles are one number each, all actions are one expression, only
the goals in use are checked, and an episode's layout is drawn without a sort. There are no rules.
The tasks are ours; it is none of the package's benchmarks, which would be downloads.

The world: a 9 × 9 grid with walls around, nine objects (ball, square, pyramid; red, green, blue)
and the agent, at places drawn at random for every episode. The tasks, kind × color × shape:

    hold    it has just picked the object up
    near    it has just moved to a place beside the object
    up, right, down, left
            it has just moved, or put down, so that the object is above it, to its right, …

Every object is in every episode, whatever the task. 54 tasks; 24 of them are held out ('test'), so
that each kind, color and shape is in both parts, and the other 30 are the default. 'kinds' is a
small suite that is learned in minutes: the six kinds, all with the red ball.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mi.config import UserError, suggest
from mi.rl.envs.spec import Observation, Spec, Transition

SIZE = 9  # side of the grid, walls included
VIEW = 5  # side of the field of view: the agent is in the middle of its last row, facing up
STEPS = 40  # maximum length of an episode

TILES, COLORS = 13, 12  # as numbered in the package
EMPTY, FLOOR, WALL = 0 * COLORS + 0, 1 * COLORS + 7, 2 * COLORS + 6
SHAPES = {'ball': 3, 'square': 4, 'pyramid': 5}
PAINTS = {'red': 1, 'green': 2, 'blue': 3}
OBJECTS = {
    f'{paint} {shape}': tile * COLORS + color
    for (paint, color), (shape, tile) in itertools.product(PAINTS.items(), SHAPES.items())
}
KINDS = ('hold', 'near', 'up', 'right', 'down', 'left')
FORWARD, CLOCKWISE, COUNTERCLOCKWISE, PICK_UP, PUT_DOWN, TOGGLE = range(6)

# Mean return of the uniform random policy, of 36,000 episodes of each kind; the directions are one
# number by symmetry. Standard errors 0.001 to 0.002.
RANDOM = dict(zip(KINDS, (0.044, 0.127, 0.042, 0.042, 0.042, 0.042), strict=True))

_AROUND = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left, as (y, x)
_INSIDE = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)[1:-1, 1:-1].ravel()
_ROOM = np.full(SIZE * SIZE, WALL, np.uint8)
_ROOM[_INSIDE] = FLOOR


def _fields_of_view() -> np.ndarray:
    """[4 directions, view · view] offsets (y, x) from the agent to what it sees."""
    rows, columns = np.mgrid[-VIEW + 1 : 1, -(VIEW // 2) : VIEW // 2 + 1]
    ahead, aside = -rows.ravel(), columns.ravel()
    right = np.roll(_AROUND, -1, axis=0)
    return np.stack(
        [np.outer(ahead, _AROUND[d]) + np.outer(aside, right[d]) for d in range(4)]
    ).astype(np.int32)


_FIELDS = _fields_of_view()


class Goal(NamedTuple):
    """A task: a kind of goal and its object."""

    kind: str
    paint: str
    shape: str

    @property
    def name(self) -> str:
        return f'{self.kind} {self.paint} {self.shape}'


def _held_out(kind: int, paint: int, shape: int) -> bool:
    """4 of 9 objects for each kind: two diagonals of the colors × shapes, less one of 6."""
    diagonal = (paint + shape + kind) % 3
    return diagonal == 0 or (diagonal == 1 and paint == kind % 3)


ALL = tuple(Goal(*words) for words in itertools.product(KINDS, PAINTS, SHAPES))
TEST = tuple(
    Goal(*(words for _, words in numbered))
    for numbered in itertools.product(enumerate(KINDS), enumerate(PAINTS), enumerate(SHAPES))
    if _held_out(*(number for number, _ in numbered))
)
TRAIN = tuple(goal for goal in ALL if goal not in TEST)
KINDS_ALONE = tuple(Goal(kind, 'red', 'ball') for kind in KINDS)
SUITES = {'train': TRAIN, 'test': TEST, 'all': ALL, 'kinds': KINDS_ALONE}


class State(NamedTuple):
    """The state of one environment.

    Attributes:
      task: int32, index into the tasks.
      grid: uint8 [size · size], tile · 12 + color.
      y, x, direction: int32; 0 is up, 1 right, 2 down, 3 left.
      pocket: uint8, what is carried, as in `grid`; 0 for nothing.
      time: int32, steps of the episode.
    """

    task: Array
    grid: Array
    y: Array
    x: Array
    direction: Array
    pocket: Array
    time: Array


class XLand:
    """A `JaxEnvironment`: a new random layout for every episode, and one of the tasks.

    Observation: 'grid' [5, 5, 2] the tiles and colors in the field of view, nothing hidden by
    walls; 'features' [5] the direction, one-hot, and whether something is carried; 'task';
    'instruction' [3] the goal as the tokens of kind, color and shape.

    Reward 1 − 0.9 t / 40 when the goal is reached after t steps, which terminates the episode;
    after 40 steps it is truncated. Actions: forward, turn clockwise, turn counterclockwise, pick
    up, put down, toggle (without effect: there is no door).

    Args:
      goals: the tasks, in the order of their indices.
    """

    def __init__(self, goals: tuple[Goal, ...]):
        self._kind = np.array([KINDS.index(goal.kind) for goal in goals], np.int32)
        self._object = np.array([OBJECTS[f'{g.paint} {g.shape}'] for g in goals], np.uint8)
        words = (*KINDS, *PAINTS, *SHAPES)
        self._tokens = np.array([[1 + words.index(word) for word in g] for g in goals], np.int32)
        self.spec = Spec(
            name='xland',
            observation={
                'grid': jax.ShapeDtypeStruct((VIEW, VIEW, 2), jnp.uint8),
                'features': jax.ShapeDtypeStruct((5,), jnp.float32),
                'task': jax.ShapeDtypeStruct((), jnp.int32),
                'instruction': jax.ShapeDtypeStruct((3,), jnp.int32),
            },
            actions=6,
            tasks=tuple(goal.name for goal in goals),
            random=tuple(RANDOM[goal.kind] for goal in goals),
            reference=(1.0,) * len(goals),
            sources=(
                'random: mean return of the uniform policy for the kind of goal, measured here '
                '(tests/rl/envs/test_xland.py); reference: 1, a bound that none reaches'
            ),
            categories=(TILES, COLORS),
            vocabulary=1 + len(words),
            words=words,
            episode=STEPS,
        )

    def reset(self, key: Array, task: Array) -> tuple[State, Observation]:
        """Place nine objects and the agent in ten different places, with one draw."""
        draws = jax.random.bits(key, (len(OBJECTS) + 2,))
        places = jnp.asarray(_INSIDE)[distinct(draws[:-1], len(_INSIDE))]
        y, x = jnp.divmod(places[-1], SIZE)
        grid = jnp.asarray(_ROOM)
        cells = jnp.arange(SIZE * SIZE)
        for place, tile in zip(places, OBJECTS.values(), strict=False):
            grid = jnp.where(cells == place, jnp.uint8(tile), grid)
        state = State(
            task.astype(jnp.int32),
            grid,
            y.astype(jnp.int32),
            x.astype(jnp.int32),
            (draws[-1] % 4).astype(jnp.int32),
            jnp.zeros((), jnp.uint8),
            jnp.zeros((), jnp.int32),
        )
        return state, self._observe(state)

    def step(self, state: State, action: Array) -> tuple[State, Transition]:
        state = act(state, action)
        kind, tile = jnp.asarray(self._kind)[state.task], jnp.asarray(self._object)[state.task]
        reached = reaches(state, action, kind, tile)
        return state, Transition(
            self._observe(state),
            reward=jnp.where(reached, 1 - 0.9 * (state.time / STEPS), 0.0),
            terminated=reached,
            truncated=state.time == STEPS,
            success=reached,
        )

    def _observe(self, state: State) -> Observation:
        direction = state.direction == jnp.arange(4)
        carrying = (state.pocket != EMPTY)[None]
        return {
            'grid': jnp.stack(jnp.divmod(field_of_view(state), jnp.uint8(COLORS)), axis=-1),
            'features': jnp.concatenate([direction, carrying]).astype(jnp.float32),
            'task': state.task,
            'instruction': jnp.asarray(self._tokens)[state.task],
        }


def act(state: State, action: Array) -> State:
    """Return the state after an action: the package's `take_action`, without doors."""
    ahead = jnp.asarray(_AROUND)[state.direction]
    y, x = state.y + ahead[0], state.x + ahead[1]
    front = y * SIZE + x
    tile = state.grid[front]
    floor = tile == FLOOR
    moves = (action == FORWARD) & floor
    picks = (action == PICK_UP) & (tile != WALL) & ~floor & (state.pocket == EMPTY)
    puts = (action == PUT_DOWN) & floor & (state.pocket != EMPTY)
    left = jnp.where(picks, jnp.uint8(FLOOR), jnp.where(puts, state.pocket, tile))
    turn = (action == CLOCKWISE).astype(jnp.int32) - (action == COUNTERCLOCKWISE)
    return state._replace(
        grid=jnp.where(jnp.arange(SIZE * SIZE) == front, left, state.grid),
        y=jnp.where(moves, y, state.y),
        x=jnp.where(moves, x, state.x),
        direction=(state.direction + turn) % 4,
        pocket=jnp.where(picks, tile, jnp.where(puts, jnp.uint8(EMPTY), state.pocket)),
        time=state.time + 1,
    )


def reaches(state: State, action: Array, kind: Array, tile: Array) -> Array:
    """Return whether the action that led to `state` reached the goal (kind in `KINDS`, a tile).

    As in the package, a move that a wall stopped counts as a move.
    """
    around = jnp.asarray(_AROUND @ np.array([SIZE, 1]))
    beside = state.grid[state.y * SIZE + state.x + around] == tile  # [4]
    moved = action == FORWARD
    hold = (action == PICK_UP) & (state.pocket == tile)
    near = moved & beside.any()
    towards = (moved | (action == PUT_DOWN)) & beside
    return jnp.concatenate([hold[None], near[None], towards])[kind]


def field_of_view(state: State) -> Array:
    """Return uint8 [view, view], the agent in the middle of the last row; 0 beyond the walls."""
    offsets = jnp.asarray(_FIELDS)[state.direction]
    y, x = state.y + offsets[:, 0], state.x + offsets[:, 1]
    inside = (y >= 0) & (y < SIZE) & (x >= 0) & (x < SIZE)
    tiles = state.grid[jnp.clip(y * SIZE + x, 0, SIZE * SIZE - 1)]
    return jnp.where(inside, tiles, jnp.uint8(EMPTY)).reshape(VIEW, VIEW)


def distinct(draws: Array, n: int) -> Array:
    """Return k different numbers below n from k random uint32, every sequence equally likely.

    The i-th is a number below n − i, which is the rank among those that are left.
    """
    taken: list[Array] = []  # in order
    numbers = []
    for i in range(draws.shape[0]):
        number = (draws[i] % (n - i)).astype(jnp.int32)
        for smaller_number in taken:
            number = number + (number >= smaller_number)
        numbers.append(number)
        for j, smaller_number in enumerate(taken):
            taken[j], number = (
                jnp.minimum(smaller_number, number),
                jnp.maximum(smaller_number, number),
            )
        taken.append(number)
    return jnp.stack(numbers)


def make(suite: str) -> XLand:
    """Make an environment: 'train' (the 30 tasks, also ''), 'test', 'all', 'kinds', or one task.

    'kinds' has the six kinds with one object; a single task is named as 'hold red ball'.

    Raises:
      UserError: if the suite or task is unknown.
    """
    if suite in SUITES or not suite:
        return XLand(SUITES[suite or 'train'])
    goals = tuple(goal for goal in ALL if goal.name == suite.replace('_', ' '))
    if not goals:
        known = [*SUITES, *(goal.name for goal in ALL)]
        raise UserError(f"config.env.name = 'xland/{suite}' is unknown; {suggest(suite, known)}")
    return XLand(goals)
