import os
import signal

import jax
import numpy as np
import pytest

from mi.config import UserError
from mi.rl.actors import ray as ray_actors
from mi.rl.actors.threads import Actors
from mi.rl.actors.worker import Policy, Worker
from tests import prng
from tests.rl.catch_late import CatchLate, Knows
from tests.rl.test_worker import learnt

ray = pytest.importorskip('ray', reason="the extra: pip install -e '.[ray]'")
pytestmark = pytest.mark.slow
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(scope='module', autouse=True)
def received():
    """A cluster, and the signals that came to handlers which were set before it was started."""
    arrived = []
    before = {s: signal.signal(s, lambda number, frame: arrived.append(number)) for s in SIGNALS}
    try:
        with pytest.MonkeyPatch.context() as patch:
            # The processes of the cluster import the package `tests`.
            patch.setenv('PYTHONPATH', os.getcwd(), prepend=os.pathsep)
            ray_actors.init_ray()
            yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ray.shutdown()


def make(**options):
    def maker(birth=0):
        del birth
        agent = Knows()
        groups = [CatchLate(**options)]
        return Worker(groups, Policy(agent), 25, prng.key(0))

    return maker


def test_what_comes_back_is_what_a_worker_here_has():
    here = make(seed=3)().collect({})
    far = ray_actors.Remote(make(seed=3))
    try:
        there = far.collect(ray_actors.share({}))
    finally:
        far.close()
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(learnt(there[0][0]).baseline, 0, atol=1e-9)


def test_a_killed_actor_is_replaced_and_the_learner_goes_on():
    workers = []

    def maker():
        workers.append(ray_actors.Remote(make()))
        return workers[-1]

    with Actors([maker], {}, 0, 1, 120.0, share=ray_actors.share) as running:
        running.get()
        before = workers[0].pid()
        os.kill(before, signal.SIGKILL)
        for _ in range(4):
            assert running.get().trajectory.action.shape == (25, 4)
        assert workers[0].pid() != before


def test_a_replacement_is_told_that_it_is_one():
    def maker(birth):
        return make(seed=birth)()

    far = ray_actors.Remote(maker)
    try:
        params = ray_actors.share({})
        far.collect(params)
        os.kill(far.pid(), signal.SIGKILL)
        there = far.collect(params)
    finally:
        far.close()
    here = make(seed=1)().collect({})
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_an_environment_raises_is_raised_here():
    far = ray_actors.Remote(make(fails_at=3))
    with pytest.raises(RuntimeError, match='the ball is lost'):
        far.collect(ray_actors.share({}))
    far.close()


def test_an_actor_that_cannot_live_ends_the_run():
    def dies(birth):
        os._exit(1)

    far = ray_actors.Remote(dies)
    with pytest.raises(UserError, match='an actor died 3 times'):
        far.collect(ray_actors.share({}))


def test_signals_come_to_the_handlers_that_were_set_before_ray(received):
    received.clear()
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert received == list(SIGNALS)


def test_an_environment_that_cannot_be_made_is_one_line_and_no_death(capfd):
    def refuses(birth):
        raise UserError(f'no such environment at birth {birth}')

    far = ray_actors.Remote(refuses)
    with pytest.raises(UserError) as raised:
        far.collect(ray_actors.share({}))
    assert str(raised.value) == 'no such environment at birth 0'
    assert 'died' not in capfd.readouterr().err
    far.close()


def test_more_actors_than_cpus_all_work():
    cpus = int(ray.cluster_resources()['CPU'])
    number = cpus + 2
    share = ray_actors.compute_cpus_per_actor(number)
    assert 0 < share < 1
    far = [ray_actors.Remote(make(), share) for _ in range(number)]
    try:
        assert len({actor.pid() for actor in far}) == number
    finally:
        for actor in far:
            actor.close()


def test_an_actor_that_finds_no_cpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(ray_actors, 'PATIENCE', 0.2)
    monkeypatch.setattr(ray, 'get', lambda _: None)  # of a worker that is never made
    far = ray_actors.Remote(make(), 1000.0)
    far.collect(ray_actors.share({}))
    assert 'an actor waits for 1000 of a CPU' in capsys.readouterr().err
    far.close()


@pytest.mark.parametrize(
    ('number', 'free', 'share'),
    [
        *((2, [2.0], 1.0), (3, [2.0], 0.5), (4, [2.0], 0.5), (5, [2.0], 0.3333)),
        *((3, [1.0, 1.0], 0.5), (4, [0.5, 3.5], 0.5), (4, [4.0, 0.0], 1.0)),
    ],
)
def test_as_many_actors_fit_on_the_nodes_as_are_asked_for(number, free, share):
    assert ray_actors.divide_cpus(number, free) == share
    assert sum(int(cpus / share) for cpus in free) >= number


def test_a_cluster_that_is_full_is_refused():
    with pytest.raises(UserError, match=r'`num_actors` = 3: expected at most 64'):
        ray_actors.divide_cpus(3, [0.01])
