import os
import signal

import jax
import numpy as np
import pytest

from mi.config import UserError
from mi.rl import remote
from mi.rl.threads import Actors
from mi.rl.worker import Policy, Worker
from tests.rl.catch_late import CatchLate, Knows
from tests.rl.test_worker import learnt

ray = pytest.importorskip('ray', reason='the extra: pip install multiplicative-interactions[ray]')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', autouse=True)
def _cluster():
    os.environ['PYTHONPATH'] = os.getcwd()  # of the processes, for the package `tests`
    remote.start()
    yield
    ray.shutdown()


def make(**options):
    def maker(birth=0):
        del birth
        agent = Knows()
        groups = [CatchLate(**options)]
        return Worker(groups, Policy(agent), 25, jax.random.key(0))

    return maker


def test_what_comes_back_is_what_a_worker_here_has():
    here = make(seed=3)().collect({})
    far = remote.Remote(make(seed=3))
    try:
        there = far.collect(remote.share({}))
    finally:
        far.close()
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(learnt(there[0][0]).baseline, 0, atol=1e-9)


def test_a_killed_actor_is_replaced_and_the_learner_goes_on():
    workers = []

    def maker():
        workers.append(remote.Remote(make()))
        return workers[-1]

    with Actors([maker], {}, 0, 1, 120.0, share=remote.share) as running:
        running.get()
        before = workers[0].pid()
        os.kill(before, signal.SIGKILL)
        for _ in range(4):
            assert running.get().trajectory.action.shape == (25, 4)
        assert workers[0].pid() != before


def test_a_replacement_is_told_that_it_is_one():
    def maker(birth):
        return make(seed=birth)()

    far = remote.Remote(maker)
    try:
        params = remote.share({})
        far.collect(params)
        os.kill(far.pid(), signal.SIGKILL)
        there = far.collect(params)
    finally:
        far.close()
    here = make(seed=1)().collect({})
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_an_environment_raises_is_raised_here():
    far = remote.Remote(make(fails_at=3))
    with pytest.raises(RuntimeError, match='the ball is lost'):
        far.collect(remote.share({}))
    far.close()


def test_an_actor_that_cannot_live_ends_the_run():
    def dies(birth):
        os._exit(1)

    far = remote.Remote(dies)
    with pytest.raises(UserError, match='an actor died 3 times'):
        far.collect(remote.share({}))
