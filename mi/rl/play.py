"""Whole episodes on the host, within limits, for evaluation.

Each row plays a share of its task's episodes that is fixed in advance, so that short episodes are
not preferred. A row that has played its share is skipped, if the environment can skip rows
(`spec.SkipsRows`).
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mi.config import UserError
from mi.rl.actors.worker import Policy
from mi.rl.agent import Inputs, Params
from mi.rl.envs.finite import check_finite
from mi.rl.envs.spec import HostEnvironment, Step

POLL = 0.1  # seconds between two checks of whether the run is to end


def never() -> bool:
    """Return False: the run is not to end."""
    return False


class StoppedError(Exception):
    """The run is to end before its episodes are over."""


class Limits(NamedTuple):
    """Limits of an evaluation. An episode cut by a limit counts with its return so far.

    Attributes:
      steps: maximum steps of one episode.
      seconds: maximum duration of all episodes together.
    """

    steps: int = 30_000
    seconds: float = 3600.0


class Played(NamedTuple):
    """Episodes of each task.

    Attributes:
      returns, success, length: an array for each task, with an entry for each episode.
      cut: number of episodes that were cut by a limit.
      steps_needed: sum of the episodes' lengths.
      steps_taken: number of steps that the environments made.
    """

    returns: list[np.ndarray]
    success: list[np.ndarray]
    length: list[np.ndarray]
    cut: int
    steps_needed: int
    steps_taken: int


def divide_episodes(task: np.ndarray, num_tasks: int, episodes: int) -> np.ndarray:
    """Return the number of episodes of each row, [B], so that each task has `episodes` in all.

    Args:
      task: task of each row, [B].
      num_tasks: number of tasks.
      episodes: number for each task.
    """
    share = np.zeros(len(task), np.int64)
    for i in range(num_tasks):
        rows = np.flatnonzero(task == i)
        share[rows] = episodes // len(rows)
        share[rows[: episodes % len(rows)]] += 1
    return share


# Seven parameters: `stops` belongs to the run, the others to the evaluation.
def play(  # noqa: PLR0913
    pool: HostEnvironment,
    policy: Policy,
    params: Params,
    key: jax.Array,
    episodes: int,
    limits: Limits,
    stops: Callable[[], bool] = never,
) -> Played:
    """Play `episodes` complete episodes of every task, unless a limit cuts them.

    Args:
      pool: environments, at least one of each task.
      policy: selects the actions.
      params: parameters of the agent.
      key: random key of the actions.
      episodes: number for each task.
      limits: maximum steps per episode and seconds in total.
      stops: called before every step; returns whether to abort.

    Raises:
      StoppedError: if the run is to end.
      UserError: if a reward or an observation is not finite.
    """
    num_tasks, B = len(pool.spec.tasks), pool.batch
    deadline = time.monotonic() + limits.seconds
    step, policy_state, action = pool.reset(), policy.init(B, key), jnp.zeros(B, jnp.int32)
    check_finite(pool.spec, step)
    remaining = divide_episodes(np.asarray(step.observation['task']), num_tasks, episodes)
    skip = getattr(pool, 'skip', None)
    returns, length = np.zeros(B), np.zeros(B, np.int64)
    results: list[list[tuple[float, bool, int]]] = [[] for _ in range(num_tasks)]
    num_cut = steps_taken = 0
    is_idle = np.zeros(B, bool)

    while (remaining > 0).any():
        if stops():
            raise StoppedError

        # Skip rows that have played their share.
        if skip is not None and ((remaining == 0) & ~is_idle).any():
            is_idle = remaining == 0
            skip(is_idle)

        # Step the others.
        inputs: Any = step.observation, action, step.reward, step.is_first
        policy_state, action, _ = policy(params, policy_state, Inputs(*inputs))
        task, is_ignored = np.asarray(step.observation['task']), np.asarray(step.is_last)
        pool.send(np.asarray(action))
        step = pool.recv()
        check_finite(pool.spec, step)
        steps_taken += int((~is_idle).sum())
        returns = np.where(is_ignored, 0, returns + step.reward)
        length = np.where(is_ignored, 0, length + 1)

        # Count the episodes that ended or that a limit cuts.
        is_over = ~is_ignored & (np.asarray(step.is_last) | (np.asarray(step.discount) == 0))
        is_cut = ~is_ignored & ~is_over & (remaining > 0) & (length >= limits.steps)
        if time.monotonic() > deadline:
            is_cut = ~is_over & (remaining > 0) & (length > 0)
            remaining = np.where(is_over, np.minimum(remaining, 1), is_cut)
        for row in np.flatnonzero((is_over | is_cut) & (remaining > 0)):
            success = bool(is_over[row] and step.success[row])
            results[task[row]].append((float(returns[row]), success, int(length[row])))
        num_cut += int(is_cut.sum())
        # The environment continues an episode that was cut, so its row plays no more.
        played_one = np.where(is_over, np.maximum(remaining - 1, 0), remaining)
        remaining = np.where(is_cut, 0, played_one)
        returns[is_over], length[is_over] = 0, 0

    task_returns, successes, lengths = (
        [np.array([episode[i] for episode in rows]) for rows in results] for i in range(3)
    )
    steps_needed = int(sum(values.sum() for values in lengths))
    return Played(task_returns, successes, lengths, num_cut, steps_needed, steps_taken)


class Watched:
    """A `HostEnvironment` with a timeout, whose waiting ends when the run is to end.

    A thread waits for the environment, and is abandoned with it if it hangs. The caller's thread
    can handle signals meanwhile.

    Args:
      pool: the environment.
      timeout: longest step or reset, seconds.
      key: the config key of the timeout, for the error.
      stops: returns whether to abort.
    """

    def __init__(
        self,
        pool: HostEnvironment,
        timeout: float,
        key: str,
        stops: Callable[[], bool] = never,
    ):
        self.spec, self.batch = pool.spec, pool.batch
        self.stops = stops
        self._pool, self._timeout, self._key = pool, timeout, key
        self._is_abandoned = False
        self._calls: queue.SimpleQueue[Callable[[], Step] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if hasattr(pool, 'skip'):
            self.skip = pool.skip
        threading.Thread(target=self._serve, daemon=True, name='watched').start()

    def reset(self) -> Step:
        return self._wait_for(self._pool.reset)

    def send(self, actions: np.ndarray) -> None:
        self._pool.send(actions)

    def recv(self) -> Step:
        """Receive the step that was sent.

        Raises:
          StoppedError: if the run is to end before it comes.
          UserError: if it does not come within the timeout.
        """
        return self._wait_for(self._pool.recv)

    def close(self) -> None:
        """Close the environment, unless it hangs."""
        self._calls.put(None)
        if not self._is_abandoned:
            self._pool.close()

    def _wait_for(self, method: Callable[[], Step]) -> Step:
        """Call a method of the environment in the thread, and wait for its result."""
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
                raise UserError(
                    f'{self.spec.name} made no step in {self._timeout:g} s: an environment hangs '
                    f'or is slow. Raise {self._key} if it is slow'
                ) from None
            if isinstance(result, BaseException):
                raise result
            return result

    def _serve(self) -> None:
        while (method := self._calls.get()) is not None:
            try:
                self._results.put(method())
            except BaseException as error:  # whatever it is, the caller's thread has to raise it
                self._results.put(error)
