"""Actor threads: one for each worker, and a bounded queue to the learner.

    worker ── thread ─┐
    worker ── thread ─┼─ queue of trajectories, bounded ── learner, in the caller's thread
    worker ── thread ─┘                                       │
         ▲────────────── newest parameters ───────────────────┘

A thread takes the newest parameters before each trajectory and waits while the queue is full. An
exception in a worker ends the run: the learner raises it at its next `get`. The workers run in this
process (topology 'threads') or in Ray processes (`mi.rl.actors.ray`), with the same queue and
learner.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from mi import precision
from mi.config import ArgumentError
from mi.rl.agent import Params
from mi.rl.trajectory import Episodes, Trajectory

POLL = 0.2  # seconds between two checks of whether the run is over
GRACE = 5.0  # seconds that the threads have to end


SharedParams = Any  # parameters as workers take them: Ray's reference, or the arrays themselves


class Collector(Protocol):
    """The part of a `Worker`'s interface that a thread uses, in this process or another."""

    def collect(self, params: SharedParams) -> list[tuple[Trajectory, Episodes]]: ...

    def close(self) -> None: ...


class QueueItem(NamedTuple):
    """One trajectory of one group.

    Attributes:
      trajectory: the trajectory, NumPy arrays [T, B, …].
      episodes: statistics of the episodes that ended in the trajectory.
      version: version of the parameters that chose the actions.
      wait_seconds: time that the thread waited to put its previous trajectory into the queue.
    """

    trajectory: Trajectory
    episodes: Episodes
    version: int
    wait_seconds: float


class Actors:
    """A context manager that starts and ends the actor threads and their queue.

    Args:
      makers: constructors of the workers, each called in its own thread.
      params: initial parameters.
      version: number of updates behind `params`.
      capacity: maximum number of trajectories in the queue.
      timeout: maximum time that `get` waits, in seconds.
      share: function that converts parameters for the workers.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], Collector]],
        params: Params,
        version: int,
        capacity: int,
        timeout: float,
        share: Callable[[Params], SharedParams] = lambda params: params,
    ):
        self._queue: queue.Queue[QueueItem | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._share, self._timeout = share, timeout
        self._precision = precision.get_current()  # the setting of this thread
        self._is_over = threading.Event()
        self.publish(params, version)
        self._threads = [  # daemons, so that a hanging environment does not keep the process alive
            threading.Thread(
                target=self._run_worker, args=(make_worker,), name=f'actor {index}', daemon=True
            )
            for index, make_worker in enumerate(makers)
        ]

    def __enter__(self) -> 'Actors':
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        deadline = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def publish(self, params: Params, version: int) -> None:
        """Send new parameters to the workers. They must not be donated afterwards."""
        self._latest = self._share(params), version

    def get(self, stops: Callable[[], bool] = lambda: False) -> QueueItem | None:
        """Wait for the next trajectory. If a worker has failed, raise its exception.

        Args:
          stops: function that returns whether to end the run, called while the queue is empty.

        Returns:
          The trajectory, or None if the run should end and the queue is empty.

        Raises:
          ArgumentError: if no trajectory arrives within the timeout.
        """
        # Wait in short intervals, so that a signal can end the wait.
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                queue_item = self._queue.get(timeout=min(POLL, self._timeout))
                break
            except queue.Empty:
                if stops():
                    return None
                if time.monotonic() < deadline:
                    continue
                raise ArgumentError(
                    f'{len(self._threads)} actors: expected a trajectory within '
                    f'{self._timeout:g} s, but an environment hangs or is slow. Raise `timeout` '
                    f'if it is slow'
                ) from None

        # None marks a worker that failed.
        if queue_item is None or self._error is not None:
            assert self._error is not None
            raise self._error
        return queue_item

    def count_waiting(self) -> int:
        """Return the number of trajectories in the queue."""
        return self._queue.qsize()

    def _run_worker(self, make_worker: Callable[[], Collector]) -> None:
        """Make a worker and collect until the run is over, and store any exception for `get`."""
        try:
            worker = make_worker()
            try:
                with jax.default_matmul_precision(self._precision):
                    self._collect(worker)
            finally:
                worker.close()
        except BaseException as error:  # broad, exits included: the learner's thread raises it
            self._error = error
            self._put(None)

    def _collect(self, worker: Collector) -> None:
        wait_seconds = 0.0
        while not self._is_over.is_set():
            params, version = self._latest
            for trajectory, episodes in worker.collect(params):
                start_time = time.perf_counter()
                self._put(QueueItem(trajectory, episodes, version, wait_seconds))
                wait_seconds = time.perf_counter() - start_time

    def _put(self, queue_item: QueueItem | None) -> None:
        """Put an item into the queue as soon as there is space, unless the run is over."""
        while not self._is_over.is_set():
            try:
                self._queue.put(queue_item, timeout=POLL)
                return
            except queue.Full:
                pass
