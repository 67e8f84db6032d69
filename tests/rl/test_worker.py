import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.rl import actor, loss, popart
from mi.rl.envs.batched import Batched
from mi.rl.envs.catch import Catch
from mi.rl.worker import Worker, compile_policy, joined
from tests.rl.catch_late import GAMMA, CatchLate, Knows

AGENT = Knows()


@jax.jit
def learnt(trajectory, shift=0):
    """Loss terms of the exact values on a trajectory, with rewards shifted in time."""
    _, outputs = AGENT.apply({}, trajectory.carry, trajectory.inputs)
    reward = jnp.roll(trajectory.inputs.reward[1:], shift, axis=0)
    T, B = reward.shape
    one = functools.partial(loss.impala, statistics=popart.init(1))
    return jax.vmap(one, in_axes=1)(
        outputs.logits[:-1],
        outputs.value,
        jnp.zeros((T + 1, B), jnp.int32),
        trajectory.action,
        trajectory.log_prob,
        reward,
        GAMMA * trajectory.discount,
        trajectory.valid,
    )


def fused():
    environment = Catch()
    state = actor.start(environment, AGENT, 8, jax.random.key(0))
    unrolled = jax.jit(lambda state: actor.unroll(environment, AGENT, 25, {}, state))(state)
    return unrolled[1:]


def from_worker(*groups):
    worker = Worker(groups, AGENT, compile_policy(AGENT), 25, jax.random.key(1))
    collected = worker.collect({})
    trajectory = joined([trajectory for trajectory, _ in collected])
    return trajectory, jax.tree.map(lambda *a: sum(a), *[episodes for _, episodes in collected])


def at_once():
    return from_worker(Batched(Catch(), 4, 0), Batched(Catch(), 4, 1))


def one_step_later():
    return from_worker(CatchLate(4, 0), CatchLate(4, 1))


@pytest.mark.parametrize('collected', [fused, at_once, one_step_later])
def test_exact_values_and_their_own_policy_leave_nothing_to_learn(collected):
    trajectory, episodes = collected()
    assert trajectory.action.shape == (25, 8)
    assert float(episodes.number.sum()) == 8 * 2
    assert float(episodes.lengths.sum()) == 8 * 2 * 9
    assert (np.asarray(trajectory.discount) == 0).sum() == 8 * 2
    ignored = 0 if collected is not one_step_later else 8 * 2
    assert (~np.asarray(trajectory.valid)).sum() == ignored
    exact = learnt(trajectory)
    np.testing.assert_allclose(exact.baseline, 0, atol=1e-9)
    np.testing.assert_allclose(exact.advantage, 0, atol=1e-5)
    np.testing.assert_allclose(exact.policy, 0, atol=1e-5)
    for shift in (1, -1):
        assert (learnt(trajectory, shift).baseline > 0.1).all()


def test_trajectories_follow_each_other():
    """The last row of one is the first of the next, and so is the agent's state."""
    worker = Worker([CatchLate(3, 5)], AGENT, compile_policy(AGENT), 7, jax.random.key(1))
    (first, _), (second, _) = worker.collect({})[0], worker.collect({})[0]
    for a, b in zip(jax.tree.leaves(first.inputs), jax.tree.leaves(second.inputs), strict=True):
        np.testing.assert_array_equal(a[-1], b[0])
    np.testing.assert_array_equal(first.carry['count'], 0)
    np.testing.assert_array_equal(second.carry['count'], 7)
    [(_, returned)] = worker.collect({})
    assert float(returned.number.sum()) == 3  # steps 15 to 21 of 9 each and one ignored


def test_a_worker_closes_its_environments():
    groups = [CatchLate(), CatchLate()]
    Worker(groups, AGENT, compile_policy(AGENT), 3, jax.random.key(1)).close()
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

    worker = Worker([Logged('a'), Logged('b')], AGENT, compile_policy(AGENT), 2, jax.random.key(0))
    worker.collect({})
    turns = [('send', 'a'), ('send', 'b'), ('recv', 'a')]
    assert log[:3] == turns
    assert log[3:5] == [('send', 'a'), ('recv', 'b')]
