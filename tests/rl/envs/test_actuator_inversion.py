"""Actuator inversion against its rules in NumPy, in every task and state."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi import testing
from mi.config import UserError
from mi.rl.envs import auto_reset
from mi.rl.envs.jax import actuator_inversion
from mi.rl.envs.jax.actuator_inversion import SIZE, STEPS, State
from tests import prng

MOVES = {'up': (-1, 0), 'right': (0, 1), 'down': (1, 0), 'left': (0, -1)}
CELLS = list(itertools.product(range(SIZE), repeat=2))
PAIRS = [(start, goal) for start, goal in itertools.product(CELLS, CELLS) if start != goal]
SUITES = {'symmetries': 8, 'inversions': 4, 'permutations': 24}


def moves(environment, task):
    """What the actions 0 to 3 do, read from the task's name."""
    return [MOVES[word] for word in environment.spec.tasks[task].split()]


def walk(cell, move):
    return tuple(
        min(max(place + change, 0), SIZE - 1) for place, change in zip(cell, move, strict=True)
    )


def make_states(tasks, starts, goals, time=0):
    return State(
        jnp.array(tasks, jnp.int32),
        jnp.array(starts, jnp.int32),
        jnp.array(goals, jnp.int32),
        jnp.full(len(tasks), time, jnp.int32),
    )


@functools.cache
def vmapped_step(suite):
    return jax.jit(jax.vmap(actuator_inversion.make(suite).step))


@pytest.mark.parametrize('suite', SUITES)
def test_an_action_moves_as_the_name_of_its_task_says(suite):
    environment = actuator_inversion.make(suite)
    cases = list(itertools.product(range(SUITES[suite]), CELLS, range(4)))
    goal = (SIZE // 2, SIZE // 2)
    tasks, starts, actions = zip(*cases, strict=True)
    states = make_states(tasks, starts, [goal] * len(cases))
    after, transition = vmapped_step(suite)(states, jnp.array(actions))
    expected = [walk(start, moves(environment, task)[action]) for task, start, action in cases]
    np.testing.assert_array_equal(after.position, expected)
    np.testing.assert_array_equal(after.goal, states.goal)
    np.testing.assert_array_equal(after.task, tasks)
    reached = [cell == goal for cell in expected]
    np.testing.assert_array_equal(transition.terminated, reached)
    np.testing.assert_array_equal(transition.success, reached)
    np.testing.assert_array_equal(transition.reward, np.float32(reached))
    for cell, grid in zip(expected, np.asarray(transition.observation['grid']), strict=True):
        drawn = np.zeros((SIZE, SIZE, 1), int)
        drawn[goal] = 2
        drawn[cell] = 1
        np.testing.assert_array_equal(grid, drawn)


def test_the_tasks_are_all_that_their_suite_names():
    """Symmetries keep opposite actions opposite; inversions keep each action on its axis."""
    suites = {name: actuator_inversion.make(name) for name in SUITES}
    names = {name: environment.spec.tasks for name, environment in suites.items()}
    assert {name: len(set(tasks)) for name, tasks in names.items()} == SUITES
    all_tasks = {' '.join(words) for words in itertools.permutations(MOVES)}
    assert set(names['permutations']) == all_tasks
    opposite = {'up': 'down', 'down': 'up', 'left': 'right', 'right': 'left'}
    symmetric = {task for task in all_tasks if opposite[task.split()[0]] == task.split()[2]}
    assert set(names['symmetries']) == symmetric
    assert set(names['inversions']) == {
        f'{vertical[0]} {horizontal[0]} {vertical[1]} {horizontal[1]}'
        for vertical in (('up', 'down'), ('down', 'up'))
        for horizontal in (('right', 'left'), ('left', 'right'))
    }
    assert actuator_inversion.make('').spec.tasks == names['symmetries']
    assert names['symmetries'][0] == 'up right down left'


def toward_goal(position, goal):
    """The direction of a shortest path, the vertical axis first."""
    dy, dx = (int(there - here) for here, there in zip(position, goal, strict=True))
    if dy:
        return 'down' if dy > 0 else 'up'
    return 'right' if dx > 0 else 'left'


def play(suite, choose_action):
    """Play every start and goal in every task; return rewards and ends, [steps, cases]."""
    cases = list(itertools.product(range(SUITES[suite]), PAIRS))
    states = make_states(
        [task for task, _ in cases], *zip(*(pair for _, pair in cases), strict=True)
    )
    rewards, terminated, truncated = [], [], []
    for _ in range(STEPS):
        actions = [
            choose_action(task, position, goal)
            for (task, (_, goal)), position in zip(cases, np.asarray(states.position), strict=True)
        ]
        states, transition = vmapped_step(suite)(states, jnp.array(actions))
        rewards.append(transition.reward)
        terminated.append(transition.terminated)
        truncated.append(transition.truncated)
    return cases, np.array(rewards), np.array(terminated), np.array(truncated)


@pytest.mark.parametrize('suite', ['symmetries', 'inversions'])
def test_the_policy_that_knows_the_task_always_gets_the_reference(suite):
    environment = actuator_inversion.make(suite)

    def act(task, position, goal):
        if tuple(position) == goal:  # the episode is over
            return 0
        return environment.spec.tasks[task].split().index(toward_goal(position, goal))

    cases, rewards, terminated, truncated = play(suite, act)
    lengths = terminated.argmax(0) + 1
    distances = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for _, (a, b) in cases]
    np.testing.assert_array_equal(lengths, distances)
    first_rewards = rewards[lengths - 1, range(len(cases))]
    assert set(first_rewards) == {1.0} == set(environment.spec.reference)
    assert not truncated[:-1].any() and max(distances) == STEPS


def test_a_policy_for_another_task_fails_and_is_truncated():
    """Both axes inverted: whoever walks as in the first task walks into a wall and stays."""
    environment = actuator_inversion.make('inversions')
    inverted = environment.spec.tasks.index('down left up right')

    def act(task, position, goal):
        if tuple(position) == goal:
            return 0
        return list(MOVES).index(toward_goal(position, goal))

    cases, _, terminated, truncated = play('inversions', act)
    reached = terminated.any(0)
    by_task = [reached[[case[0] == task for case in cases]].mean() for task in range(4)]
    assert by_task[0] == 1.0 and by_task[inverted] == 0.0
    assert truncated[-1].all() and not truncated[:-1].any()


def test_the_return_of_the_random_policy_is_exact():
    """P(reach the goal within STEPS) by dynamic programming, for every start and goal."""
    total = 0.0
    for goal in CELLS:
        reach = {cell: float(cell == goal) for cell in CELLS}
        for _ in range(STEPS):
            reach = {
                cell: 1.0
                if cell == goal
                else sum(reach[walk(cell, move)] for move in MOVES.values()) / 4
                for cell in CELLS
            }
        total += sum(reach.values()) - 1
    (random_return,) = set(actuator_inversion.make('').spec.random)
    assert random_return == pytest.approx(total / len(PAIRS), abs=5e-7)


def test_starts_and_goals_are_different_and_uniform():
    environment = actuator_inversion.make('')
    keys = jax.random.split(prng.key(0), 60_000)
    states, _ = jax.jit(jax.vmap(environment.reset))(keys, jnp.zeros(len(keys), jnp.int32))
    starts, goals = (np.asarray(cells) @ [SIZE, 1] for cells in (states.position, states.goal))
    counts = np.zeros((SIZE**2, SIZE**2), int)
    np.add.at(counts, (starts, goals), 1)
    assert np.trace(counts) == 0
    off_diagonal = counts[~np.eye(SIZE**2, dtype=bool)]
    chi_squared = ((off_diagonal - 100) ** 2 / 100).sum()  # 599 degrees of freedom
    assert abs(chi_squared - 599) < 5 * np.sqrt(2 * 599)


def test_a_stream_ends_and_restarts_as_its_spec_says():
    testing.check_environment(actuator_inversion.make(''))
    environment = actuator_inversion.make('inversions')
    key = prng.key(0)
    state, _ = jax.jit(functools.partial(auto_reset.reset, environment))(key, jnp.int32(0))
    at_wall = make_states([0], [(0, 0)], [(4, 4)])
    state = state._replace(env_state=jax.tree.map(lambda leaf: leaf[0], at_wall))
    step = jax.jit(functools.partial(auto_reset.step, environment))
    ends = []
    for _ in range(STEPS + 1):  # up, into the wall
        state, result = step(state, jnp.int32(0))
        ends.append((bool(result.is_last), bool(result.is_first), float(result.discount)))
    assert ends == [(False, False, 1.0)] * (STEPS - 1) + [(True, False, 1.0), (False, True, 1.0)]


def test_an_unknown_suite_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="inversion is unknown; did you mean 'inversions'"):
        actuator_inversion.make('inversion')
