import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mi.rl import learner, popart
from mi.rl.actor import Trajectory
from mi.rl.envs.spec import Spec
from mi.rl.networks import Agent, Inputs, forward
from mi.rl.popart import Statistics

TASKS = 3
SCALES = np.array([1e-2, 1.0, 1e3], np.float32)
update = jax.jit(popart.update, static_argnames='beta')
preserve = jax.jit(popart.preserve)


def targets(rng, size=64):
    task = rng.integers(TASKS, size=size)
    return (SCALES[task] * (2 + rng.normal(size=size))).astype(np.float32), task.astype(np.int32)


def published(mu, nu, v, task, weight, beta):
    """The two moments of each task in float64."""
    mu, nu = mu.copy(), nu.copy()
    for i in range(len(mu)):
        mine = np.asarray(v, np.float64)[(task == i) & weight]
        if mine.size:
            mu[i] = (1 - beta) * mu[i] + beta * mine.mean()
            nu[i] = (1 - beta) * nu[i] + beta * (mine**2).mean()
    return mu, nu


@pytest.mark.parametrize('beta', [3e-4, 0.1, 1.0])
def test_its_moments_are_the_published_ones(beta):
    rng = np.random.default_rng(0)
    mu, nu = np.zeros(TASKS), np.ones(TASKS)
    statistics = popart.init(TASKS)
    for _ in range(30):
        v, task = targets(rng)
        weight = rng.uniform(size=64) > 0.3
        weight[task == rng.integers(TASKS)] = False
        statistics = update(statistics, v, task, weight, beta=beta)
        mu, nu = published(mu, nu, v, task, weight, beta)
    np.testing.assert_allclose(statistics.mu, mu, rtol=1e-5)
    np.testing.assert_allclose(popart.sigma(statistics), np.sqrt(nu - mu**2), rtol=1e-4)


def test_outputs_are_preserved_over_a_thousand_updates_of_unlike_tasks():
    """To the rounding of σ n + μ, of the size of μ, σ and the value: by each update, and by all."""
    rng = np.random.default_rng(1)
    statistics = popart.init(TASKS)
    gain, shift = np.ones(TASKS, np.float32), np.zeros(TASKS, np.float32)
    raw, every = rng.normal(size=150).astype(np.float32), np.arange(150) % TASKS

    @jax.jit
    def values(statistics, gain, shift):
        return popart.unnormalise(statistics, gain[every] * raw + shift[every], every)

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
    old = Statistics(np.array([0, 0.3, -2], np.float32), np.array([1, 1e-12, 1e14], np.float32))
    new = Statistics(np.array([0.1, 0.2, 5], np.float32), np.array([1e-10, 4, 1], np.float32))
    gain, shift = np.array([1, 0.5, 2], np.float32), np.array([0, 3, -1e-6], np.float32)
    raw, every = np.array([0.7, -0.2, 1e-6], np.float32), np.arange(3)
    before = popart.unnormalise(old, gain * raw + shift, every)
    gain, shift = preserve(gain, shift, old, new)
    np.testing.assert_allclose(popart.unnormalise(new, gain * raw + shift, every), before, 1e-5)


def test_the_learner_moves_the_statistics_and_no_value():
    """With an optimiser that stands still, what the agent says of the values stays as it was."""
    T, B, tasks = 5, 4, 2
    spec = Spec(
        name='toy',
        observation={
            'features': jax.ShapeDtypeStruct((3,), jnp.float32),
            'task': jax.ShapeDtypeStruct((), jnp.int32),
        },
        actions=3,
        tasks=('small', 'large'),
    )
    agent = Agent(spec=spec, features=4, core=None, sites=())
    rng = np.random.default_rng(0)
    task = np.tile(np.array([0, 1, 0, 1], np.int32), (T + 1, 1))
    observation = {'features': rng.normal(size=(T + 1, B, 3)).astype('f'), 'task': task}
    reward = (SCALES[[0, 2]][task] * rng.normal(size=(T + 1, B))).astype('f')
    row = np.zeros((T + 1, B), np.int32)
    inputs = Inputs(observation, row, reward, row.astype(bool))
    ones = np.ones((T, B), np.float32)
    trajectory = Trajectory(inputs, row[:-1], np.log(ones / 3), ones, ones.astype(bool), {})
    optimiser, h = optax.set_to_zero(), learner.Hyperparameters(popart=0.1)
    params = jax.jit(agent.init)(jax.random.key(0), {}, inputs)['params']
    state = learner.start(params, optimiser, tasks)

    @jax.jit
    def values(state):
        _, outputs = forward(agent, state.params, {}, inputs)
        return popart.unnormalise(state.statistics, outputs.value, task)

    step = jax.jit(lambda state: learner.update(agent, optimiser, h, state, trajectory)[0])
    before = values(state)
    for _ in range(3):
        state = step(state)
    sigma = popart.sigma(state.statistics)
    assert sigma[0] < 0.95
    assert sigma[1] > 100
    np.testing.assert_allclose(values(state), before, rtol=1e-4, atol=1e-4)


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
    left = (1 - beta) ** updates
    mean, square = np.mean(v, dtype=np.float64), np.mean(v.astype(np.float64) ** 2)
    mu, nu = (1 - left) * mean, left + (1 - left) * square
    np.testing.assert_allclose(got.mu, [0, mu, 0], rtol=1e-4)
    np.testing.assert_allclose(popart.sigma(got), [1, np.sqrt(nu - mu**2), 1], rtol=1e-4)


def test_a_mean_of_many_sigmas_does_not_cost_sigma_its_precision():
    """ν − μ² in f32 would not move at all here: a step of ν is below its last digit."""
    v = np.array([99.7, 100.3] * 50, np.float32)
    start = Statistics(jnp.array([100.0]), jnp.array([1.0]))

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
    old = Statistics(np.array([0.1, 0.2, 0.3], 'f'), np.array([0.7, 0.8, 0.9], 'f'))
    got = update(old, v, task, np.array([1, 1, 0, 0], bool), beta=0.5)
    for before, after in zip(old, got, strict=True):
        np.testing.assert_array_equal(after[1:], before[1:])
        assert after[0] != before[0]


def test_sigma_stays_within_its_bounds():
    variance = np.array([-1e-9, 0, 1e-20, 4, 1e20], np.float32)
    sigma = popart.sigma(Statistics(np.zeros(5, np.float32), variance))
    np.testing.assert_allclose(sigma, [1e-4, 1e-4, 1e-4, 2, 1e6], rtol=1e-6)


def test_normalise_undoes_unnormalise():
    statistics = Statistics(np.array([3.0, -1], 'f'), np.array([4.0, 4], 'f'))
    task, v = np.array([0, 1, 1]), np.array([1.0, 2, 3], 'f')
    normalised = popart.normalise(statistics, v, task)
    np.testing.assert_allclose(normalised, [-1, 1.5, 2], rtol=1e-6)
    np.testing.assert_allclose(popart.unnormalise(statistics, normalised, task), v, rtol=1e-6)
