"""A loop that plays whole episodes on the host for evaluation, within limits.

Each row plays a share of its task's episodes that is fixed in advance, so that short episodes are
not favored. A row that has played its share is skipped if the environment supports this
(`spec.SkipsRows`).
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mi.config import ArgumentError
from mi.rl.actors.worker import Policy
from mi.rl.agent import Inputs, Params
from mi.rl.envs.finite import check_finite
from mi.rl.envs.spec import HostEnvironment, Step

POLL = 0.1  # seconds between two checks of whether the run is to end


def never() -> bool:
    """Return False, so that nothing is stopped."""
    return False


class StoppedError(Exception):
    """Raised when the run should end before all episodes have been played."""


class Limits(NamedTuple):
    """Limits of an evaluation. An episode cut by a limit counts with its return so far.

    Attributes:
      episodes: number of episodes to complete in each task.
      steps: maximum number of steps in an episode.
      seconds: maximum duration of all episodes together.
    """

    episodes: int
    steps: int = 30_000
    seconds: float = 3600.0


class Played(NamedTuple):
    """The episodes that `play` has played.

    Attributes:
      returns, success, length: an array for each task, with an entry for each episode.
      cut: number of episodes that were cut by a limit.
      steps_needed: sum of the lengths of these episodes.
      steps_taken: number of steps that the environments took.
    """

    returns: list[np.ndarray]
    success: list[np.ndarray]
    length: list[np.ndarray]
    cut: int
    steps_needed: int
    steps_taken: int


def divide_episodes(tasks: np.ndarray, num_tasks: int, episodes: int) -> np.ndarray:
    """Return the number of episodes for each row, [B], such that each task has `episodes` in total.

    Args:
      tasks: task of each row, [B].
      num_tasks: number of tasks.
      episodes: number of episodes for each task.
    """
    row_episodes = np.zeros(len(tasks), np.int64)
    for task in range(num_tasks):
        task_rows = np.flatnonzero(tasks == task)
        row_episodes[task_rows] = episodes // len(task_rows)
        row_episodes[task_rows[: episodes % len(task_rows)]] += 1
    return row_episodes


def play(
    pool: HostEnvironment,
    policy: Policy,
    params: Params,
    rng_key: jax.Array,
    limits: Limits,
    stops: Callable[[], bool] = never,
) -> Played:
    """Play complete episodes of every task, unless a limit cuts them.

    Args:
      pool: environments, at least one for each task.
      policy: policy that selects the actions.
      params: parameters of the agent.
      rng_key: random key for the actions.
      limits: number of episodes per task, and limits on steps and time.
      stops: function that returns whether to abort, called before every step.

    Raises:
      StoppedError: if `stops` returns True.
      UserError: if a reward or an observation is not finite.
    """
    batch_size, action = pool.batch, jnp.zeros(pool.batch, jnp.int32)
    deadline = time.monotonic() + limits.seconds

    # Start an episode in every row.
    step, policy_state = pool.reset(), policy.init(batch_size, rng_key)
    check_finite(pool.spec, step)
    tally = _Tally(np.asarray(step.observation['task']), len(pool.spec.tasks), limits)
    skip = getattr(pool, 'skip', None)
    is_idle = np.zeros(batch_size, bool)

    # Play until every row has played its share.
    while (tally.remaining > 0).any():
        if stops():
            raise StoppedError

        # Skip rows that have played their share.
        if skip is not None and ((tally.remaining == 0) & ~is_idle).any():
            is_idle = tally.remaining == 0
            skip(is_idle)

        # Step the others.
        inputs = Inputs(step.observation, action, step.reward, step.is_first)
        policy_state, action, _ = policy(params, policy_state, inputs)
        prev_step = step
        pool.send(np.asarray(action))
        step = pool.recv()
        check_finite(pool.spec, step)
        tally.steps_taken += int((~is_idle).sum())
        tally.add(prev_step, step, is_late=time.monotonic() > deadline)
    return tally.summarize()


class _Tally:
    """A count of the episodes that each row has played and has yet to play.

    Attributes:
      remaining: number of episodes that each row has yet to play, [B].
      steps_taken: number of steps that the environments took.
    """

    def __init__(self, tasks: np.ndarray, num_tasks: int, limits: Limits):
        self.remaining = divide_episodes(tasks, num_tasks, limits.episodes)
        self.steps_taken = 0
        self._max_steps, self._num_cut = limits.steps, 0
        self._returns, self._lengths = np.zeros(len(tasks)), np.zeros(len(tasks), np.int64)
        # Return, success and length of each episode, by task.
        self._episodes: list[list[tuple[float, bool, int]]] = [[] for _ in range(num_tasks)]

    def add(self, prev_step: Step, step: Step, is_late: bool) -> None:
        """Add a step, and the episodes that end with it or are cut by a limit.

        Args:
          prev_step: the previous step.
          step: the step.
          is_late: whether the time limit has passed, so that running episodes are cut.
        """
        is_ignored = np.asarray(prev_step.is_last)
        self._returns = np.where(is_ignored, 0, self._returns + step.reward)
        self._lengths = np.where(is_ignored, 0, self._lengths + 1)

        # Which episodes ended, and which a limit cuts.
        remaining = self.remaining
        is_over = ~is_ignored & (np.asarray(step.is_last) | (np.asarray(step.discount) == 0))
        is_too_long = self._lengths >= self._max_steps
        is_cut = ~is_ignored & ~is_over & (remaining > 0) & is_too_long
        if is_late:
            is_cut = ~is_over & (remaining > 0) & (self._lengths > 0)
            remaining = np.where(is_over, np.minimum(remaining, 1), is_cut)

        # Count them for their tasks.
        tasks = np.asarray(prev_step.observation['task'])
        for row in np.flatnonzero((is_over | is_cut) & (remaining > 0)):
            success = bool(is_over[row] and step.success[row])
            episode = float(self._returns[row]), success, int(self._lengths[row])
            self._episodes[tasks[row]].append(episode)
        self._num_cut += int(is_cut.sum())

        # The environment continues an episode that was cut, so its row plays no more.
        remaining = np.where(is_over, np.maximum(remaining - 1, 0), remaining)
        self.remaining = np.where(is_cut, 0, remaining)
        self._returns[is_over], self._lengths[is_over] = 0, 0

    def summarize(self) -> Played:
        """Return all episodes so far."""
        returns, success, lengths = (
            [np.array([episode[column] for episode in episodes]) for episodes in self._episodes]
            for column in range(3)
        )
        steps_needed = int(sum(task_lengths.sum() for task_lengths in lengths))
        return Played(returns, success, lengths, self._num_cut, steps_needed, self.steps_taken)


class Watched:
    """A `HostEnvironment` with a timeout, which stops waiting when the run should end.

    A separate thread waits for the environment, so that the caller's thread can handle signals. If
    the environment hangs, both are abandoned.

    Args:
      pool: the environment.
      timeout: maximum duration of a step or reset, in seconds.
      stops: function that returns whether to abort.
    """

    def __init__(self, pool: HostEnvironment, timeout: float, stops: Callable[[], bool] = never):
        self.spec, self.batch = pool.spec, pool.batch
        self.stops = stops
        self._pool, self._timeout = pool, timeout
        self._is_abandoned = False
        self._calls: queue.SimpleQueue[Callable[[], Step] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Step | BaseException] = queue.SimpleQueue()
        if hasattr(pool, 'skip'):
            self.skip = pool.skip
        threading.Thread(target=self._serve, daemon=True, name='watched').start()

    def reset(self) -> Step:
        return self._wait_for(self._pool.reset)

    def send(self, actions: np.ndarray) -> None:
        self._pool.send(actions)

    def recv(self) -> Step:
        """Wait for the step that was sent, and return it.

        Raises:
          StoppedError: if the run should end before the step arrives.
          ArgumentError: if the step does not arrive within the timeout.
        """
        return self._wait_for(self._pool.recv)

    def close(self) -> None:
        """Close the environment, unless it hangs."""
        self._calls.put(None)
        if not self._is_abandoned:
            self._pool.close()

    def _wait_for(self, method: Callable[[], Step]) -> Step:
        """Call a method of the environment in the waiting thread, and wait for its result."""
        self._calls.put(method)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                result = self._results.get(timeout=min(POLL, self._timeout))
            except queue.Empty:
                is_late = time.monotonic() > deadline
                if not is_late and not self.stops():
                    continue
                self._is_abandoned = True
                if not is_late:
                    raise StoppedError from None
                raise ArgumentError(
                    f'{self.spec.name} did not finish a step within {self._timeout:g} s: it hangs '
                    f'or is slow. If it is slow, raise `timeout`'
                ) from None
            if isinstance(result, BaseException):
                raise result
            return result

    def _serve(self) -> None:
        while (method := self._calls.get()) is not None:
            try:
                self._results.put(method())
            except BaseException as error:  # broad, exits included: the caller's thread raises it
                self._results.put(error)
