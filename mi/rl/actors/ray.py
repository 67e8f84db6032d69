"""Workers in Ray processes, on this host or on others, which are restarted when they die.

RAY_ADDRESS names the cluster to connect to. Without it, Ray starts on this host. Ray's object store
carries the parameters to the workers, once per update, and the trajectories back.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mi.config import ArgumentError, UserError, suggest_install
from mi.rl.actors.threads import SharedParams
from mi.rl.actors.worker import Worker
from mi.rl.agent import Params
from mi.rl.trajectory import Episodes, Trajectory

MAX_DEATHS = 3  # in a row, without a trajectory between them; then the run ends
PATIENCE = 30.0  # seconds until a message says that a process still waits to start
MAX_ACTORS_PER_CPU = 64


class Remote:
    """A `Worker` in another process, with the same interface.

    Exceptions in the environments are raised in this process too. If the process dies (out of
    memory, a lost host, kill -9), a new one with new environments replaces it.

    Args:
      make_worker: constructor of the worker, called in the other process. Its argument `birth` is
        the number of earlier processes.
      cpus: CPUs of the process. Ray starts it on a node that has them free.
    """

    def __init__(self, make_worker: Callable[..., Worker], cpus: float = 1.0):
        self._ray, self._cpus = init_ray(), cpus
        self._make_worker, self._births = make_worker, 0
        self._process = self._start_process()
        self._is_started = False

    def collect(self, params: SharedParams) -> list[tuple[Trajectory, Episodes]]:
        """Collect trajectories like `Worker.collect`, with parameters from `share`.

        Raises:
          UserError: if the process dies repeatedly.
        """
        for _ in range(MAX_DEATHS):
            try:
                if not self._is_started:
                    self._wait_for_start()
                return self._ray.get(self._process.collect.remote(params))
            except self._ray.exceptions.RayActorError as error:
                death = error
                print(f'an actor died and is restarted: {error}', file=sys.stderr)
                self._process, self._is_started = self._start_process(), False
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                # A UserError says everything; for other exceptions the traceback helps.
                raise cause from None if isinstance(cause, UserError) else error
        raise UserError(
            f'an actor died {MAX_DEATHS} times before it returned a trajectory. The last error '
            f'was: {death}'
        )

    def pid(self) -> int:
        """Return the process id on the host of the process."""
        return self._ray.get(self._process.pid.remote())

    def close(self) -> None:
        self._ray.kill(self._process)

    def _start_process(self) -> Any:
        make_worker = functools.partial(self._make_worker, birth=self._births)
        self._births += 1
        return self._ray.remote(_Process).options(num_cpus=self._cpus).remote(make_worker)

    def _wait_for_start(self) -> None:
        """Wait until the worker exists, and print a message if Ray has no free CPUs for it."""
        pid, worker = self._process.pid.remote(), self._process.make.remote()
        if not self._ray.wait([pid], timeout=PATIENCE)[0]:
            total_cpus = self._ray.cluster_resources().get('CPU', 0)
            print(
                f'an actor waits for {self._cpus:g} of a CPU: Ray has {total_cpus:g} CPUs, all in '
                f'use. Start fewer actors, or end what uses them',
                file=sys.stderr,
            )
        self._ray.get(worker)
        self._is_started = True


class _Process:
    """The Ray actor that holds a worker.

    `make` constructs the worker, because Ray treats an error in a constructor as a death.
    """

    def __init__(self, make_worker: Callable[[], Worker]):
        self._make_worker = make_worker
        self._worker: Worker | None = None

    def make(self) -> None:
        self._worker = self._make_worker()

    def collect(self, params: Params) -> list[tuple[Trajectory, Episodes]]:
        assert self._worker is not None
        return self._worker.collect(params)

    def pid(self) -> int:
        return os.getpid()


def share(params: Params) -> SharedParams:
    """Put parameters into Ray's object store and return the reference."""
    return init_ray().put(jax.device_get(params))


def init_ray() -> types.ModuleType:
    """Initialize Ray and return its module.

    Raises:
      UserError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f'ray is not installed. Try {suggest_install("ray")}') from error
    if not ray.is_initialized():
        with warnings.catch_warnings(), _signal_handlers():
            # Ray only forks to start another program.
            warnings.filterwarnings('ignore', r'os\.fork\(\) was called', RuntimeWarning)
            ray.init(  # the accelerators are the learner's
                runtime_env={'env_vars': {'JAX_PLATFORMS': 'cpu'}},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    return ray


def compute_cpus_per_actor(num_actors: int) -> float:
    """Return the CPUs per actor, at most 1, that let Ray start all actors.

    Raises:
      ArgumentError: if too few CPUs are free.
    """
    ray = init_ray()
    node_cpus = [node['Resources'].get('CPU', 0.0) for node in ray.nodes() if node['Alive']]
    deadline = time.monotonic() + PATIENCE
    while True:
        # Ray's public API has only the total of the free CPUs; assume that they are spread evenly.
        free_fraction = ray.available_resources().get('CPU', 0.0) / max(1.0, sum(node_cpus))
        try:
            cpu_share = divide_cpus(num_actors, [free_fraction * cpus for cpus in node_cpus])
            break
        except UserError:  # processes that have just ended may still hold their CPUs
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    if cpu_share < 1:
        print(
            f'{num_actors} actors: Ray has {free_fraction * sum(node_cpus):g} free CPUs, so each '
            f'actor gets {cpu_share:g} of one',
            file=sys.stderr,
        )
    return cpu_share


def divide_cpus(num_actors: int, free_cpus: Sequence[float]) -> float:
    """Return the largest share of a CPU, 1/k, that lets all actors fit on the nodes.

    Args:
      num_actors: number of actors.
      free_cpus: free CPUs of each node.

    Raises:
      ArgumentError: if a CPU would have more than MAX_ACTORS_PER_CPU actors.
    """
    for actors_per_cpu in range(1, MAX_ACTORS_PER_CPU + 1):
        if sum(int(cpus * actors_per_cpu + 1e-6) for cpus in free_cpus) >= num_actors:
            return int(10_000 / actors_per_cpu) / 10_000  # Ray counts in 1/10,000
    raise ArgumentError(
        f'`num_actors` = {num_actors}: expected at most {MAX_ACTORS_PER_CPU} for each of '
        f'the {sum(free_cpus):g} CPUs that Ray has free. Lower it, or free CPUs'
    )


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that Ray replaces in Python and in C++.

    The handlers of the run save a checkpoint, whereas those of Ray abort the process. Handlers that
    were not set from Python (None) are left alone.
    """
    catchable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    handlers = {signal_number: signal.getsignal(signal_number) for signal_number in catchable}
    try:
        yield
    finally:
        for signal_number, handler in handlers.items():
            if handler is not None:
                with contextlib.suppress(ValueError, OSError):  # not in the main thread
                    signal.signal(signal_number, handler)
