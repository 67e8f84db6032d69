"""EnvPool (Weng et al., 2022): environments simulated in C++ threads.

There is one pool per task, and the rows are divided evenly among the pools, so each row keeps its
task. A new episode starts one step later (see `spec`): EnvPool ignores the action after the last
observation, and returns the first observation of the next episode with reward 0.
"""

import dataclasses
import queue
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mi.config import ArgumentError, UserError, suggest, suggest_install
from mi.rl.envs.check import check_batch
from mi.rl.envs.spec import Observation, Spec, Step
from mi.training.host import get_cores

Pool = Any  # an environment of EnvPool; the package is optional
PoolResult = tuple[Any, ...]  # of a pool's `reset` or `recv`
EnvPoolObservation = Any  # an array, or a dict of them, of all rows
Reader = Callable[[EnvPoolObservation, np.ndarray], Observation]


class Pools:
    """A `HostEnvironment` that steps several EnvPool pools together."""

    def __init__(
        self,
        spec: Spec,
        pools: Sequence[Pool],
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
          timeout: maximum time that `recv` and `reset` wait, in seconds.
        """
        # The rows of each pool: one task after another.
        pool_sizes = [pool.config['num_envs'] for pool in pools]
        self.spec = spec
        self.batch = sum(pool_sizes)
        self._pools = pools
        self._ends = np.cumsum(pool_sizes)[:-1]
        self._task = np.repeat(np.arange(len(pools), dtype=np.int32), pool_sizes)
        self._reader = reader
        self._rewards_success = rewards_success
        self._timeout = timeout
        self._is_last = np.zeros(self.batch, bool)
        self._is_idle = np.zeros(self.batch, bool)
        self._observation: EnvPoolObservation = None

        # EnvPool waits without a timeout, so a thread waits that can be abandoned.
        self._calls: queue.SimpleQueue[list[Callable[[], PoolResult]] | None]
        self._calls = queue.SimpleQueue()
        self._results: queue.SimpleQueue[PoolResult | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def reset(self) -> Step:
        results = self._call('reset', range(len(self._pools)))
        zero_reward, no_flag = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        self._is_last, self._is_idle = no_flag, no_flag
        self._observation = _concatenate([observation for observation, _ in results])
        return Step(self._read(~no_flag), zero_reward, zero_reward + 1, ~no_flag, no_flag, no_flag)

    def skip(self, rows: np.ndarray) -> None:
        """Skip rows, see `SkipsRows`. EnvPool steps only the rows that it receives actions for."""
        self._is_idle = np.array(rows)

    def send(self, actions: np.ndarray) -> None:
        """Start a step of all rows that are not skipped."""
        actions_by_pool = np.split(np.asarray(actions, np.int32), self._ends)
        is_idle_by_pool = np.split(self._is_idle, self._ends)
        for pool, pool_actions, is_idle in zip(
            self._pools, actions_by_pool, is_idle_by_pool, strict=True
        ):
            if not is_idle.any():
                pool.send(pool_actions)
            elif not is_idle.all():
                pool.send(pool_actions[~is_idle], np.flatnonzero(~is_idle).astype(np.int32))

    def recv(self) -> Step:
        """Wait for the step that was sent, and return it.

        Raises:
          ArgumentError: if a pool does not answer within the timeout.
        """
        # Join the results of all pools that have rows to step.
        is_idle_by_pool = np.split(self._is_idle, self._ends)
        active_pools = [
            pool_index for pool_index, is_idle in enumerate(is_idle_by_pool) if not is_idle.all()
        ]
        results = [result[:5] for result in self._call('recv', active_pools)]
        observations, *scalars, infos = (list(column) for column in zip(*results, strict=True))
        observation = _concatenate(observations)
        reward, terminated, truncated = (_concatenate(column) for column in scalars)

        # Skipped rows keep their observation, with reward 0 and no end.
        if self._is_idle.any():
            pool_starts = np.concatenate([[0], self._ends])
            active_rows = np.concatenate(
                [
                    pool_starts[pool_index] + info['env_id']
                    for pool_index, info in zip(active_pools, infos, strict=True)
                ]
            )
            observation = _update_rows(self._observation, observation, active_rows)
            reward, terminated, truncated = (
                _scatter_rows(values, active_rows, self.batch)
                for values in (reward, terminated, truncated)
            )

        # Build the step, and remember its ends: the next step begins their episodes.
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

    def _call(self, method_name: str, pool_indices: Iterable[int]) -> list[PoolResult]:
        """Call a method of the given pools in the waiting thread, and return the results.

        Raises:
          ArgumentError: if a pool does not answer within the timeout.
        """
        self._calls.put(
            [getattr(self._pools[pool_index], method_name) for pool_index in pool_indices]
        )
        deadline = time.monotonic() + self._timeout
        results: list[PoolResult] = []
        for pool_index in pool_indices:
            try:
                result = self._results.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                task_name = self.spec.tasks[pool_index]
                raise ArgumentError(
                    f'{self.spec.name}/{task_name} did not answer in {self._timeout:g} s: '
                    f'expected a step of {self.batch} rows. Raise '
                    f'`options.timeout`, or use fewer rows'
                ) from None
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def _serve(self) -> None:
        """Run calls from the queue until it yields None."""
        while (methods := self._calls.get()) is not None:
            for method in methods:
                try:
                    self._results.put(method())
                except Exception as error:  # whatever envpool raises; the caller raises it again
                    self._results.put(error)


def import_envpool() -> types.ModuleType:
    """Import and return the module envpool.

    Raises:
      UserError: if envpool is not installed.
    """
    try:
        import envpool
    except ImportError as error:
        raise UserError(f'envpool is not installed. Try {suggest_install("envpool")}') from error
    return envpool


@dataclasses.dataclass(frozen=True)
class GameSuite:
    """A suite of games that EnvPool simulates and the agent sees as pixels.

    Attributes:
      name: name of the environment, such as 'atari'.
      scores: game → mean return of a random policy, and of a reference.
      sources: sources of the scores, as text.
      pixels: shape [h, w, c] of an observation.
      num_actions: number of actions.
      max_steps: maximum length of an episode.
    """

    name: str
    scores: Mapping[str, tuple[float, float]]
    sources: str
    pixels: tuple[int, int, int]
    num_actions: int
    max_steps: int

    def parse_games(self, games: str) -> tuple[str, ...]:
        """Return the games in a comma-separated list, or all games for '' or 'all'.

        Raises:
          UserError: if a game is unknown.
        """
        if games in ('', 'all'):
            return tuple(self.scores)
        parsed_games = tuple(dict.fromkeys(games.split(',')))
        for game in parsed_games:
            if game not in self.scores:
                hint = suggest(game, (*self.scores, 'all'))
                raise UserError(f'{self.name}/{game} is unknown; {hint}')
        return parsed_games

    def make_spec(self, games: tuple[str, ...], num_actions: int | None = None) -> Spec:
        """Return the spec for some games, which may have fewer actions than the suite."""
        return Spec(
            name=self.name,
            observation={
                'pixels': jax.ShapeDtypeStruct(self.pixels, np.uint8),
                'task': jax.ShapeDtypeStruct((), np.int32),
            },
            actions=self.num_actions if num_actions is None else num_actions,
            tasks=games,
            random=tuple(self.scores[game][0] for game in games),
            reference=tuple(self.scores[game][1] for game in games),
            sources=self.sources,
            has_success=False,
            episode=self.max_steps,
        )


def make_pools(
    spec: Spec, env_ids: Sequence[str], batch: int, seed: int, threads: int, **env_options: object
) -> list[Pool]:
    """Make a pool for each id, with batch // len(env_ids) rows or one more.

    Raises:
      UserError: if there are fewer rows than `env_ids`, or envpool is not installed.
    """
    check_batch(spec.name, len(env_ids), batch)

    # Spread rows and threads evenly; row i has the seed `seed` + i in whichever pool.
    envpool = import_envpool()
    threads = threads or min(batch, len(get_cores()))
    pools: list[Pool] = []
    first_row = 0
    for id_index, env_id in enumerate(env_ids):
        num_rows = batch // len(env_ids) + (id_index < batch % len(env_ids))
        pool = envpool.make(
            env_id,
            env_type='gymnasium',
            num_envs=num_rows,
            batch_size=num_rows,
            num_threads=max(1, threads * num_rows // batch),
            seed=seed + first_row,
            **env_options,
        )
        pools.append(pool)
        first_row += num_rows
    return pools


def read_pixels(observation: np.ndarray, is_first: np.ndarray) -> Observation:
    """Move the channels of EnvPool's images to the last axis."""
    del is_first
    return {'pixels': np.ascontiguousarray(np.moveaxis(observation, 1, -1))}


def _update_rows(
    observation: EnvPoolObservation, new_values: EnvPoolObservation, rows: np.ndarray
) -> EnvPoolObservation:
    """Return the observation of all rows, with new values in the given rows."""
    if isinstance(observation, dict):
        return {
            entry_name: _update_rows(entry, new_values[entry_name], rows)
            for entry_name, entry in observation.items()
        }
    updated = observation.copy()  # the previous step keeps its array
    updated[rows] = new_values
    return updated


def _scatter_rows(values: np.ndarray, rows: np.ndarray, batch: int) -> np.ndarray:
    """Return an array [B] with the values in the given rows and 0 elsewhere."""
    scattered = np.zeros(batch, values.dtype)
    scattered[rows] = values
    return scattered


def _concatenate(observations: Sequence[EnvPoolObservation]) -> EnvPoolObservation:
    """Concatenate arrays, or dicts of arrays, along the rows."""
    if isinstance(observations[0], dict):
        return {
            entry_name: _concatenate([observation[entry_name] for observation in observations])
            for entry_name in observations[0]
        }
    return np.concatenate(observations)
