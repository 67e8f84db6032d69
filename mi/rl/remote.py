"""Workers in processes of Ray, on this host or any other, that are started again when they die.

A cluster is joined where RAY_ADDRESS names one; otherwise Ray starts here. Parameters go out
through Ray's object store, once for each update; trajectories come back the same way.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax

from mi.config import UserError
from mi.rl.actor import Episodes, Trajectory
from mi.rl.worker import Worker

DEATHS = 3  # in a row, without a trajectory between them, after which a run ends


class Remote:
    """A `Worker` in another process, which looks like one in this.

    An exception of its environments is raised here, as from a thread; a process that dies (out of
    memory, a lost host, kill -9) is replaced, with new environments.

    Args:
      make: makes the worker, in the process; it is told how many were there before, `birth`.
    """

    def __init__(self, make: Callable[..., Worker]):
        self._ray, self._make, self._births = start(), make, 0
        self._process = self._new()

    def collect(self, params: Any) -> list[tuple[Trajectory, Episodes]]:
        """As `Worker.collect`; `params` are those of `share`.

        Raises:
          UserError: if the process dies again and again.
        """
        for _ in range(DEATHS):
            try:
                return self._ray.get(self._process.collect.remote(params))
            except self._ray.exceptions.RayActorError as error:
                death = error
                print(f'an actor died and is started again: {error}', file=sys.stderr)
                self._process = self._new()
        raise UserError(
            f'an actor died {DEATHS} times before it had a trajectory; the last time: {death}'
        )

    def pid(self) -> int:
        """Of the process, on its host."""
        return self._ray.get(self._process.pid.remote())

    def close(self) -> None:
        self._ray.kill(self._process)

    def _new(self) -> Any:
        make = functools.partial(self._make, birth=self._births)
        self._births += 1
        return self._ray.remote(_Process).options(num_cpus=1).remote(make)


class _Process:
    def __init__(self, make: Callable[[], Worker]):
        self._worker = make()

    def collect(self, params: Any) -> list[tuple[Trajectory, Episodes]]:
        return self._worker.collect(params)

    def pid(self) -> int:
        return os.getpid()


def share(params: Any) -> Any:
    """Parameters in Ray's object store."""
    return start().put(jax.device_get(params))


def start() -> Any:
    """Ray, running.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "config.train.topology = 'ray' needs ray: pip install multiplicative-interactions[ray]"
        ) from error
    if not ray.is_initialized():
        with warnings.catch_warnings():  # its forks do nothing but start another program
            warnings.filterwarnings('ignore', r'os\.fork\(\) was called', RuntimeWarning)
            ray.init(  # the accelerators are the learner's
                runtime_env={'env_vars': {'JAX_PLATFORMS': 'cpu'}},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    return ray
