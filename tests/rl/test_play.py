import dataclasses

import jax
import numpy as np
import pytest

from mi.config import UserError
from mi.rl import evaluate
from mi.rl.actors.worker import Policy
from mi.rl.envs.jax.catch import Catch
from mi.rl.play import Limits, StoppedError, Watched, divide_episodes, play
from tests import prng
from tests.rl.catch_late import CatchLate, Knows

POLICY = Policy(Knows())


class Counts:
    """Rows whose episodes have a length of their own, or never end; it can leave rows alone.

    The return of an episode is its length; `taken` counts the steps of each row.
    """

    def __init__(self, tasks, lengths, skips=True):
        names = tuple(f'task {i}' for i in range(max(tasks) + 1))
        self.spec = dataclasses.replace(Catch.spec, tasks=names)
        self.batch = len(tasks)
        self._tasks, self._lengths = np.array(tasks, np.int32), np.array(lengths, float)
        self.taken = np.zeros(self.batch, int)
        if skips:
            self.skip = self._skip

    def reset(self):
        self._time, self._idle = np.zeros(self.batch), np.zeros(self.batch, bool)
        return self._catch('reset')

    def _skip(self, rows):
        self._idle = rows.copy()

    def send(self, actions):
        pass

    def recv(self):
        return self._catch('recv')

    def close(self):
        pass

    def _catch(self, method):
        step = CatchLate(self.batch).reset()
        observation = {**step.observation, 'task': self._tasks}
        step = step._replace(observation=observation)
        if method == 'reset':
            return step
        self.taken += ~self._idle
        was_last = self._time >= self._lengths
        self._time = np.where(self._idle, self._time, np.where(was_last, 0, self._time + 1))
        is_last = ~self._idle & (self._time >= self._lengths)
        played = ~self._idle & ~was_last
        return step._replace(
            reward=played.astype(np.float32),
            discount=1 - is_last.astype(np.float32),
            is_first=was_last,
            is_last=is_last,
        )


def played_by(pool, episodes, stops=lambda: False, **limits):
    return play(pool, POLICY, {}, prng.key(0), Limits(episodes, **limits), stops)


@pytest.mark.parametrize(
    ('tasks', 'episodes', 'share'),
    [
        ((0, 0, 0, 1), 6, [2, 2, 2, 6]),
        ((0, 1, 0, 1), 3, [2, 2, 1, 1]),
        ((0, 1), 2, [2, 2]),
        ((0, 0, 0, 1), 2, [1, 1, 0, 2]),
    ],
)
def test_every_task_is_played_as_often_as_is_asked_for(tasks, episodes, share):
    assert divide_episodes(np.array(tasks), 2, episodes).tolist() == share
    played = played_by(Counts(tasks, [3] * len(tasks)), episodes)
    assert [len(returns) for returns in played.returns] == [episodes, episodes]
    summary = evaluate.summarize(Counts(tasks, [3] * 4).spec, *played[:3])
    assert summary['episodes_per_task'] == episodes


def test_only_the_rows_that_play_are_stepped():
    """One episode a row takes as many steps as the episodes have, however unlike they are."""
    pool = Counts((0, 0, 1, 1), (2, 5, 11, 40))
    played = played_by(pool, 2)
    assert played.steps_needed == played.steps_taken == 2 + 5 + 11 + 40
    assert pool.taken.tolist() == [2, 5, 11, 40]
    assert [lengths.tolist() for lengths in played.length] == [[2, 5], [11, 40]]
    assert [returns.tolist() for returns in played.returns] == [[2, 5], [11, 40]]


def test_rows_that_cannot_be_left_alone_are_stepped_and_not_counted():
    pool = Counts((0, 0), (2, 11), skips=False)
    played = played_by(pool, 2)
    assert (played.steps_needed, played.steps_taken) == (13, 22)
    assert played.returns[0].tolist() == [2, 11]


def test_an_episode_that_never_ends_is_cut_at_the_most_steps():
    played = played_by(Counts((0, 0, 1), (3, np.inf, 7)), 2, steps=20)
    assert played.cut == 1
    assert played.length[0].tolist() == [3, 20]
    assert played.returns[0].tolist() == [3, 20]
    assert not played.success[0].any()
    assert played.length[1].tolist() == [7, 7]


def test_an_evaluation_ends_after_its_seconds():
    played = played_by(Counts((0, 0, 1), (1, np.inf, np.inf)), 2, steps=10**9, seconds=0.2)
    assert played.cut == 2
    assert [len(lengths) for lengths in played.length] == [2, 1]


def test_a_run_that_is_to_end_ends_its_evaluation():
    asked = iter([False] * 5 + [True] * 100)
    pool = Counts((0,), (np.inf,))
    with pytest.raises(StoppedError):
        played_by(pool, 1, stops=lambda: next(asked))
    assert pool.taken.tolist() == [5]


@pytest.mark.parametrize('is_stopped', [True, False])
def test_an_environment_that_hangs_is_left_behind(is_stopped):
    hanging = CatchLate(hangs_at=3)
    pool = Watched(hanging, 60.0 if is_stopped else 0.5)
    if is_stopped:
        pool.stops = lambda: hanging._steps == 3
    error = StoppedError if is_stopped else UserError
    with pytest.raises(error, match=None if is_stopped else r'raise `timeout`'):
        played_by(pool, 1, stops=pool.stops)
    pool.close()
    assert not hanging.closed  # it would wait for the step


def test_what_is_watched_is_what_it_was():
    plain, watched = CatchLate(seed=1), Watched(CatchLate(seed=1), 60.0)
    for method in ('reset', 'recv', 'recv'):
        for pool in (plain, watched):
            pool.send(np.ones(4, int))
        a, b = getattr(plain, method)(), getattr(watched, method)()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
    watched.close()
    assert watched._pool.closed
    failing = Watched(CatchLate(fails_at=1), 60.0)
    failing.reset()
    with pytest.raises(RuntimeError, match='the ball is lost'):
        failing.recv()
    failing.close()
