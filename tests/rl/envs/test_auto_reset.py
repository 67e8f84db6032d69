import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mi.config import UserError
from mi.rl import (
    envs,
    evaluate,
    learner,
    loss,
    popart,
)
from mi.rl.actors.threads import Actors
from mi.rl.actors.worker import Policy, Worker
from mi.rl.agent import Outputs
from mi.rl.envs import auto_reset
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.spec import Transition
from mi.rl.fused import loop as fused
from mi.rl.fused import rollout
from mi.training import sharding
from tests import prng
from tests.rl.ramp import GAMMA, LIMIT, PARAMS, RETURN, TASKS, Knows, Ramp
from tests.rl.test_train import tiny

T, B = 25, 6
STATISTICS = popart.init(3)._replace(
    mu=jnp.array([50.0, -70.0, 9.0]), variance=jnp.array([4.0, 900.0, 1e4])
)


def from_unroll(environment, agent):
    state = rollout.init_actor_state(environment, agent, B, prng.key(0))
    unroll = functools.partial(rollout.unroll, environment, agent, T)
    _, trajectory, episodes, counts = jax.jit(unroll)(PARAMS, state)
    assert counts.transitions == trajectory.valid.sum()
    return trajectory, episodes


def from_worker(environment, agent):
    worker = Worker([Batched(environment, B, 0)], Policy(agent), T, prng.key(1))
    return worker.collect(PARAMS)[0]


def from_threads(environment, agent):
    make = functools.partial(Worker, [Batched(environment, B, 0)], Policy(agent), T, prng.key(1))
    with Actors([make], PARAMS, version=0, capacity=1, timeout=60.0) as actors:
        item = actors.get()
    return item.trajectory, item.episodes


COLLECTED = pytest.mark.parametrize('collected', [from_unroll, from_worker, from_threads])


@functools.cache
def ramp(collected, terminates):
    """A trajectory and episodes, which no test changes."""
    return collected(Ramp(terminates), Knows(terminates))


def make_update(agent, discount=GAMMA, statistics=STATISTICS):
    """The learner's update on a trajectory with β = 1: μ is then the mean target of each task."""
    h = loss.Hyperparameters(discount=discount, popart=1.0)
    optimizer = optax.sgd(0.0)
    state = learner.LearnerState(PARAMS, optimizer.init(PARAMS), statistics)
    step = functools.partial(learner.update, agent, optimizer, h)
    return functools.partial(jax.jit(step), state)


@COLLECTED
@pytest.mark.parametrize('terminates', [False, True])
def test_exact_values_leave_nothing_to_learn_where_episodes_end(collected, terminates):
    """Truncated: from the last observation, with the core's state and the task's units there.

    Without bootstrapping, the last reward of 7 would be the whole target of the last step, not
    7 + 0.9 · 170 = 160.
    """
    agent = Knows(terminates, STATISTICS)
    trajectory, _ = collected(Ramp(terminates), agent)
    update = make_update(agent)
    _, measured = update(trajectory)
    np.testing.assert_allclose(measured['baseline'], 0, atol=1e-7)
    np.testing.assert_allclose(measured['advantage'], 0, atol=1e-4)
    inputs = trajectory.inputs
    late = inputs._replace(reward=np.roll(inputs.reward, 1, axis=0))
    assert update(trajectory._replace(inputs=late))[1]['baseline'] > 1e-4


def test_targets_of_a_constant_reward_are_10_up_to_the_limit():
    """γ = 0.9: Σ γ^j = 10 at every step, not 4.1, 3.4, 2.7, 1.9, 1 at the last five."""

    class Constant(Ramp):
        def step(self, state, action):
            state, transition = super().step(state, action)
            return state, transition._replace(reward=1.0)

    class Ten(Knows):
        def apply(self, variables, carry, inputs):
            carry, outputs = super().apply(variables, carry, inputs)
            return carry, outputs._replace(value=jnp.full_like(outputs.value, 10.0))

    for terminates, last in ((False, [10.0] * 5), (True, [4.0951, 3.439, 2.71, 1.9, 1.0])):
        agent = Ten()
        trajectory, _ = from_unroll(Constant(terminates), agent)
        outputs = Outputs(jnp.zeros((T + 1, B, 4)), jnp.full((T + 1, B), 10.0))
        h = loss.Hyperparameters(discount=GAMMA)
        _, terms = jax.jit(loss.impala_loss, static_argnums=3)(
            outputs, trajectory, popart.init(3), h
        )
        np.testing.assert_allclose(terms.targets[LIMIT - 5 : LIMIT], np.tile(last, (B, 1)).T, 1e-5)


@COLLECTED
@pytest.mark.parametrize('terminates', [False, True])
def test_episodes_are_counted_once_and_for_their_own_task(collected, terminates):
    trajectory, episodes = ramp(collected, terminates)
    period = LIMIT if terminates else LIMIT + 1  # with the step that is ignored
    assert episodes.number.sum() == B * (T // period)
    np.testing.assert_allclose(episodes.returns, episodes.number * RETURN * np.arange(1, 4))
    np.testing.assert_allclose(episodes.lengths, episodes.number * LIMIT)
    np.testing.assert_allclose(episodes.successes, episodes.number * np.array([0, 1, 0]))
    assert np.all(np.asarray(episodes.number) > 0)
    task = np.asarray(trajectory.inputs.observation['task'])
    assert (task[0] == np.arange(B) % 3).all()
    assert (task[period] != task[0]).any()  # another one is drawn at a reset


@COLLECTED
@pytest.mark.parametrize('terminates', [False, True])
def test_the_rows_of_an_episode(collected, terminates):
    """What is ignored, cut and first, step by step."""
    trajectory, _ = ramp(collected, terminates)
    period = LIMIT if terminates else LIMIT + 1
    step = np.arange(T)
    ignored = (step % period == LIMIT) & (not terminates)
    np.testing.assert_array_equal(trajectory.valid, np.tile(~ignored, (B, 1)).T)
    ended = (step % period == LIMIT - 1) & terminates
    np.testing.assert_array_equal(trajectory.discount, np.tile(1.0 - ended, (B, 1)).T)
    first = np.arange(T + 1) % period == 0
    np.testing.assert_array_equal(trajectory.inputs.is_first, np.tile(first, (B, 1)).T)
    task = np.asarray(trajectory.inputs.observation['task'])
    reward = np.where(ignored[:, None], 0, (step % period + 1)[:, None] * (task[:-1] + 1))
    np.testing.assert_array_equal(trajectory.inputs.reward[1:], reward)
    carry = {'time': np.zeros(B)}
    np.testing.assert_array_equal(trajectory.carry['time'], carry['time'])


def test_an_unroll_continues_where_the_one_before_ended():
    """Also on the last observation of an episode that was truncated."""
    environment, agent = Ramp(), Knows()
    state = rollout.init_actor_state(environment, agent, B, prng.key(0))
    whole = jax.jit(functools.partial(rollout.unroll, environment, agent, LIMIT + 5))(PARAMS, state)
    first = jax.jit(functools.partial(rollout.unroll, environment, agent, LIMIT))(PARAMS, state)
    second = jax.jit(functools.partial(rollout.unroll, environment, agent, 5))(PARAMS, first[0])
    assert not second[1].valid[0].any()
    for name in ('action', 'discount', 'valid'):
        parts = [getattr(run[1], name) for run in (first, second)]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole[1], name))
    np.testing.assert_array_equal(first[1].inputs.reward[-1], second[1].inputs.reward[0])
    assert first[2].number.sum() == whole[2].number.sum() == B
    assert second[2].number.sum() == 0


def test_what_both_terminates_and_truncates_has_terminated():
    class Both(Ramp):
        def step(self, state, action):
            state, transition = super().step(state, action)
            return state, transition._replace(terminated=transition.truncated)

    trajectory, episodes = from_unroll(Both(), Knows(True))
    assert trajectory.valid.all()
    assert (np.asarray(trajectory.discount)[LIMIT - 1 :: LIMIT] == 0).all()
    assert episodes.number.sum() == B * (T // LIMIT)


def test_every_action_is_drawn_with_a_key_of_its_own():
    agent = Knows()
    state = rollout.init_actor_state(Ramp(), agent, 1, prng.key(0))
    unroll = jax.jit(functools.partial(rollout.unroll, Ramp(), agent, 200))
    after, first, *_ = unroll(PARAMS, state)
    _, second, *_ = unroll(PARAMS, after)
    for trajectory in (first, second):
        counts = np.bincount(trajectory.action[:, 0], minlength=4)
        assert (counts > 25).all()  # 50 each, σ = 6
    assert (first.action != second.action).any()


@pytest.mark.parametrize('discount', [0.5, 1.0])
def test_the_learner_discounts_by_gamma(discount):
    """One step of reward r and V = 1 after it: the target is r + γ, and 1 + γ + γ² of three."""
    agent = Knows()

    class One(Knows):
        def apply(self, variables, carry, inputs):
            carry, outputs = super().apply(variables, carry, inputs)
            return carry, outputs._replace(value=jnp.ones_like(outputs.value))

    trajectory, _ = ramp(from_unroll, False)
    rows = jax.tree.map(lambda a: a[:2], trajectory._replace(inputs=None, carry={}))
    inputs = jax.tree.map(lambda a: a[:3], trajectory.inputs)
    short = rows._replace(inputs=inputs, carry=agent.initial_carry(B))
    state, _ = make_update(One(), discount, popart.init(3))(short)
    scale = np.arange(1, 4)
    last = 2 * scale + discount
    np.testing.assert_allclose(state.statistics.mu, (last + scale + discount * last) / 2, rtol=1e-6)


def play(environment, agent, each):
    """Episodes of one seed that draws its actions."""
    params = jax.tree.map(lambda a: jnp.asarray(a)[None], PARAMS)
    keys = evaluate.make_evaluation_keys([0], 0)
    simulation = evaluate.Simulation(environment, agent, sharding.make_mesh(1, 1))
    (played,) = evaluate.play_episodes(simulation, params, keys, each, False)
    return played


@pytest.mark.parametrize('terminates', [False, True])
def test_evaluation_plays_whole_episodes_of_each_task(terminates):
    """Tasks of returns 28, 56 and 84, four episodes of each."""
    played = play(Ramp(terminates), Knows(terminates), 4)
    returned, success, length = (np.stack(a) for a in played)
    np.testing.assert_array_equal(returned, np.tile(RETURN * np.arange(1, 4), (4, 1)).T)
    np.testing.assert_array_equal(success, np.tile([False, True, False], (4, 1)).T)
    np.testing.assert_array_equal(length, np.full((3, 4), LIMIT))
    scores = evaluate.summarize(Ramp().spec, *played)
    assert [scores[f'return/{task}'] for task in TASKS] == [28, 56, 84]
    assert (scores['success/two'], scores['success/three']) == (1, 0)


class Lottery(Ramp):
    """One step, of a reward drawn at the reset."""

    def reset(self, key, task):
        return {'prize': jax.random.normal(key), 'task': task}, self._observe(task)

    def step(self, state, action):
        seen = self._observe(state['task'])
        return state, Transition(seen, reward=state['prize'], terminated=jnp.array(True))


def test_evaluations_draw_other_episodes_at_every_step_and_seed(monkeypatch):
    monkeypatch.setitem(envs.JAX, 'lottery', lambda suite: Lottery())
    config = tiny(**{'env.name': 'lottery', 'eval.episodes': 5})
    with evaluate.Evaluation(config) as evaluation:
        returned = [
            evaluation(Knows(), PARAMS, step, seed)['']['return']
            for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
        ]
    assert returned[0] == returned[1]
    assert len(set(returned)) == 3

    class Written(list):
        def write(self, step, seed, split, values):
            self.append(values['return'])

    written = Written()
    params = jax.tree.map(lambda a: jnp.stack([a, a]), PARAMS)
    state = learner.LearnerState(params, opt_state=(), statistics=None)
    config = tiny(**{'seeds': (0, 1), 'eval.episodes': 5})
    for step in (1, 2):
        run = types.SimpleNamespace(config=config, step=step, should_stop=lambda recorded: False)
        mesh = sharding.make_mesh(2, 1)
        splits = fused.make_splits({'eval': Lottery()}, Knows(), state, run, mesh)
        evaluate.write_evaluations(splits, run, written, np.ones(2))
    assert len(set(written)) == 4


def test_evaluations_on_the_host_act_by_other_keys_at_every_step_and_seed(monkeypatch):
    def make_pool(suite, *, batch, seed):
        return Batched(Lottery(), batch, seed)

    rng_keys, real_play = [], evaluate.play

    def play_and_note(pool, policy, params, rng_key, *limits):
        rng_keys.append(tuple(jax.random.key_data(rng_key).tolist()))
        return real_play(pool, policy, params, rng_key, *limits)

    monkeypatch.setitem(envs.HOST, 'lottery_on_the_host', make_pool)
    monkeypatch.setattr(evaluate, 'play', play_and_note)
    config = tiny(**{'env.name': 'lottery_on_the_host', 'eval.episodes': 2})
    with evaluate.Evaluation(config) as evaluation:
        for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
            evaluation(Knows(), PARAMS, step, seed)
    assert rng_keys[0] == rng_keys[1] and len(set(rng_keys)) == 3


def test_episodes_differ_from_each_other():
    environment = Lottery()
    keys = jax.random.split(prng.key(0), 2)
    reset = jax.jit(jax.vmap(functools.partial(auto_reset.reset, environment)))
    state, _ = reset(keys, jnp.arange(2))
    step = jax.jit(jax.vmap(functools.partial(auto_reset.step, environment)))
    rewards, tasks = [], []
    for _ in range(300):
        state, result = step(state, jnp.zeros(2, jnp.int32))
        rewards.append(result.reward)
        tasks.append(result.observation['task'])
    assert len(np.unique(rewards)) == 600
    counts = np.bincount(np.ravel(tasks), minlength=3)
    assert (abs(counts - 200) < 60).all(), counts  # σ = 12


@pytest.mark.parametrize('episode', [1, LIMIT - 1])
def test_an_episode_longer_than_its_spec_says_is_refused(episode):
    said = f"Spec.episode = {episode} of environment 'ramp': expected the maximum length"
    environment, agent = Ramp(episode=episode), Knows()
    with pytest.raises(UserError, match=said):
        play(environment, agent, 2)
    with pytest.raises(UserError, match=said):
        from_worker(environment, agent)


def test_an_episode_that_never_ends_is_refused():
    class Endless(Ramp):
        def step(self, state, action):
            state, transition = super().step(state, action)
            return state, transition._replace(truncated=jnp.array(False))

    with pytest.raises(UserError, match=r'Spec\.episode = 7'):
        play(Endless(), Knows(), 2)


class Broken(Ramp):
    """A reward, or an observation, that is not finite after three steps."""

    def __init__(self, what):
        super().__init__()
        self._what = what

    def step(self, state, action):
        state, transition = super().step(state, action)
        wrong = jnp.where(state.time == 3, jnp.nan, 1.0)
        if self._what == 'reward':
            return state, transition._replace(reward=transition.reward * wrong)
        observation = {**transition.observation, 'features': wrong[None]}
        return state, transition._replace(observation=observation)


@pytest.mark.parametrize('what', ['reward', 'observation'])
def test_the_unroll_says_what_is_not_finite(what):
    agent = Knows()
    state = rollout.init_actor_state(Broken(what), agent, B, prng.key(0))
    *_, counts = jax.jit(functools.partial(rollout.unroll, Broken(what), agent, T))(PARAMS, state)
    named = {'reward': 'reward', 'observation': "observation 'features'"}[what]
    assert [name for name, value in counts.are_finite.items() if not value] == [named]
    with pytest.raises(UserError, match=f'environment ramp returned a {named} that is not finite'):
        fused._check_counts(Ramp().spec, jax.device_get(counts))
    *_, counts = jax.jit(functools.partial(rollout.unroll, Ramp(), agent, T))(PARAMS, state)
    fused._check_counts(Ramp().spec, jax.device_get(counts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('environment', 'said'),
    [(Ramp(episode=LIMIT - 1), r'Spec\.episode = 6'), (Broken('reward'), 'ramp returned a reward')],
)
def test_training_refuses_an_environment_that_contradicts_its_spec(
    tmp_path, monkeypatch, environment, said
):
    monkeypatch.setitem(envs.JAX, 'ramp', lambda suite: environment)
    with pytest.raises(UserError, match=said):
        fused.train(tiny(**{'env.name': 'ramp'}), str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'metrics.jsonl').read_text()
    assert not list((tmp_path / 'run').glob('checkpoints/0*'))
