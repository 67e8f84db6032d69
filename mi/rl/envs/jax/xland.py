"""XLand-MiniGrid with many goals in one world, where the task selects the goal.

Source: Nikulin et al., XLand-MiniGrid (NeurIPS 2024), package `xminigrid`. Tiles, actions, field of
view, goals and reward are those of the package. tests/rl/envs/test_xland.py runs both side by side.
Only the step is rewritten, for speed: each tile is one number, all actions are one expression, only
the goals in use are checked, and the layout of an episode is drawn without sorting. There are no
rules. The tasks are ours and not one of the package's benchmarks, which require downloads.

The world is a 9 × 9 grid surrounded by walls. It contains nine objects (ball, square and pyramid,
in red, green and blue) and the agent, at random places in every episode. A task consists of a kind,
a color and a shape. The kinds are:

    hold    the agent has just picked up the object
    near    the agent has just moved next to the object
    up, right, down, left
            the agent has just moved or put something down, and the object is above it, to its
            right, below it, or to its left

All objects are present in every episode. Of the 54 tasks, 24 are held out ('test') such that both
parts contain each kind, color and shape. The other 30 are the default. The small suite 'kinds' has
the six kinds with the red ball, and is learned in minutes.
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

_DIRECTIONS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left, as (y, x)
_FLOOR_CELLS = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)[1:-1, 1:-1].ravel()
_EMPTY_ROOM = np.full(SIZE * SIZE, WALL, np.uint8)
_EMPTY_ROOM[_FLOOR_CELLS] = FLOOR


def _view_offsets() -> np.ndarray:
    """Return offsets (y, x) from the agent to the cells it sees, [4 directions, view · view, 2]."""
    row_offsets, column_offsets = np.mgrid[-VIEW + 1 : 1, -(VIEW // 2) : VIEW // 2 + 1]
    steps_ahead, steps_aside = -row_offsets.ravel(), column_offsets.ravel()
    right_directions = np.roll(_DIRECTIONS, -1, axis=0)
    return np.stack(
        [
            np.outer(steps_ahead, forward) + np.outer(steps_aside, right)
            for forward, right in zip(_DIRECTIONS, right_directions, strict=True)
        ]
    ).astype(np.int32)


_VIEW_OFFSETS = _view_offsets()


class Goal(NamedTuple):
    """A task, given by the kind of goal and its object."""

    kind: str
    paint: str
    shape: str

    @property
    def name(self) -> str:
        return f'{self.kind} {self.paint} {self.shape}'


def _is_held_out(kind_index: int, paint_index: int, shape_index: int) -> bool:
    """Return whether a goal is held out, which holds for 4 of the 9 objects of each kind.

    In the matrix of colors and shapes these are one diagonal and one entry of another.
    """
    diagonal = (paint_index + shape_index + kind_index) % 3
    return diagonal == 0 or (diagonal == 1 and paint_index == kind_index % 3)


ALL = tuple(Goal(*words) for words in itertools.product(KINDS, PAINTS, SHAPES))
TEST = tuple(
    Goal(*(words for _, words in numbered_words))
    for numbered_words in itertools.product(enumerate(KINDS), enumerate(PAINTS), enumerate(SHAPES))
    if _is_held_out(*(number for number, _ in numbered_words))
)
TRAIN = tuple(goal for goal in ALL if goal not in TEST)
KINDS_ALONE = tuple(Goal(kind, 'red', 'ball') for kind in KINDS)
SUITES = {'train': TRAIN, 'test': TEST, 'all': ALL, 'kinds': KINDS_ALONE}


class State(NamedTuple):
    """The state of one environment.

    Attributes:
      task: int32, index into the tasks.
      grid: uint8 [size · size], tile · 12 + color.
      y, x, direction: int32, where direction 0 is up, 1 right, 2 down and 3 left.
      pocket: uint8, the carried object, encoded as in `grid`, or 0 for none.
      time: int32, number of steps so far.
    """

    task: Array
    grid: Array
    y: Array
    x: Array
    direction: Array
    pocket: Array
    time: Array


class XLand:
    """A `JaxEnvironment` with a task and a random layout for each episode.

    Observations: 'grid' [5, 5, 2], the tiles and colors in the field of view, which walls do not
    block; 'features' [5], the one-hot direction and whether the agent carries an object; 'task';
    'instruction' [3], the goal as tokens for kind, color and shape.

    Reaching the goal after t steps gives the reward 1 − 0.9 t / 40 and terminates the episode.
    Otherwise it is truncated after 40 steps. Actions: forward, turn clockwise, turn
    counterclockwise, pick up, put down, toggle (which has no effect, because there are no doors).

    Args:
      goals: the tasks, in the order of their indices.
    """

    def __init__(self, goals: tuple[Goal, ...]):
        self._kind = np.array([KINDS.index(goal.kind) for goal in goals], np.int32)
        self._object = np.array([OBJECTS[f'{goal.paint} {goal.shape}'] for goal in goals], np.uint8)
        vocabulary = (*KINDS, *PAINTS, *SHAPES)
        self._tokens = np.array(
            [[1 + vocabulary.index(word) for word in goal] for goal in goals], np.int32
        )
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
            vocabulary=1 + len(vocabulary),
            words=vocabulary,
            episode=STEPS,
        )

    def reset(self, key: Array, task: Array) -> tuple[State, Observation]:
        """Place the nine objects and the agent at ten different places, with one draw."""
        # Ten places without repetition, and the direction of the agent.
        draws = jax.random.bits(key, (len(OBJECTS) + 2,))
        cells_drawn = jnp.asarray(_FLOOR_CELLS)[distinct(draws[:-1], len(_FLOOR_CELLS))]
        agent_y, agent_x = jnp.divmod(cells_drawn[-1], SIZE)

        # Put each object in its place by a comparison, without a scatter.
        grid = jnp.asarray(_EMPTY_ROOM)
        cell_indices = jnp.arange(SIZE * SIZE)
        for object_cell, object_tile in zip(cells_drawn, OBJECTS.values(), strict=False):
            grid = jnp.where(cell_indices == object_cell, jnp.uint8(object_tile), grid)
        state = State(
            task.astype(jnp.int32),
            grid,
            agent_y.astype(jnp.int32),
            agent_x.astype(jnp.int32),
            (draws[-1] % 4).astype(jnp.int32),
            jnp.zeros((), jnp.uint8),
            jnp.zeros((), jnp.int32),
        )
        return state, self._observe(state)

    def step(self, state: State, action: Array) -> tuple[State, Transition]:
        state = act(state, action)
        goal_kind = jnp.asarray(self._kind)[state.task]
        goal_tile = jnp.asarray(self._object)[state.task]
        reached = reaches(state, action, goal_kind, goal_tile)
        return state, Transition(
            self._observe(state),
            reward=jnp.where(reached, 1 - 0.9 * (state.time / STEPS), 0.0),
            terminated=reached,
            truncated=state.time == STEPS,
            success=reached,
        )

    def _observe(self, state: State) -> Observation:
        is_facing = state.direction == jnp.arange(4)
        is_carrying = (state.pocket != EMPTY)[None]
        return {
            'grid': jnp.stack(jnp.divmod(field_of_view(state), jnp.uint8(COLORS)), axis=-1),
            'features': jnp.concatenate([is_facing, is_carrying]).astype(jnp.float32),
            'task': state.task,
            'instruction': jnp.asarray(self._tokens)[state.task],
        }


def act(state: State, action: Array) -> State:
    """Return the state after an action, like the package's `take_action` but without doors."""
    # The cell in front of the agent.
    step_ahead = jnp.asarray(_DIRECTIONS)[state.direction]
    ahead_y, ahead_x = state.y + step_ahead[0], state.x + step_ahead[1]
    front_cell = ahead_y * SIZE + ahead_x
    front_tile = state.grid[front_cell]
    is_floor = front_tile == FLOOR

    # Which action has an effect: at most one of these is true.
    is_moving = (action == FORWARD) & is_floor
    is_object = ~is_floor & (front_tile != WALL)
    picks_up = (action == PICK_UP) & is_object & (state.pocket == EMPTY)
    puts_down = (action == PUT_DOWN) & is_floor & (state.pocket != EMPTY)

    # Tile and pocket afterwards.
    placed_tile = jnp.where(puts_down, state.pocket, front_tile)
    new_front_tile = jnp.where(picks_up, jnp.uint8(FLOOR), placed_tile)
    emptied_pocket = jnp.where(puts_down, jnp.uint8(EMPTY), state.pocket)
    rotation = (action == CLOCKWISE).astype(jnp.int32) - (action == COUNTERCLOCKWISE)
    return state._replace(
        grid=jnp.where(jnp.arange(SIZE * SIZE) == front_cell, new_front_tile, state.grid),
        y=jnp.where(is_moving, ahead_y, state.y),
        x=jnp.where(is_moving, ahead_x, state.x),
        direction=(state.direction + rotation) % 4,
        pocket=jnp.where(picks_up, front_tile, emptied_pocket),
        time=state.time + 1,
    )


def reaches(state: State, action: Array, kind: Array, tile: Array) -> Array:
    """Return whether the action that led to `state` reached the goal, given by a kind and a tile.

    As in the package, a move blocked by a wall counts as a move.
    """
    neighbor_offsets = jnp.asarray(_DIRECTIONS @ np.array([SIZE, 1]))
    is_beside = state.grid[state.y * SIZE + state.x + neighbor_offsets] == tile  # [4]
    has_moved = action == FORWARD
    is_held = (action == PICK_UP) & (state.pocket == tile)
    is_near = has_moved & is_beside.any()
    is_in_direction = (has_moved | (action == PUT_DOWN)) & is_beside
    return jnp.concatenate([is_held[None], is_near[None], is_in_direction])[kind]


def field_of_view(state: State) -> Array:
    """Return what the agent sees from the middle of the last row, uint8 [view, view].

    Cells beyond the walls are 0.
    """
    view_offsets = jnp.asarray(_VIEW_OFFSETS)[state.direction]
    seen_y, seen_x = state.y + view_offsets[:, 0], state.x + view_offsets[:, 1]
    is_inside = (seen_y >= 0) & (seen_y < SIZE) & (seen_x >= 0) & (seen_x < SIZE)
    tiles = state.grid[jnp.clip(seen_y * SIZE + seen_x, 0, SIZE * SIZE - 1)]
    return jnp.where(is_inside, tiles, jnp.uint8(EMPTY)).reshape(VIEW, VIEW)


def distinct(draws: Array, bound: int) -> Array:
    """Return k distinct numbers below `bound` from k random uint32, every sequence equally likely.

    The i-th draw, modulo bound − i, is the rank of the i-th number among the remaining ones.
    """
    sorted_numbers: list[Array] = []  # in order
    numbers = []
    for draw_index in range(draws.shape[0]):
        number = (draws[draw_index] % (bound - draw_index)).astype(jnp.int32)
        for smaller_number in sorted_numbers:
            number = number + (number >= smaller_number)
        numbers.append(number)
        for rank, smaller_number in enumerate(sorted_numbers):
            sorted_numbers[rank], number = (
                jnp.minimum(smaller_number, number),
                jnp.maximum(smaller_number, number),
            )
        sorted_numbers.append(number)
    return jnp.stack(numbers)


def make(suite: str) -> XLand:
    """Make the environment for a suite or a single task.

    Args:
      suite: 'train' or '' for the default 30 tasks; 'test', 'all' or 'kinds'; or a task such as
        'hold red ball'.

    Raises:
      UserError: if the suite or task is unknown.
    """
    if suite in SUITES or not suite:
        return XLand(SUITES[suite or 'train'])
    goals = tuple(goal for goal in ALL if goal.name == suite.replace('_', ' '))
    if not goals:
        known_names = [*SUITES, *(goal.name for goal in ALL)]
        raise UserError(f'xland/{suite} is unknown; {suggest(suite, known_names)}')
    return XLand(goals)
