import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.config import UserError
from mi.rl import (
    factory,
    loss,
    popart,
)
from mi.rl import (
    trajectory as rl_trajectory,
)
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.threads import Actors
from mi.rl.actors.worker import Policy, Worker, concatenate_trajectories
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.jax.catch import Catch
from mi.rl.fused import rollout
from tests import prng
from tests.rl import test_networks
from tests.rl.catch_late import GAMMA, CatchLate, Knows
from tests.rl.test_train import tiny

AGENT = Knows()


@jax.jit
def learnt(trajectory, shift=0):
    """Loss terms of the exact values on a trajectory, with rewards shifted in time."""
    _, outputs = AGENT.apply({}, trajectory.carry, trajectory.inputs)
    rewards = trajectory.inputs.reward
    rewards = rewards.at[1:].set(jnp.roll(rewards[1:], shift, axis=0))
    trajectory = trajectory._replace(inputs=trajectory.inputs._replace(reward=rewards))
    h = loss.Hyperparameters(discount=GAMMA)
    return loss.impala_loss(outputs, trajectory, popart.init(1), h)[1]


def fused():
    environment = Catch()
    state = rollout.init_actor_state(environment, AGENT, 8, prng.key(0))
    unrolled = jax.jit(lambda state: rollout.unroll(environment, AGENT, 25, {}, state))(state)
    return unrolled[1:3]


def from_worker(*groups):
    worker = Worker(groups, Policy(AGENT), 25, prng.key(1))
    collected = worker.collect({})
    trajectory = concatenate_trajectories([trajectory for trajectory, _ in collected])
    return trajectory, jax.tree.map(lambda *a: sum(a), *[episodes for _, episodes in collected])


def at_once():
    return from_worker(Batched(Catch(), 4, 0), Batched(Catch(), 4, 1))


def one_step_later():
    return from_worker(CatchLate(4, 0), CatchLate(4, 1))


def from_threads():
    def maker(seed):
        return Worker([CatchLate(4, seed)], Policy(AGENT), 25, prng.key(1))

    makers = [functools.partial(maker, 0), functools.partial(maker, 1)]
    with Actors(makers, {}, version=0, capacity=1, timeout=60.0) as actors:
        items = {}
        while len(items) < 2:  # the first of each: only they begin with an episode
            item = actors.get()
            if item.trajectory.inputs.is_first[0].all():
                items[item.trajectory.inputs.observation['grid'].tobytes()] = item
    trajectory = concatenate_trajectories([item.trajectory for item in items.values()])
    return trajectory, jax.tree.map(lambda *a: sum(a), *[i.episodes for i in items.values()])


@pytest.mark.parametrize('collected', [fused, at_once, one_step_later, from_threads])
def test_exact_values_and_their_own_policy_leave_nothing_to_learn(collected):
    trajectory, episodes = collected()
    assert trajectory.action.shape == (25, 8)
    assert float(episodes.number.sum()) == 8 * 2
    assert float(episodes.lengths.sum()) == 8 * 2 * 9
    assert (np.asarray(trajectory.discount) == 0).sum() == 8 * 2
    ignored = 8 * 2 if collected in (one_step_later, from_threads) else 0
    assert (~np.asarray(trajectory.valid)).sum() == ignored
    exact = learnt(trajectory)
    np.testing.assert_allclose(exact.baseline, 0, atol=1e-9)
    np.testing.assert_allclose(exact.advantage, 0, atol=1e-5)
    np.testing.assert_allclose(exact.policy, 0, atol=1e-5)
    for shift in (1, -1):
        assert (learnt(trajectory, shift).baseline > 0.1).all()


def test_trajectories_follow_each_other():
    """The last row of one is the first of the next, and so is the agent's state."""
    worker = Worker([CatchLate(3, 5)], Policy(AGENT), 7, prng.key(1))
    (first, _), (second, _) = worker.collect({})[0], worker.collect({})[0]
    for a, b in zip(jax.tree.leaves(first.inputs), jax.tree.leaves(second.inputs), strict=True):
        np.testing.assert_array_equal(a[-1], b[0])
    np.testing.assert_array_equal(first.carry['count'], 0)
    np.testing.assert_array_equal(second.carry['count'], 7)
    [(_, returned)] = worker.collect({})
    assert float(returned.number.sum()) == 3  # steps 15 to 21 of 9 each and one ignored


def test_a_worker_closes_its_environments():
    groups = [CatchLate(), CatchLate()]
    Worker(groups, Policy(AGENT), 3, prng.key(1)).close()
    assert all(group.closed for group in groups)


def test_groups_take_turns():
    """Between the send of a group and its recv the other one is served."""
    log = []

    class Logged(CatchLate):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def send(self, actions):
            log.append(('send', self.name))
            super().send(actions)

        def recv(self):
            log.append(('recv', self.name))
            return super().recv()

    worker = Worker([Logged('a'), Logged('b')], Policy(AGENT), 2, prng.key(0))
    worker.collect({})
    turns = [('send', 'a'), ('send', 'b'), ('recv', 'a')]
    assert log[:3] == turns
    assert log[3:5] == [('send', 'a'), ('recv', 'b')]


def test_an_instruction_is_encoded_where_it_or_the_parameters_are_new():
    """The same as without memory, whether few, many, all or no rows begin an episode."""
    agent = test_networks.make(source='instruction', core=None)
    rng, rows, steps = np.random.default_rng(0), 24, 6
    many = jax.tree.map(lambda a: np.repeat(a, 8, axis=1), test_networks.inputs(length=steps))
    first = rng.random((steps, rows)) < np.array([1, 0, 0.1, 0.5, 0, 0])[:, None]
    first[2, :2] = True
    tokens = rng.integers(1, test_networks.VOCABULARY, (steps, rows, 4))
    for t in range(1, steps):
        tokens[t] = np.where(first[t][:, None], tokens[t], tokens[t - 1])
    observation = {**many.observation, 'instruction': tokens.astype(np.int32)}
    given = many._replace(observation=observation, is_first=first)
    init = jax.jit(agent.init)
    params = [init(prng.key(i), {}, given)['params'] for i in range(2)]
    policy, reference = Policy(agent), jax.jit(functools.partial(rollout.act, agent))
    acting = policy.init(rows, prng.key(2))
    compared = set()
    for t in range(steps):
        now, row = params[t > 3], jax.tree.map(lambda a, t=t: a[t], given)
        key, of_actions = jax.random.split(acting.key)
        _, action, log_prob = reference(now, {}, row, of_actions)
        acting, *measured = policy(now, acting, row, has_new_params=t == 4)
        np.testing.assert_array_equal(measured[0], action)
        np.testing.assert_allclose(measured[1], log_prob, rtol=1e-5)
        assert (jax.random.key_data(acting.key) == jax.random.key_data(key)).all()
        compared.add(float(log_prob[0]))
    assert len(compared) == steps


def test_an_instruction_may_change_within_an_episode():
    """Actors see the newest one, and so does the learner, where the columns have few and many."""
    words = 6  # more than `MAX_INSTRUCTIONS`: else every row is encoded anyway
    observation = dict(test_networks.GRID.observation)
    observation['instruction'] = jax.ShapeDtypeStruct((words,), jnp.int32)
    spec = dataclasses.replace(test_networks.GRID, observation=observation)
    agent = test_networks.make(spec, source='instruction', sites=('instruction', 'readout'))
    steps, rows = 12, 3
    given = test_networks.inputs(length=steps)
    rng = np.random.default_rng(0)
    init, one = jax.jit(agent.init), jax.jit(agent.apply)
    carry = agent.initial_carry(rows)
    for changes in ({4, 9}, set(range(1, steps))):
        tokens = rng.integers(1, test_networks.VOCABULARY, (steps, rows, words)).astype(np.int32)
        for t in range(1, steps):
            tokens[t] = tokens[t] if t in changes else tokens[t - 1]
        first = np.zeros((steps, rows), bool)
        first[0] = True
        observation = {**given.observation, 'instruction': tokens}
        inputs = given._replace(observation=observation, is_first=first)
        params = init(prng.key(0), carry, inputs)['params']
        learner = one({'params': params}, carry, inputs)[1]
        policy, state = Policy(agent), carry
        acting = policy.init(rows, prng.key(1))
        for t in range(steps):
            row = jax.tree.map(lambda a, t=t: a[t], inputs)
            state, truth = one({'params': params}, state, jax.tree.map(lambda a: a[None], row))
            np.testing.assert_allclose(learner.logits[t], truth.logits[0], rtol=1e-4, atol=1e-5)
            acting, action, log_prob = policy(params, acting, row)
            expected = rl_trajectory.compute_log_prob(truth.logits[0], action)
            np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)


def test_the_worker_that_replaces_a_dead_one_has_other_episodes():
    config = tiny(**{'train.topology': 'threads'})
    firsts = []
    for birth in (0, 0, 1):
        worker = actors_loop.make_worker(config, 0, 0, birth=birth)
        params = factory.init_params(factory.build_agent(config, Catch.spec), prng.key(0))
        firsts.append(worker.collect(params)[0][0])
        worker.close()
    for a, b in zip(*map(jax.tree.leaves, firsts[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (firsts[0].action != firsts[2].action).any()
    assert (firsts[0].inputs.observation['grid'] != firsts[2].inputs.observation['grid']).any()


def test_an_episode_that_is_cut_is_counted():
    """Its return and length too, though its discount stays 1."""

    class Cut(CatchLate):
        def recv(self):
            step = super().recv()
            return step._replace(discount=np.ones(self.batch, np.float32))

    _, episodes = from_worker(Cut(4, 0))
    _, terminated = from_worker(CatchLate(4, 0))
    assert float(episodes.number.sum()) == 4 * 2
    assert float(episodes.lengths.sum()) == 4 * 2 * 9
    for a, b in zip(episodes, terminated, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('what', ['reward', 'discount', 'features'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_an_environment_that_returns_what_is_not_finite_is_named(what, value):
    class Broken(CatchLate):
        def __init__(self):
            super().__init__()
            self.spec = dataclasses.replace(self.spec, tasks=('one', 'other'))

        def recv(self):
            step = super().recv()
            number = np.zeros((4, 2), np.float32)
            if self._steps == 3:
                number[2, 1] = value
            task = np.array([0, 0, 1, 0], np.int32)
            observation = {**step.observation, 'task': task}
            if what == 'features':
                return step._replace(observation={**observation, 'features': number})
            return step._replace(observation=observation, **{what: number[:, 1]})

    worker = Worker([Broken()], Policy(AGENT), 10, prng.key(0))
    said = f"environment catch, task 'other', returned a .*{what}.* of {value}"
    with pytest.raises(UserError, match=said):
        worker.collect({})
