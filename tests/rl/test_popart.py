import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mi.config import UserError
from mi.rl import learner, loss, popart
from mi.rl.agent import Agent, Inputs, forward
from mi.rl.envs.spec import Spec
from mi.rl.popart import Statistics
from mi.rl.trajectory import Trajectory
from mi.training import checkpoint
from tests import prng

TASKS = 3
SCALES = np.array([1e-2, 1.0, 1e3], np.float32)
UPDATES = np.array([4, 2, 9], np.int32)
update = jax.jit(popart.update, static_argnames='beta')
preserve = jax.jit(popart.preserve)


def targets(rng, size=64):
    task = rng.integers(TASKS, size=size)
    return (SCALES[task] * (2 + rng.normal(size=size))).astype(np.float32), task.astype(np.int32)


class Published:
    """The two moments of each task in float64, as Adam's: from zero, divided by 1 − (1 − β)^k."""

    def __init__(self, tasks, beta):
        self.beta, self.first, self.second = beta, np.zeros(tasks), np.zeros(tasks)
        self.k = np.zeros(tasks, int)

    def update(self, v, task, weight):
        for i in range(len(self.k)):
            mine = np.asarray(v, np.float64)[(task == i) & weight]
            if mine.size:
                self.first[i] = (1 - self.beta) * self.first[i] + self.beta * mine.mean()
                self.second[i] = (1 - self.beta) * self.second[i] + self.beta * (mine**2).mean()
                self.k[i] += 1

    def mu(self):
        return self.first / (1 - (1 - self.beta) ** self.k)

    def sigma(self):
        return np.sqrt(self.second / (1 - (1 - self.beta) ** self.k) - self.mu() ** 2)


@pytest.mark.parametrize('updates', [1, 2, 30])
@pytest.mark.parametrize('beta', [3e-4, 0.1, 1.0])
def test_its_moments_are_the_published_ones_corrected_for_their_start(beta, updates):
    """Task 0 has targets in every update, the others in some: each counts its own."""
    rng = np.random.default_rng(0)
    published = Published(TASKS, beta)
    statistics = popart.init(TASKS)
    for k in range(updates):
        v, task = targets(rng)
        weight = rng.uniform(size=64) > 0.3
        weight[task == (0 if k == 0 else rng.integers(1, TASKS))] &= k == 0
        statistics = update(statistics, v, task, weight, beta=beta)
        published.update(v, task, weight)
    np.testing.assert_array_equal(statistics.updates, published.k)
    np.testing.assert_allclose(statistics.mu, published.mu(), rtol=1e-5)
    np.testing.assert_allclose(popart.sigma(statistics), published.sigma(), rtol=1e-4)


def test_the_first_targets_alone_are_the_first_units():
    """Nothing is left of μ = 0 and σ = 1; no digit of σ is lost where μ is 10,000 times as much."""
    v = np.array([1000.0, 1000.2] * 8 + [5.0] * 16, np.float32)
    task = np.repeat([0, 2], 16).astype(np.int32)
    got = update(popart.init(TASKS), v, task, np.ones(32, bool), beta=3e-4)
    np.testing.assert_allclose(got.mu, [1000.1, 0, 5], rtol=1e-6)
    np.testing.assert_allclose(popart.sigma(got), [0.1, 1, popart.LOWEST], rtol=1e-3)
    np.testing.assert_array_equal(got.updates, [1, 0, 1])


def test_a_first_return_of_10000_is_a_hundred_units():
    v, task = np.zeros(10_000, np.float32), np.zeros(10_000, np.int32)
    v[17] = 1e4
    got = update(popart.init(1), v, task, np.ones(10_000, bool), beta=3e-4)
    error = popart.normalize(got, v, task)[17]  # (N − 1) / √(N − 1) of N targets
    np.testing.assert_allclose(error, np.sqrt(9999), rtol=1e-3)


@jax.jit
def update_100_times(statistics, v, task, weight):
    def one(_, statistics):
        return popart.update(statistics, v, task, weight, 0.5)

    return jax.lax.fori_loop(0, 100, one, statistics)


HUGE = float(np.finfo(np.float32).max)


@pytest.mark.parametrize('beta', [3e-4, 0.01, 1.0])
@pytest.mark.parametrize(
    'outliers',
    [
        [1e20],
        [-1e20],
        [3e38],
        [-3e38],
        [HUGE, -HUGE],
        [1e20, 3e38, -3e38],
        [1e10, 1e-38],
        pytest.param([HUGE] * 64, id='all'),
    ],
    ids=str,
)
@pytest.mark.parametrize('earlier', [0, 5])
def test_no_finite_target_makes_the_statistics_infinite(outliers, beta, earlier):
    """The moments are those of targets cut at ±1e9, σ is at its bound, and both come back."""
    rng = np.random.default_rng(2)
    task, weight = np.zeros(64, np.int32), np.ones(64, bool)
    statistics, published = popart.init(2), Published(1, beta)
    for _ in range(earlier):
        v = rng.normal(size=64).astype(np.float32)
        statistics = update(statistics, v, task, weight, beta=beta)
        published.update(v, task, weight)
    v = rng.normal(size=64).astype(np.float32)
    v[: len(outliers)] = outliers
    statistics = update(statistics, v, task, weight, beta=beta)
    published.update(np.clip(v.astype(np.float64), -1e9, 1e9), task, weight)
    np.testing.assert_allclose(statistics.mu, [published.mu()[0], 0], rtol=1e-5, atol=1)
    np.testing.assert_allclose(popart.sigma(statistics), [popart.HIGHEST, 1], rtol=1e-6)
    v = rng.normal(size=64).astype(np.float32)
    statistics = update_100_times(statistics, v, task, weight)
    np.testing.assert_allclose(statistics.mu[0], v.mean(), rtol=1e-3)
    np.testing.assert_allclose(popart.sigma(statistics)[0], v.std(), rtol=1e-3)


def test_one_outlier_changes_no_value():
    """Of a batch of 640 at β = 0.01, again and again: values keep two digits behind the point."""
    rng = np.random.default_rng(4)
    task, weight = np.zeros(640, np.int32), np.ones(640, bool)
    raw = rng.normal(size=50).astype(np.float32)

    @jax.jit
    def step(old, gain, shift, v):
        new = popart.update(old, v, task, weight, 0.01)
        gain, shift = popart.preserve(gain, shift, old, new)
        values = popart.unnormalize(new, gain * raw + shift, np.zeros(50, np.int32))
        return new, gain, shift, values

    statistics, gain, shift = popart.init(1), np.ones(1, np.float32), np.zeros(1, np.float32)
    for k in range(120):
        v = rng.normal(size=640).astype(np.float32)
        if k % 20 == 19:
            v[3] = [1e20, -3e38, 3e38, -1e20, HUGE, 1e10][k // 20]
        statistics, gain, shift, values = step(statistics, gain, shift, v)
        np.testing.assert_allclose(values, raw, atol=0.02)
    assert popart.sigma(statistics) > 1e5


def test_targets_that_do_not_count_may_be_anything():
    v = np.array([1, 3, np.nan, np.inf], np.float32)
    got = update(popart.init(1), v, np.zeros(4, np.int32), np.array([1, 1, 0, 0], bool), beta=0.1)
    np.testing.assert_allclose([got.mu[0], popart.sigma(got)[0]], [2, 1], rtol=1e-6)


def test_outputs_are_preserved_over_a_thousand_updates_of_unlike_tasks():
    """To the rounding of σ n + μ, of the size of μ, σ and the value: by each update, and by all."""
    rng = np.random.default_rng(1)
    statistics = popart.init(TASKS)
    gain, shift = np.ones(TASKS, np.float32), np.zeros(TASKS, np.float32)
    raw, every = rng.normal(size=150).astype(np.float32), np.arange(150) % TASKS

    @jax.jit
    def values(statistics, gain, shift):
        return popart.unnormalize(statistics, gain[every] * raw + shift[every], every)

    worst, first = 0.0, values(statistics, gain, shift)
    for _ in range(1000):
        v, task = targets(rng)
        new = update(statistics, v, task, np.ones(64, bool), beta=0.02)
        before = values(statistics, gain, shift)
        gain, shift = preserve(gain, shift, statistics, new)
        after = values(new, gain, shift)
        size = (popart.sigma(new) + np.abs(new.mu))[every] + np.abs(before)
        worst = max(worst, float((np.abs(before - after) / size).max()))
        statistics = new
    assert worst < 1e-6
    assert (np.abs(first - after) / size).max() < 1e-5
    np.testing.assert_allclose(statistics.mu, 2 * SCALES, rtol=0.05)
    np.testing.assert_allclose(popart.sigma(statistics), SCALES, rtol=0.1)


def test_outputs_are_preserved_where_sigma_is_at_its_bounds():
    old = Statistics(
        np.array([0, 0.3, -2], np.float32), np.array([1, 1e-12, 1e14], np.float32), UPDATES
    )
    new = Statistics(
        np.array([0.1, 0.2, 5], np.float32), np.array([1e-10, 4, 1], np.float32), UPDATES
    )
    gain, shift = np.array([1, 0.5, 2], np.float32), np.array([0, 3, -1e-6], np.float32)
    raw, every = np.array([0.7, -0.2, 1e-6], np.float32), np.arange(3)
    before = popart.unnormalize(old, gain * raw + shift, every)
    gain, shift = preserve(gain, shift, old, new)
    np.testing.assert_allclose(popart.unnormalize(new, gain * raw + shift, every), before, 1e-5)


T, B = 5, 4
ROW = np.zeros((T + 1, B), np.int32)
AGENT_TASK = np.tile(np.array([0, 1, 0, 1], np.int32), (T + 1, 1))


def agent_and_trajectory(reward, **options):
    """An agent of two tasks, and a trajectory of it with these rewards [T + 1, B]."""
    spec = Spec(
        name='toy',
        observation={
            'features': jax.ShapeDtypeStruct((3,), jnp.float32),
            'task': jax.ShapeDtypeStruct((), jnp.int32),
        },
        actions=3,
        tasks=('small', 'large'),
    )
    rng = np.random.default_rng(0)
    features = rng.normal(size=(T + 1, B, 3)).astype('f')
    observation = {'features': features, 'task': AGENT_TASK}
    inputs = Inputs(observation, ROW, np.asarray(reward, np.float32), ROW.astype(bool))
    ones = np.ones((T, B), np.float32)
    trajectory = Trajectory(inputs, ROW[:-1], np.log(ones / 3), ones, ones.astype(bool), {})
    return Agent(spec=spec, **{'features': 4, 'core': None, 'sites': ()} | options), trajectory


def drawn_rewards():
    rng = np.random.default_rng(1)
    return SCALES[[0, 2]][AGENT_TASK] * rng.normal(size=(T + 1, B))


@functools.cache
def initial_params():
    agent, trajectory = agent_and_trajectory(np.zeros((T + 1, B)))
    return jax.jit(agent.init)(prng.key(0), {}, trajectory.inputs)['params']


def learner_state(agent, optimiser):
    return learner.init_learner_state(initial_params(), optimiser, len(agent.spec.tasks))


@functools.cache
def make_update(optimiser, hyperparameters):
    agent, _ = agent_and_trajectory(np.zeros((T + 1, B)))
    return jax.jit(functools.partial(learner.update, agent, optimiser, hyperparameters))


@jax.jit
def forward_values(params, inputs):
    agent, _ = agent_and_trajectory(np.zeros((T + 1, B)))
    return forward(agent, params, {}, inputs)[1].value


def values_of(trajectory, params, statistics):
    values = forward_values(params, trajectory.inputs)
    return popart.unnormalize(statistics, values, AGENT_TASK)


@pytest.mark.parametrize('order', loss.POPART_ORDERS)
def test_the_learner_moves_the_statistics_and_no_value(order):
    """With an optimizer that changes nothing, the predicted values stay the same."""
    agent, trajectory = agent_and_trajectory(drawn_rewards())
    optimiser, h = optax.set_to_zero(), loss.Hyperparameters(popart=0.1, popart_order=order)
    state = learner_state(agent, optimiser)
    values = jax.jit(lambda s: values_of(trajectory, s.params, s.statistics))
    step = jax.jit(lambda state: learner.update(agent, optimiser, h, state, trajectory)[0])
    before = values(state)
    for _ in range(3):
        state = step(state)
    sigma = popart.sigma(state.statistics)
    assert sigma[0] < 0.95
    assert sigma[1] > 100
    np.testing.assert_allclose(values(state), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('source', ['state', 'task', 'embedding'])
def test_no_value_moves_with_the_statistics_at_a_fused_read_out(source):
    """The optimizer changes nothing; the reference is a value in float64."""
    options = {'sites': ('readout',), 'source': source, 'context': 3}
    agent, trajectory = agent_and_trajectory(drawn_rewards(), **options)
    params = jax.jit(agent.init)(prng.key(0), {}, trajectory.inputs)['params']
    optimizer, h = optax.set_to_zero(), loss.Hyperparameters(popart=0.1)
    state = learner.init_learner_state(params, optimizer, len(agent.spec.tasks))
    step = jax.jit(lambda state: learner.update(agent, optimizer, h, state, trajectory)[0])
    read = jax.jit(lambda params: forward(agent, params, {}, trajectory.inputs)[1])

    def values(state):
        params = state.params | {'gain': jnp.ones(2), 'shift': jnp.zeros(2)}
        raw, one = np.asarray(read(params).value, np.float64), AGENT_TASK
        gain, shift, mu, sigma = (
            np.asarray(a, np.float64)[one]
            for a in (
                *(state.params['gain'], state.params['shift']),
                *(state.statistics.mu, popart.sigma(state.statistics)),
            )
        )
        return sigma * (gain * raw + shift) + mu

    before, logits = values(state), read(state.params).logits
    for _ in range(3):
        state = step(state)
    sigma = popart.sigma(state.statistics)
    assert sigma[0] < 0.95 and sigma[1] > 100
    size = (sigma + np.abs(state.statistics.mu))[AGENT_TASK]
    assert (np.abs(values(state) - before) / size).max() < 1e-6
    np.testing.assert_array_equal(read(state.params).logits, logits)


@pytest.mark.parametrize('order', loss.POPART_ORDERS)
def test_without_preservation_the_values_follow_the_statistics(order):
    """The normalized values n stay, so that the values are σ' n + μ' of the new statistics."""
    agent, trajectory = agent_and_trajectory(drawn_rewards())
    h = loss.Hyperparameters(popart=0.1, popart_order=order, popart_preserve=False)
    optimizer = optax.set_to_zero()
    state = learner_state(agent, optimizer)
    new_state, _ = make_update(optimizer, h)(state, trajectory)
    for before, after in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(new_state.params), strict=True
    ):
        np.testing.assert_array_equal(after, before)

    mu, sigma = new_state.statistics.mu, popart.sigma(new_state.statistics)
    normalized = forward_values(state.params, trajectory.inputs)
    expected = sigma[AGENT_TASK] * normalized + mu[AGENT_TASK]
    got = values_of(trajectory, new_state.params, new_state.statistics)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    old = values_of(trajectory, state.params, state.statistics)
    assert (np.abs(got - old)[AGENT_TASK == 1] > 1).all()


@pytest.mark.parametrize('preserves', [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize('order', loss.POPART_ORDERS)
def test_the_gradient_is_in_the_units_of_its_order(order, preserves):
    """Against two passes: statistics, then the gradient at the parameters that they rescale."""
    agent, trajectory = agent_and_trajectory(drawn_rewards())
    h = loss.Hyperparameters(popart=0.1, popart_order=order, popart_preserve=preserves)
    optimiser = optax.sgd(1e-3)
    state = learner_state(agent, optimiser)
    state = state._replace(statistics=Statistics(*map(jnp.array, ([0.3, 20], [4, 9], [3, 3]))))

    def terms(params, statistics):
        _, outputs = forward(agent, params, {}, trajectory.inputs)
        return loss.impala_loss(outputs, trajectory, statistics, h)[1]

    def total(params, statistics):
        t = terms(params, statistics)
        return (t.policy + h.baseline_cost * t.baseline - h.entropy_cost * t.entropy).mean()

    def move(params, targets):
        new = popart.update(state.statistics, targets, AGENT_TASK[:-1], trajectory.valid, h.popart)
        if not preserves:
            return params, new
        gain, shift = popart.preserve(params['gain'], params['shift'], state.statistics, new)
        return params | {'gain': gain, 'shift': shift}, new

    @jax.jit
    def reference():
        targets = terms(state.params, state.statistics).targets
        params, statistics = state.params, state.statistics
        if order == 'statistics_first':
            params, statistics = move(params, targets)
        gradient = jax.grad(total)(params, statistics)
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
        if order == 'gradient_first':
            params, statistics = move(params, targets)
        return params, statistics, optax.tree.norm(gradient)

    expected_params, expected_statistics, norm = reference()
    got, measured = jax.jit(functools.partial(learner.update, agent, optimiser, h))(
        state, trajectory
    )
    for x, y in zip(got.statistics, expected_statistics, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: a - b, got.params, state.params)
    expected = jax.tree.map(lambda a, b: a - b, expected_params, state.params)
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-6)
    np.testing.assert_allclose(measured['gradient_norm'], norm, rtol=1e-4)


def test_the_order_decides_the_units_of_the_first_error():
    """Returns of 1e4 in one of two columns: 10,000 units of the start, two of their own."""
    reward = np.zeros((T + 1, B), np.float32)
    reward[1:, 1] = 1e4
    agent, trajectory = agent_and_trajectory(reward)
    always = np.full((T, B), -20, np.float32)  # log μ so low that every ρ is clipped to 1
    of_large = AGENT_TASK[:-1] == 1
    trajectory = trajectory._replace(
        discount=np.zeros((T, B), np.float32), log_prob=always, valid=of_large
    )
    optimiser, error = optax.sgd(1e-9), {}
    state = learner_state(agent, optimiser)
    for order in loss.POPART_ORDERS:
        h = loss.Hyperparameters(popart_order=order)
        _, measured = jax.jit(functools.partial(learner.update, agent, optimiser, h))(
            state, trajectory
        )
        # ½ Σ error² is nearly all of that column, one of B.
        error[order] = float(np.sqrt(2 * B * measured['baseline']))
    np.testing.assert_allclose(error['gradient_first'], 1e4, rtol=1e-3)
    # Values of 0 lie one σ below the mean of 'large', its columns one above and one below. Rows of
    # 'small', whose targets are all 0, do not count.
    np.testing.assert_allclose(error['statistics_first'], 2, rtol=1e-3)


ADAM = optax.chain(optax.clip_by_global_norm(40.0), optax.adam(1e-3))


@pytest.mark.parametrize('order', loss.POPART_ORDERS)
@pytest.mark.parametrize('reward', [1e4, 1e20, -1e20])
def test_an_update_with_one_huge_reward_is_finite_and_so_are_those_after(order, reward):
    """The square of 1e20 units of the start is not, for a loss in the units before."""
    rewards = drawn_rewards()
    agent, ordinary = agent_and_trajectory(rewards)
    rewards[3, 1] = reward
    _, hit = agent_and_trajectory(rewards)
    h = loss.Hyperparameters(popart=0.01, popart_order=order)
    state = learner_state(agent, ADAM)
    for trajectory in (hit, ordinary, hit, ordinary):
        state, measured = make_update(ADAM, h)(state, trajectory)
        for leaf in jax.tree.leaves(state):
            assert np.isfinite(leaf).all()
        if order == 'statistics_first' or reward == 1e4:
            assert np.isfinite(list(measured.values())).all()


def test_12800_targets_of_one_task_move_it_as_one_mean_and_no_other_task():
    """An update has the targets of B = 128 and T = 100; their sum would diverge at β = 3e-4."""
    rng = np.random.default_rng(3)
    n, beta, updates = 12_800, 3e-4, 3000
    v = (5 + 0.5 * rng.normal(size=n)).astype(np.float32)
    task, weight = np.ones(n, np.int32), np.ones(n, bool)

    @jax.jit
    def several(statistics):
        def one(_, statistics):
            return popart.update(statistics, v, task, weight, beta)

        return jax.lax.fori_loop(0, updates, one, statistics)

    got = several(popart.init(TASKS))
    mean, sigma = np.mean(v, dtype=np.float64), np.std(v, dtype=np.float64)
    np.testing.assert_allclose(got.mu, [0, mean, 0], rtol=1e-4)
    np.testing.assert_allclose(popart.sigma(got), [1, sigma, 1], rtol=1e-4)


def test_a_mean_of_many_sigmas_does_not_cost_sigma_its_precision():
    """ν − μ² in f32 would not move at all here: a step of ν is below its last digit."""
    v = np.array([99.7, 100.3] * 50, np.float32)
    start = Statistics(jnp.array([100.0]), jnp.array([1.0]), jnp.array([100_000]))

    @jax.jit
    def several(statistics):
        def one(_, statistics):
            return popart.update(statistics, v, np.zeros(100, np.int32), np.ones(100, bool), 3e-4)

        return jax.lax.fori_loop(0, 300, one, statistics)

    left = (1 - 3e-4) ** 300
    sigma = popart.sigma(several(start))
    np.testing.assert_allclose(sigma, np.sqrt(left + (1 - left) * 0.09), rtol=1e-4)


def test_a_task_without_targets_keeps_its_statistics():
    v, task = np.full(4, 7, np.float32), np.array([0, 0, 2, 2], np.int32)
    old = Statistics(np.array([0.1, 0.2, 0.3], 'f'), np.array([0.7, 0.8, 0.9], 'f'), UPDATES)
    got = update(old, v, task, np.array([1, 1, 0, 0], bool), beta=0.5)
    for before, after in zip(old, got, strict=True):
        np.testing.assert_array_equal(after[1:], before[1:])
        assert after[0] != before[0]


def test_sigma_stays_within_its_bounds():
    variance = np.array([-1e-9, 0, 1e-20, 4, 1e20], np.float32)
    sigma = popart.sigma(Statistics(np.zeros(5, np.float32), variance, np.ones(5, np.int32)))
    np.testing.assert_allclose(sigma, [1e-4, 1e-4, 1e-4, 2, 1e6], rtol=1e-6)


def test_normalize_undoes_unnormalise():
    statistics = Statistics(np.array([3.0, -1], 'f'), np.array([4.0, 4], 'f'), UPDATES[:2])
    task, v = np.array([0, 1, 1]), np.array([1.0, 2, 3], 'f')
    normalized = popart.normalize(statistics, v, task)
    np.testing.assert_allclose(normalized, [-1, 1.5, 2], rtol=1e-6)
    np.testing.assert_allclose(popart.unnormalize(statistics, normalized, task), v, rtol=1e-6)


def test_a_checkpoint_of_before_the_counts_is_refused_by_the_name_of_what_it_lacks(tmp_path):
    class Before(NamedTuple):
        mu: jax.Array
        variance: jax.Array

    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(3, Before(jnp.zeros(2), jnp.ones(2)), {})
    message = r'\.updates is absent in the checkpoint and int32\[2\] in the model.*--workdir'
    with pytest.raises(UserError, match=message):
        saved.restore(popart.init(2))
