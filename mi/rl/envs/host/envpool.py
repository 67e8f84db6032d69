"""EnvPool (Weng et al., 2022): environments simulated in C++ threads.

One pool per task, the rows spread evenly over them, task by task: each row keeps its task. A new
episode starts one step later (see `spec`): EnvPool ignores the action after the last observation
and answers it with the first observation of the next episode and reward 0.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mi.config import UserError, suggest, suggest_install
from mi.rl.envs.spec import Observation, Spec, Step

EnvPoolObservation = Any  # an array, or a dict of them, of all rows
Reader = Callable[[EnvPoolObservation, np.ndarray], Observation]


class Pools:
    """A `HostEnvironment` of EnvPool's pools, stepped together."""

    def __init__(
        self,
        spec: Spec,
        pools: Sequence[Any],
        reader: Reader,
        *,
        rewards_success: bool = False,
        timeout: float = 60.0,
    ):
        """Take ownership of the pools.

        Args:
          spec: spec with a task for each pool, in order.
          pools: pools of the gymnasium interface, with batch_size = num_envs.
          reader: (EnvPool's observation of all rows, is_first [B]) → observation, without 'task'.
          rewards_success: whether a positive last reward of an episode means success.
          timeout: longest wait of `recv` and `reset`, seconds.
        """
        sizes = [pool.config['num_envs'] for pool in pools]
        self.spec = spec
        self.batch = sum(sizes)
        self._pools = pools
        self._ends = np.cumsum(sizes)[:-1]
        self._task = np.repeat(np.arange(len(pools), dtype=np.int32), sizes)
        self._reader = reader
        self._rewards_success = rewards_success
        self._timeout = timeout
        self._is_last = np.zeros(self.batch, bool)
        self._is_idle = np.zeros(self.batch, bool)
        self._observation: EnvPoolObservation = None
        # EnvPool waits without a timeout, so a thread waits that can be abandoned.
        self._calls: queue.SimpleQueue[list[Callable[[], Any]] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def reset(self) -> Step:
        results = self._call('reset', range(len(self._pools)))
        zero, false = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        self._is_last, self._is_idle = false, false
        self._observation = _concatenate([observation for observation, _ in results])
        return Step(self._read(~false), zero, zero + 1, ~false, false, false)

    def skip(self, rows: np.ndarray) -> None:
        """Leave rows alone, as in `SkipsRows`: EnvPool steps the rows that it gets actions for."""
        self._is_idle = np.array(rows)

    def send(self, actions: np.ndarray) -> None:
        """Start a step of all rows that are not skipped."""
        actions = np.asarray(actions, np.int32)
        parts = zip(
            self._pools,
            np.split(actions, self._ends),
            np.split(self._is_idle, self._ends),
            strict=True,
        )
        for pool, pool_actions, is_idle in parts:
            if not is_idle.any():
                pool.send(pool_actions)
            elif not is_idle.all():
                pool.send(pool_actions[~is_idle], np.flatnonzero(~is_idle).astype(np.int32))

    def recv(self) -> Step:
        """Return the step that was sent.

        Raises:
          UserError: if a pool does not answer within the timeout.
        """
        # Join the results of all pools that have rows to step.
        active = [i for i, rows in enumerate(np.split(self._is_idle, self._ends)) if not rows.all()]
        results = [result[:5] for result in self._call('recv', active)]
        observations, *scalars, infos = (list(part) for part in zip(*results, strict=True))
        observation = _concatenate(observations)
        reward, terminated, truncated = (_concatenate(parts) for parts in scalars)

        # Skipped rows keep their observation, with reward 0 and no end.
        if self._is_idle.any():
            starts = np.concatenate([[0], self._ends])
            rows = np.concatenate(
                [starts[i] + info['env_id'] for i, info in zip(active, infos, strict=True)]
            )
            observation = _update_rows(self._observation, observation, rows)
            reward, terminated, truncated = (
                _scatter_rows(values, rows, self.batch)
                for values in (reward, terminated, truncated)
            )

        is_first, is_last = self._is_last & ~self._is_idle, terminated | truncated
        self._observation, self._is_last = observation, is_last
        is_success = is_last & (reward > 0) & self._rewards_success
        return Step(
            observation=self._read(is_first),
            reward=reward.astype(np.float32),
            discount=np.where(terminated & ~truncated, 0, 1).astype(np.float32),
            is_first=is_first,
            is_last=is_last,
            success=is_success,
        )

    def close(self) -> None:
        self._calls.put(None)
        for pool in self._pools:
            pool.close()

    def _read(self, is_first: np.ndarray) -> Observation:
        return {**self._reader(self._observation, is_first), 'task': self._task}

    def _call(self, method: str, pools: Iterable[int]) -> list[Any]:
        """Call the method of each of these pools, in the thread that may wait, and return results.

        Raises:
          UserError: if a pool does not answer within the timeout.
        """
        self._calls.put([getattr(self._pools[i], method) for i in pools])
        deadline = time.monotonic() + self._timeout
        results: list[Any] = []
        for task in (self.spec.tasks[i] for i in pools):
            try:
                result = self._results.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise UserError(
                    f'{self.spec.name}/{task} did not answer in {self._timeout:g} s: expected a '
                    f'step of its {self.batch} rows. Raise config.env.options.timeout, or use '
                    f'fewer rows'
                ) from None
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def _serve(self) -> None:
        """Run calls until there is None."""
        while (methods := self._calls.get()) is not None:
            for method in methods:
                try:
                    self._results.put(method())
                except Exception as error:  # whatever envpool raises; the caller raises it again
                    self._results.put(error)


def import_envpool() -> Any:
    """Return the module envpool.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import envpool
    except ImportError as error:
        raise UserError(f'envpool is not installed. Try {suggest_install("envpool")}') from error
    return envpool


def parse_games(name: str, games: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return the games of a comma-separated list; all known ones for '' or 'all'.

    Raises:
      UserError: if a game is unknown.
    """
    if games in ('', 'all'):
        return tuple(known)
    parsed = tuple(dict.fromkeys(games.split(',')))
    for game in parsed:
        if game not in known:
            raise UserError(f'{name}/{game} is unknown; {suggest(game, (*known, "all"))}')
    return parsed


def make_pools(
    spec: Spec, ids: Sequence[str], batch: int, seed: int, threads: int, **options: Any
) -> list[Any]:
    """Make a pool of each id, with batch // len(ids) rows or one more.

    Raises:
      UserError: if there are fewer rows than ids, or envpool is not installed.
    """
    if batch < len(ids):
        raise UserError(
            f'{spec.name} has {len(ids)} tasks but the batch has only {batch} environments: '
            f'expected at least one per task. Raise config.actors.batch or name fewer tasks'
        )
    envpool = import_envpool()
    pools, row = [], 0
    threads = threads or min(batch, len(os.sched_getaffinity(0)))
    for i, name in enumerate(ids):
        rows = batch // len(ids) + (i < batch % len(ids))
        pool = envpool.make(
            name,
            env_type='gymnasium',
            num_envs=rows,
            batch_size=rows,
            num_threads=max(1, threads * rows // batch),
            seed=seed + row,
            **options,
        )
        pools.append(pool)
        row += rows
    return pools


def read_pixels(observation: np.ndarray, is_first: np.ndarray) -> Observation:
    """Move the channels of EnvPool's pictures last."""
    del is_first
    return {'pixels': np.ascontiguousarray(np.moveaxis(observation, 1, -1))}


def _update_rows(observation: Any, new: Any, rows: np.ndarray) -> Any:
    """Return an observation of all rows with new values in some of them."""
    if isinstance(observation, dict):
        return {name: _update_rows(observation[name], new[name], rows) for name in observation}
    observation = observation.copy()  # the previous step keeps its array
    observation[rows] = new
    return observation


def _scatter_rows(values: np.ndarray, rows: np.ndarray, batch: int) -> np.ndarray:
    """Return [B] with the values in these rows and 0 elsewhere."""
    scattered = np.zeros(batch, values.dtype)
    scattered[rows] = values
    return scattered


def _concatenate(parts: Sequence[Any]) -> Any:
    """Concatenate arrays, or dicts of arrays, along the rows."""
    if isinstance(parts[0], dict):
        return {name: _concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)
