"""Workers in processes of Ray, on this host or any other, that are started again when they die.

A cluster is joined where RAY_ADDRESS names one; otherwise Ray starts here. Parameters go out
through Ray's object store, once for each update; trajectories come back the same way.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mi.config import UserError, suggest_install
from mi.rl.actors.worker import Worker
from mi.rl.trajectory import Episodes, Trajectory

DEATHS = 3  # in a row, without a trajectory between them, after which a run ends
PATIENCE = 30.0  # seconds that a process may take to start before a line says that it waits
MOST_ACTORS_PER_CPU = 64


class Remote:
    """A `Worker` in another process, which looks like one in this.

    An exception of its environments is raised here, as from a thread; a process that dies (out of
    memory, a lost host, kill -9) is replaced, with new environments.

    Args:
      make: makes the worker, in the process; it is told how many were there before, `birth`.
      cpus: what the process is given of a CPU; Ray starts it where so much is free.
    """

    def __init__(self, make: Callable[..., Worker], cpus: float = 1.0):
        self._ray, self._make, self._cpus, self._births = start(), make, cpus, 0
        self._process = self._new()
        self._started = False

    def collect(self, params: Any) -> list[tuple[Trajectory, Episodes]]:
        """As `Worker.collect`; `params` are those of `share`.

        Raises:
          UserError: if the process dies again and again.
        """
        for _ in range(DEATHS):
            try:
                if not self._started:
                    self._wait_for_start()
                return self._ray.get(self._process.collect.remote(params))
            except self._ray.exceptions.RayActorError as error:
                death = error
                print(f'an actor died and is started again: {error}', file=sys.stderr)
                self._process, self._started = self._new(), False
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                # A UserError is a whole message; the traceback of any other is worth reading.
                raise cause from None if isinstance(cause, UserError) else error
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
        return self._ray.remote(_Process).options(num_cpus=self._cpus).remote(make)

    def _wait_for_start(self) -> None:
        """Return when the worker is made; say so where Ray finds no place for its process."""
        placed, made = self._process.pid.remote(), self._process.make.remote()
        if not self._ray.wait([placed], timeout=PATIENCE)[0]:
            total = self._ray.cluster_resources().get('CPU', 0)
            print(
                f'an actor waits for {self._cpus:g} of a CPU: Ray has {total:g} in all, and none '
                f'of them has so much left. Lower config.actors.number, or end what uses them',
                file=sys.stderr,
            )
        self._ray.get(made)
        self._started = True


class _Process:
    """A worker in its process; `make` makes it, as Ray takes a constructor's error for a death."""

    def __init__(self, make: Callable[[], Worker]):
        self._make = make

    def make(self) -> None:
        self._worker = self._make()

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
            f"config.train.topology = 'ray' needs Ray, which is not installed. "
            f'Try {suggest_install("ray")}'
        ) from error
    if not ray.is_initialized():
        with warnings.catch_warnings(), _signal_handlers():
            # Its forks do nothing but start another program.
            warnings.filterwarnings('ignore', r'os\.fork\(\) was called', RuntimeWarning)
            ray.init(  # the accelerators are the learner's
                runtime_env={'env_vars': {'JAX_PLATFORMS': 'cpu'}},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    return ray


def cpus_per_actor(number: int) -> float:
    """Return what `number` actors can have of a CPU each, so that Ray starts all: 1 at most.

    Raises:
      UserError: if too few CPUs are free.
    """
    ray = start()
    nodes = [node['Resources'].get('CPU', 0.0) for node in ray.nodes() if node['Alive']]
    deadline = time.monotonic() + PATIENCE
    while True:
        # Ray says in public what is free in all; it is taken to be spread as the CPUs are.
        free = ray.available_resources().get('CPU', 0.0) / max(1.0, sum(nodes))
        try:
            share = divide_cpus(number, [free * cpus for cpus in nodes])
            break
        except UserError:  # what has just ended may not have given back its CPUs yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    if share < 1:
        print(
            f'config.actors.number = {number}: Ray has {free * sum(nodes):g} free CPUs, so each '
            f'actor gets {share:g} of one',
            file=sys.stderr,
        )
    return share


def divide_cpus(number: int, free: Sequence[float]) -> float:
    """Return the largest 1, 1/2, 1/3, … of a CPU that `number` actors can have on these nodes.

    Raises:
      UserError: if they would be more than MOST_ACTORS_PER_CPU on a CPU.
    """
    for actors_per_cpu in range(1, MOST_ACTORS_PER_CPU + 1):
        if sum(int(cpus * actors_per_cpu + 1e-6) for cpus in free) >= number:
            return int(10_000 / actors_per_cpu) / 10_000  # Ray counts in 1/10,000
    raise UserError(
        f'config.actors.number = {number}: expected at most {MOST_ACTORS_PER_CPU} for each of the '
        f'{sum(free):g} CPUs that Ray has free. Lower it, or end what uses the cluster'
    )


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    """Put the handlers of all signals back, which Ray replaces in Python and in C++.

    The run's own save a checkpoint; Ray's abort the process. Those that were not set from Python
    (None) are left alone.
    """
    catchable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    before = {number: signal.getsignal(number) for number in catchable}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                with contextlib.suppress(ValueError, OSError):  # not in the main thread
                    signal.signal(number, handler)
