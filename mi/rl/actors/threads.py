"""Actors and learner side by side: a thread for each worker, and one bounded queue.

    worker ── thread ─┐
    worker ── thread ─┼─ queue of trajectories, bounded ── learner, in the caller's thread
    worker ── thread ─┘                                       │
         ▲────────────── newest parameters ───────────────────┘

A thread takes the newest parameters before each trajectory and waits where the queue is full. An
exception in a worker ends the run: the learner raises it at its next `get`. The workers are in this
process (topology 'threads') or in Ray's (`mi.rl.actors.ray`); the queue and the learner are the
same.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from mi import precision
from mi.config import UserError
from mi.rl.trajectory import Episodes, Trajectory

POLL = 0.2  # seconds between two looks at whether the run is over
GRACE = 5.0  # seconds that the threads are given to end


class Collects(Protocol):
    """What a thread drives: a `Worker`, or one in another process."""

    def collect(self, params: Any) -> list[tuple[Trajectory, Episodes]]: ...

    def close(self) -> None: ...


class Item(NamedTuple):
    """One trajectory of one group.

    Attributes:
      trajectory: [T, B, …], NumPy.
      episodes: that ended in it.
      version: of the parameters that acted.
      waited: seconds that the thread waited for room in the queue, the time before.
    """

    trajectory: Trajectory
    episodes: Episodes
    version: int
    waited: float


class Actors:
    """Threads and their queue; a context manager that ends them.

    Args:
      makers: of the workers; each is called in its own thread.
      params, version: the first parameters, and after how many updates.
      capacity: trajectories that the queue holds.
      timeout: most seconds that `get` waits.
      share: makes of parameters what the workers are handed.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], Collects]],
        params: Any,
        version: int,
        capacity: int,
        timeout: float,
        share: Callable[[Any], Any] = lambda params: params,
    ):
        self._queue: queue.Queue[Item | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._share, self._timeout = share, timeout
        self._precision = precision.get_current()  # of this thread
        self._over = threading.Event()
        self.publish(params, version)
        self._threads = [  # daemons: one whose environment hangs must not keep the process
            threading.Thread(target=self._guarded, args=(make,), name=f'actor {i}', daemon=True)
            for i, make in enumerate(makers)
        ]

    def __enter__(self) -> 'Actors':
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        deadline = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def publish(self, params: Any, version: int) -> None:
        """Gives the workers new parameters, which must not be donated afterwards."""
        self._latest = self._share(params), version

    def get(self, stops: Callable[[], bool] = lambda: False) -> Item | None:
        """The next trajectory; waits for it, and raises what a worker raised.

        Args:
          stops: whether the run is to end, asked while there is no trajectory.

        Returns:
          None if the run is to end and there is no trajectory.

        Raises:
          UserError: if there is none within the timeout.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                item = self._queue.get(timeout=min(POLL, self._timeout))
                break
            except queue.Empty:
                if stops():
                    return None
                if time.monotonic() < deadline:
                    continue
                raise UserError(
                    f'no trajectory in {self._timeout:g} s from {len(self._threads)} actors: an '
                    f'environment hangs or is very slow; raise config.actors.timeout if it is slow'
                ) from None
        if item is None or self._error is not None:
            assert self._error is not None
            raise self._error
        return item

    def waiting(self) -> int:
        """Trajectories in the queue now."""
        return self._queue.qsize()

    def _guarded(self, make: Callable[[], Collects]) -> None:
        try:
            worker = make()
            try:
                with jax.default_matmul_precision(self._precision):
                    self._run(worker)
            finally:
                worker.close()
        except BaseException as error:
            self._error = error
            self._put(None)

    def _run(self, worker: Collects) -> None:
        waited = 0.0
        while not self._over.is_set():
            params, version = self._latest
            for trajectory, episodes in worker.collect(params):
                began = time.perf_counter()
                self._put(Item(trajectory, episodes, version, waited))
                waited = time.perf_counter() - began

    def _put(self, item: Item | None) -> None:
        """Waits for room until the run is over."""
        while not self._over.is_set():
            try:
                self._queue.put(item, timeout=POLL)
                return
            except queue.Full:
                pass
