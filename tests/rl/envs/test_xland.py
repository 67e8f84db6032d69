import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.config import UserError
from mi.rl.envs import auto_reset
from mi.rl.envs.jax import xland

xminigrid = pytest.importorskip('xminigrid', reason='the peer: pip install xminigrid')

ROWS = 128


def states(environment, rows=ROWS, seed=0):
    keys = jax.random.split(jax.random.key(seed), rows)
    tasks = jnp.arange(rows, dtype=jnp.int32) % len(environment.spec.tasks)
    return jax.jit(jax.vmap(functools.partial(auto_reset.reset, environment)))(keys, tasks)


def rollout(environment, state, actions):
    """[T, B] actions → the states before and the steps after each, [T, B, …]."""

    def step(state, action):
        restarts = functools.partial(auto_reset.step, environment)
        after, result = jax.vmap(restarts)(state, action)
        return after, (state, result)

    return jax.jit(lambda s, a: jax.lax.scan(step, s, a)[1])(state, actions)


def actions(length, rows=ROWS, seed=1, weights=(0.5, 0.15, 0.1, 0.15, 0.05, 0.05)):
    return np.random.default_rng(seed).choice(6, (length, rows), p=weights).astype(np.int32)


def of_the_package(goals):
    """One step of the package's own environment from one of our states."""
    from xminigrid.core import goals as kinds
    from xminigrid.core.rules import EmptyRule
    from xminigrid.envs.xland import XLandMiniGrid
    from xminigrid.types import AgentState, EnvCarry, State, StepType, TimeStep

    of_kind = {
        'hold': kinds.AgentHoldGoal,
        'near': kinds.AgentNearGoal,
        'up': kinds.AgentNearUpGoal,
        'right': kinds.AgentNearRightGoal,
        'down': kinds.AgentNearDownGoal,
        'left': kinds.AgentNearLeftGoal,
    }
    tiles = [divmod(xland.OBJECTS[f'{g.paint} {g.shape}'], xland.COLORS) for g in goals]
    encodings = jnp.stack(
        [
            of_kind[g.kind](tile=jnp.array(tile, jnp.uint8)).encode().astype(jnp.uint8)
            for g, tile in zip(goals, tiles, strict=True)
        ]
    )
    theirs = XLandMiniGrid()
    params = theirs.default_params(
        height=xland.SIZE, width=xland.SIZE, view_size=xland.VIEW, max_steps=xland.STEPS
    )

    def tile(code):
        return jnp.stack(jnp.divmod(code, jnp.uint8(xland.COLORS)), axis=-1)

    def step(state, action):
        agent = AgentState(jnp.stack([state.y, state.x]), state.direction, tile(state.pocket))
        grid = tile(state.grid).reshape(xland.SIZE, xland.SIZE, 2)
        inside = State(
            key=jax.random.key(0),
            step_num=state.time,
            grid=grid,
            agent=agent,
            goal_encoding=encodings[state.task],
            rule_encoding=EmptyRule().encode()[None],
            carry=EnvCarry(),
        )
        before = TimeStep(inside, StepType.MID, jnp.zeros(()), jnp.ones(()), jnp.zeros(()))
        return theirs.step(params, before, action)

    return step


@pytest.fixture(scope='module')
def played():
    environment = xland.make('all')
    state, first = states(environment)
    chosen = actions(60)
    before, after = rollout(environment, state, chosen)
    return environment, first, chosen, before, after


def test_a_step_is_the_packages_own(played):
    with jax.numpy_rank_promotion('allow'):
        environment, _, chosen, stream, _ = played
        before = stream.env_state
        theirs = jax.jit(jax.vmap(jax.vmap(of_the_package(xland.ALL))))(before, chosen)
        moved, after = jax.jit(jax.vmap(jax.vmap(environment.step)))(before, chosen)
    ran = ~np.asarray(stream.is_last)  # others were truncated one step before
    tiles = np.asarray(theirs.state.grid, np.int32) @ np.array([xland.COLORS, 1])
    np.testing.assert_array_equal(tiles.reshape(moved.grid.shape), moved.grid)
    np.testing.assert_array_equal(theirs.state.agent.position, np.stack([moved.y, moved.x], -1))
    np.testing.assert_array_equal(theirs.state.agent.direction, moved.direction)
    np.testing.assert_array_equal(
        np.asarray(theirs.state.agent.pocket, np.int32) @ np.array([xland.COLORS, 1]), moved.pocket
    )
    np.testing.assert_allclose(theirs.reward, after.reward, rtol=1e-6)
    np.testing.assert_array_equal(theirs.discount == 0, after.terminated)
    np.testing.assert_array_equal(after.success, after.terminated)
    ours = np.asarray(after.terminated | after.truncated)
    np.testing.assert_array_equal(np.asarray(theirs.step_type == 2)[ran], ours[ran])
    np.testing.assert_array_equal(theirs.observation, after.observation['grid'])
    assert (after.success & ran).sum() > 20
    assert (np.asarray(after.truncated) & ran).sum() > 20
    assert (before.pocket != xland.EMPTY).mean() > 0.1


def test_every_kind_of_goal_is_reached_by_chance(played):
    _, _, _, before, after = played
    task = np.asarray(before.env_state.task)
    reached = Counter(xland.ALL[i].kind for i in task[np.asarray(after.success)])
    assert set(reached) == set(xland.KINDS)


def test_the_spec_is_what_comes_out(played):
    environment, first, _, _, after = played
    spec = environment.spec
    seen = {k: (v.shape[1:], v.dtype) for k, v in first.observation.items()}
    assert seen == {k: (v.shape, v.dtype) for k, v in spec.observation.items()}
    grid = np.asarray(after.observation['grid'])
    assert grid[..., 0].max() < spec.categories[0]
    assert grid[..., 1].max() < spec.categories[1]
    tokens = np.asarray(after.observation['instruction'])
    assert tokens.min() > 0
    assert tokens.max() < spec.vocabulary
    assert len(spec.tasks) == len(set(spec.tasks)) == len(spec.random) == 54


def test_a_goal_terminates_and_the_limit_truncates(played):
    _, first, _, before, after = played
    terminated, truncated = np.asarray(after.discount) == 0, np.asarray(after.is_last)
    ignored = np.asarray(before.is_last)
    np.testing.assert_array_equal(after.is_first, terminated | ignored)
    np.testing.assert_array_equal(after.success, terminated)
    assert np.asarray(first.is_first).all()
    assert (np.asarray(after.reward)[terminated] > 0.1 - 1e-6).all()
    assert not np.asarray(after.reward)[~terminated].any()
    assert (np.asarray(before.env_state.time)[truncated] == xland.STEPS - 1).all()
    np.testing.assert_array_equal(ignored[1:], truncated[:-1])
    assert truncated.sum() > 20


def test_an_episode_is_truncated_at_its_limit():
    environment = xland.make('')
    state, _ = states(environment, 8)
    still = np.full((xland.STEPS, 8), xland.CLOCKWISE, np.int32)
    _, after = rollout(environment, state, still)
    last = np.arange(xland.STEPS) == xland.STEPS - 1
    np.testing.assert_array_equal(after.is_last, np.tile(last, (8, 1)).T)
    np.testing.assert_array_equal(after.discount, 1)


def test_nothing_that_is_seen_depends_on_the_task():
    """But 'task' and 'instruction': the same key and actions give the same pictures."""
    environment = xland.make('')
    reset, step = jax.jit(jax.vmap(environment.reset)), jax.jit(jax.vmap(environment.step))
    tasks = jnp.arange(30, dtype=jnp.int32)
    keys = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(jax.random.key(3)), (30, 1)))
    state, observation = reset(keys, tasks)
    rng, alive = np.random.default_rng(0), np.ones(30, bool)
    for _ in range(30):
        for name in ('grid', 'features'):
            seen = np.asarray(observation[name])[alive]
            assert (seen == seen[0]).all()
        state, result = step(state, jnp.full(30, rng.integers(6), jnp.int32))
        observation = result.observation
        alive &= ~np.asarray(result.terminated)
    assert alive.sum() > 1
    assert not alive.all()


def test_tasks_and_layouts_are_drawn_evenly():
    """Chi-squared, at most three standard deviations from its mean."""
    environment = xland.make('')
    state, _ = states(environment, 20_000, seed=5)
    ended = state._replace(is_last=jnp.ones(20_000, bool))  # the next episode is drawn now
    restart = jax.jit(jax.vmap(functools.partial(auto_reset.step, environment)))
    drawn = restart(ended, jnp.zeros(20_000, jnp.int32))[0].env_state
    grid = np.asarray(drawn.grid)
    counted = [np.bincount(drawn.task, minlength=30), np.bincount(drawn.direction, minlength=4)]
    where = np.asarray(drawn.y) * xland.SIZE + np.asarray(drawn.x)
    counted.append(np.bincount(where, minlength=81)[xland._FLOOR_CELLS])
    for tile in xland.OBJECTS.values():
        at = (grid == tile).argmax(1)
        assert ((grid == tile).sum(1) == 1).all()
        assert (at != where).all()
        counted.append(np.bincount(at, minlength=81)[xland._FLOOR_CELLS])
    for count in counted:
        expected = count.sum() / len(count)
        chi = ((count - expected) ** 2 / expected).sum()
        freedom = len(count) - 1
        assert abs(chi - freedom) < 4 * np.sqrt(2 * freedom), (chi, freedom)


def test_distinct_numbers_are_every_sequence_equally_often():
    n, k = 5, 3
    draws = np.array(list(itertools.product(*(range(n - i) for i in range(k)))), np.uint32)
    got = {tuple(map(int, row)) for row in jax.vmap(lambda d: xland.distinct(d, n))(draws)}
    assert got == set(itertools.permutations(range(n), k))


def test_the_held_out_tasks_are_new_combinations_of_known_words():
    assert len(xland.TRAIN) == 30
    assert len(xland.TEST) == 24
    assert not set(xland.TRAIN) & set(xland.TEST)
    assert set(xland.TRAIN) | set(xland.TEST) == set(xland.ALL)
    for part in (xland.TRAIN, xland.TEST):
        assert {g.kind for g in part} == set(xland.KINDS)
        assert len({(g.paint, g.shape) for g in part}) == 9
    tokens = {suite: xland.make(suite).spec.vocabulary for suite in xland.SUITES}
    assert set(tokens.values()) == {13}


def test_one_task_by_its_name():
    environment = xland.make('near_blue_pyramid')
    assert environment.spec.tasks == ('near blue pyramid',)
    with pytest.raises(UserError, match='near red ball'):
        xland.make('near red bal')


@pytest.mark.slow
def test_the_random_scores_are_what_chance_gets():
    """Within four standard errors of 200 episodes for each of 54 tasks, by kind."""
    environment = xland.make('all')
    returned, kind = random_returns(environment, 54 * 200, seed=11)
    for i, name in enumerate(xland.KINDS):
        of_kind = returned[kind == i]
        error = of_kind.std() / np.sqrt(len(of_kind))
        assert abs(of_kind.mean() - xland.RANDOM[name]) < 4 * error, (name, of_kind.mean(), error)


def random_returns(environment, rows, seed):
    """The return of one episode of each row under the uniform policy, and its kind of goal."""
    state, _ = states(environment, rows, seed)
    kind = environment._kind[np.asarray(state.env_state.task)]
    chosen = np.random.default_rng(seed).integers(0, 6, (xland.STEPS, rows), np.int32)
    _, after = rollout(environment, state, chosen)
    runs_on = ~(np.asarray(after.is_last) | (np.asarray(after.discount) == 0))
    alive = np.cumprod(runs_on, axis=0)
    alive = np.concatenate([np.ones((1, rows)), alive[:-1]])
    return (np.asarray(after.reward) * alive).sum(0), kind
