"""Play whole episodes on the host, within limits, and end where the run is to end.

Each row plays a share of its task's episodes that is fixed before the first step, however long they
are, so that short ones are not preferred. A row that has played its share is not stepped any more,
where the environment can leave rows alone (`spec.SkipsRows`).
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
from mi.rl.agent import Inputs
from mi.rl.envs.finite import check_finite
from mi.rl.envs.spec import HostEnvironment, Step

POLL = 0.1  # seconds between two looks at whether the run is to end


def never() -> bool:
    return False


class StoppedError(Exception):
    """The run is to end, and what was being played is not over."""


class Limits(NamedTuple):
    """How long an evaluation may be.

    Attributes:
      steps: most of one episode; a longer one is cut there and counts as it is.
      seconds: most of all episodes; what is being played then is cut and counts as it is.
    """

    steps: int = 30_000
    seconds: float = 3600.0


class Played(NamedTuple):
    """Episodes of each task.

    Attributes:
      returned, success, length: an array for each task, with an entry for each episode.
      cut: number of episodes that were cut by a limit.
      steps_needed: of all rows together, those of the episodes.
      steps_taken: those that the environments made for it.
    """

    returned: list[np.ndarray]
    success: list[np.ndarray]
    length: list[np.ndarray]
    cut: int
    steps_needed: int
    steps_taken: int


def shares(task: np.ndarray, tasks: int, episodes: int) -> np.ndarray:
    """Return how many episodes each row plays, [B], so that each task has `episodes` in all.

    Args:
      task: of each row, [B].
      tasks: how many there are.
      episodes: of each task.
    """
    share = np.zeros(len(task), np.int64)
    for i in range(tasks):
        rows = np.flatnonzero(task == i)
        share[rows] = episodes // len(rows)
        share[rows[: episodes % len(rows)]] += 1
    return share


def play(
    pool: HostEnvironment,
    policy: Policy,
    params: Any,
    key: jax.Array,
    episodes: int,
    limits: Limits,
    stops: Callable[[], bool] = never,
) -> Played:
    """Play `episodes` of every task.

    Args:
      pool: environments, at least one of each task.
      policy: whose actions are played.
      params: of its agent.
      key: random key of the actions.
      episodes: of each task.
      limits: how long it may take.
      stops: whether the run is to end, asked before every step.

    Raises:
      StoppedError: if the run is to end.
      UserError: if a reward or an observation is not finite.
    """
    tasks, B = len(pool.spec.tasks), pool.batch
    deadline = time.monotonic() + limits.seconds
    step, acting, action = pool.reset(), policy.init(B, key), jnp.zeros(B, jnp.int32)
    check_finite(pool.spec, step)
    left = shares(np.asarray(step.observation['task']), tasks, episodes)
    skip = getattr(pool, 'skip', None)
    returned, length = np.zeros(B), np.zeros(B, np.int64)
    ended: list[list[tuple[float, bool, int]]] = [[] for _ in range(tasks)]
    cut = steps_taken = 0
    idle = np.zeros(B, bool)

    while (left > 0).any():
        if stops():
            raise StoppedError

        # Leave rows alone that have played their share.
        if skip is not None and ((left == 0) & ~idle).any():
            idle = left == 0
            skip(idle)

        # One step of the others.
        inputs: Any = step.observation, action, step.reward, step.is_first
        acting, action, _ = policy(params, acting, Inputs(*inputs))
        task, is_ignored = np.asarray(step.observation['task']), np.asarray(step.is_last)
        pool.send(np.asarray(action))
        step = pool.recv()
        check_finite(pool.spec, step)
        steps_taken += int((~idle).sum())
        returned = np.where(is_ignored, 0, returned + step.reward)
        length = np.where(is_ignored, 0, length + 1)

        # Count the episodes that ended, and those that a limit ends.
        is_over = ~is_ignored & (np.asarray(step.is_last) | (np.asarray(step.discount) == 0))
        is_cut = ~is_ignored & ~is_over & (left > 0) & (length >= limits.steps)
        if time.monotonic() > deadline:
            is_cut = ~is_over & (left > 0) & (length > 0)
            left = np.where(is_over, np.minimum(left, 1), is_cut)
        for row in np.flatnonzero((is_over | is_cut) & (left > 0)):
            success = bool(is_over[row] and step.success[row])
            ended[task[row]].append((float(returned[row]), success, int(length[row])))
        cut += int(is_cut.sum())
        # The episode of a row that was cut goes on, so that the row has no other to play.
        left = np.where(is_cut, 0, np.where(is_over, np.maximum(left - 1, 0), left))
        returned[is_over], length[is_over] = 0, 0
    returns, successes, lengths = (
        [np.array([row[i] for row in rows]) for rows in ended] for i in range(3)
    )
    steps_needed = int(sum(values.sum() for values in lengths))
    return Played(returns, successes, lengths, cut, steps_needed, steps_taken)


class Watched:
    """A `HostEnvironment` that is waited for only so long, and not when the run is to end.

    Its thread waits for the environment, and is left behind with it if it hangs: the caller's own
    is free to handle signals.

    Args:
      pool: the environment.
      timeout: most seconds of a step or a reset.
      key: of the config, to raise where the environment is slow and does not hang.
      stops: whether the run is to end.
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
        self._is_left = False
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
        if not self._is_left:
            self._pool.close()

    def _wait_for(self, method: Callable[[], Step]) -> Step:
        self._calls.put(method)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                result = self._results.get(timeout=min(POLL, self._timeout))
            except queue.Empty:
                is_late = time.monotonic() > deadline
                if not is_late and not self.stops():
                    continue
                self._is_left = True
                if not is_late:
                    raise StoppedError from None
                raise UserError(
                    f'{self.spec.name} made no step in {self._timeout:g} s: an environment hangs '
                    f'or is very slow; raise {self._key} if it is slow'
                ) from None
            if isinstance(result, BaseException):
                raise result
            return result

    def _serve(self) -> None:
        while (method := self._calls.get()) is not None:
            try:
                self._results.put(method())
            except BaseException as error:
                self._results.put(error)
