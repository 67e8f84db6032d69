import threading
import time

import numpy as np
import pytest

from mi.config import UserError
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.threads import Actors, QueueItem
from mi.rl.actors.worker import Policy, Worker
from mi.rl.trajectory import Episodes
from tests import prng
from tests.rl.catch_late import CatchLate, Knows
from tests.rl.test_train import tiny

AGENT = Knows()
POLICY = Policy(AGENT)


def worker(**options):
    return lambda: Worker([CatchLate(**options)], POLICY, 5, prng.key(0))


class Counts:
    """A worker whose trajectories say which parameters it was given."""

    def __init__(self):
        self.collected, self.closed = 0, False

    def collect(self, params):
        self.collected += 1
        return [(params, Episodes(*np.zeros((4, 1))))]

    def close(self):
        self.closed = True


def actors(*makers, capacity=2, timeout=30.0):
    return Actors(makers, {}, 0, capacity, timeout)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_trajectories_of_all_workers_arrive():
    shapes = set()

    def both():
        shapes.add(running.get().trajectory.action.shape)
        return shapes == {(5, 2), (5, 3)}

    with actors(worker(batch=2), worker(batch=3)) as running:
        until(both)
    assert not [t for t in threading.enumerate() if t.name.startswith('actor')]


def test_a_full_queue_holds_the_workers_back():
    counting = Counts()
    with actors(lambda: counting, capacity=3) as running:
        until(lambda: running.count_waiting() == 3)
        time.sleep(0.5)
        assert counting.collected == 4  # three in the queue, one in its hands
        for _ in range(4):
            running.get()
        until(lambda: counting.collected == 8)
    assert counting.closed


def test_new_parameters_are_used_from_the_next_trajectory_on():
    with Actors([Counts], 'old', 7, 1, 30.0) as running:
        assert running.get()[::2] == ('old', 7)
        running.publish('new', 8)
        got = [running.get() for _ in range(4)]
    assert (got[-1].trajectory, got[-1].version) == ('new', 8)
    assert [item.version for item in got] == sorted(item.version for item in got)


def test_what_a_worker_raises_ends_the_run():
    with (
        pytest.raises(RuntimeError, match='the ball is lost'),
        actors(worker(), worker(fails_at=12)) as running,
    ):
        for _ in range(1000):
            running.get()


def test_what_a_worker_raises_at_once_ends_the_run():
    def fails():
        raise UserError('no such environment')

    with pytest.raises(UserError, match='no such environment'), actors(fails) as running:
        running.get()


def test_a_hung_environment_ends_the_run():
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=r'1 actors: expected a trajectory within 1 s'),
        actors(worker(hangs_at=8), timeout=1.0) as running,
    ):
        for _ in range(1000):
            running.get()
    assert time.monotonic() - began < 60  # the hour that it sleeps is not waited for


def test_a_run_that_is_to_end_waits_for_no_trajectory():
    with actors(worker(hangs_at=2), timeout=600.0) as running:
        assert running.get(stops=lambda: True) is None


def test_trajectories_of_old_parameters_are_dropped_and_counted():
    """The lag is how many updates older the parameters are: as many as max_lag may be learned."""
    config = tiny(**{'actors.max_lag': 3, 'train.batch': 8, 'actors.batch': 4})

    class Queue:
        def __init__(self, versions):
            self.versions = versions

        def get(self, stops):
            version = self.versions.pop(0)
            return QueueItem(version, Episodes(*np.zeros((4, 1))), version, 0.0)

    waiting = Queue([4, 7, 6, 10, 9])
    window = actors_loop.Window()
    items = actors_loop.take_batch(config, waiting, 10, window, lambda: False)
    assert [item.version for item in items] == [7, 10]
    assert (window.dropped, window.lags) == (2, [3, 0])
    assert waiting.versions == [9]
