"""Actors, a bounded queue and a learner in simulated time: the topology of `mi.rl.actors.threads`.

    actor: newest parameters → T times (receive, act, send) for each group → pack → put
    learner: take batch / rows trajectories → join → dispatch the update → publish at once

Nothing is trained: every stage takes the seconds that it is given, drawn anew each time. What the
model knows beyond the stages is who waits for whom:

- a group simulates while the thread acts on the other ones, and the thread waits for the group
  whose turn it is;
- the queue is bounded: a thread that finds it full waits, first come, first served;
- updates are dispatched and not waited for. A version is handed out before it is computed, so that
  the first action with it waits for its update; the learner is at most `ahead` updates in front;
- on one accelerator (`one_device`) policy and updates run one at a time, in the order asked for. On
  a CPU they run side by side, each slower: measure the stages where both run.

Shapes: N actors, G groups of b rows each, T steps, B rows of an update.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Generator, Sequence

import numpy as np

Draw = Callable[[np.random.Generator], float]  # seconds
Process = Generator[float, None, None]  # yields the time at which it goes on; PARKED: when woken
PARKED = float('inf')


def constant(seconds: float) -> Draw:
    return lambda random: seconds


def exponential(mean: float) -> Draw:
    return lambda random: float(random.exponential(mean))


def measured(seconds: Sequence[float]) -> Draw:
    """One of the values that were measured."""
    values = np.asarray(seconds, float)
    return lambda random: float(values[random.integers(len(values))])


def engines(rows: int, cores: int, step: float, spread: float, reset: float, every: int) -> Draw:
    """A step of `rows` engines on `cores` cores: the group waits for its slowest core.

    Args:
      rows: engines, spread evenly over the cores.
      cores: that they have to themselves.
      step: mean seconds of an engine's step.
      spread: standard deviation of its logarithm; the step is log-normal.
      reset: seconds that a new episode takes.
      every: mean steps of an episode.
    """
    each = -(-rows // cores)

    def draw(random: np.random.Generator) -> float:
        shape = min(cores, rows), each
        seconds = step * np.exp(spread * random.standard_normal(shape) - spread**2 / 2)
        seconds += reset * (random.random(shape) < 1 / every)
        return float(seconds.sum(1).max())

    return draw


@dataclasses.dataclass(frozen=True)
class Topology:
    """What a config says of it; the names are those of `config.actors` and `config.train`.

    Attributes:
      actors: N.
      groups: G, of each actor.
      rows: b, `actors.batch`.
      batch: B; a multiple of b.
      length: T.
      queue: trajectories that it holds.
      max_lag: updates; older trajectories are dropped.
      ahead: updates that may be on their way when the learner takes the next trajectories; XLA
        has 32 on a CPU (`max_inflight_computations_per_device`), 0 waits for each.
      one_device: whether policy and updates take turns.
    """

    actors: int
    groups: int
    rows: int
    batch: int
    length: int
    queue: int
    max_lag: int = 10**9
    ahead: int = 32
    one_device: bool = False

    def __post_init__(self) -> None:
        if self.batch % self.rows:
            raise ValueError(f'batch = {self.batch}: expected a multiple of rows = {self.rows}')


@dataclasses.dataclass(frozen=True)
class Stages:
    """Seconds of each stage.

    Attributes:
      simulate: a step of a group's environments.
      act: what a thread does for a step of a group: copies, policy, sending.
      first: the same for the first step with new parameters, which may take longer.
      pack: making a trajectory of the steps.
      join: what the learner's thread does for an update, before it dispatches it.
      update: on the device.
    """

    simulate: Draw
    act: Draw
    first: Draw
    pack: Draw
    join: Draw
    update: Draw


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it, after the warm-up.

    Attributes:
      steps_per_second: of environments, that were learnt from.
      utilisation: share of the time in which an update was computed.
      queue_wait: mean seconds between a trajectory's put into the queue and its take.
      actor_wait: mean seconds that a thread waited for room, for each trajectory.
      lag: mean, in updates; lag_max: largest.
      dropped: trajectories that were too old.
    """

    steps_per_second: float
    utilisation: float
    queue_wait: float
    actor_wait: float
    lag: float
    lag_max: int
    dropped: int


@dataclasses.dataclass
class _Item:
    version: int
    put: float


class _System:
    """The state that the processes share, and the clock that runs them."""

    def __init__(self, topology: Topology, stages: Stages, seed: int):
        self.topology, self.stages = topology, stages
        self.random = np.random.default_rng(seed)
        self.now = 0.0
        self.version = 0  # of the newest parameters that are published
        self.ready = [0.0]  # version → when its update has been computed
        self.busy: list[float] = []  # version − 1 → seconds of its update
        self.lags: list[tuple[int, int]] = []  # version that learns, lag
        self.queue_waits: list[tuple[int, float]] = []
        self.actor_waits: list[tuple[int, float]] = []
        self.dropped = 0
        self._free = 0.0  # when the device is, if there is one for all
        self._queue: collections.deque[_Item] = collections.deque()
        self._putting: collections.deque[Process] = collections.deque()
        self._taking: collections.deque[Process] = collections.deque()
        self._order = itertools.count()  # of events at the same time: first come, first served
        self._events: list[tuple[float, int, Process]] = []

    def run(self, updates: int) -> None:
        for process in (*(self.actor() for _ in range(self.topology.actors)), self.learner()):
            self._at(0.0, process)
        while self.version < updates:
            self.now, _, process = heapq.heappop(self._events)
            self._running = process
            resumes = next(process)
            if resumes != PARKED:
                self._at(resumes, process)

    def actor(self) -> Process:
        """As `Actors._run` and `Worker.collect`."""
        topology, stages = self.topology, self.stages
        done = [0.0] * topology.groups
        while True:
            version = self.version
            for t in range(topology.length):
                for group in range(topology.groups):
                    yield max(self.now, done[group])
                    if t == 0 and group == 0:
                        yield max(self.now, self.ready[version])
                    seconds = (stages.act if t else stages.first)(self.random)
                    yield self._on_device(seconds) if topology.one_device else self.now + seconds
                    done[group] = self.now + stages.simulate(self.random)
            yield max(self.now, *done)
            for _ in range(topology.groups):
                yield self.now + stages.pack(self.random)
            for _ in range(topology.groups):
                began = self.now
                while len(self._queue) >= topology.queue:
                    self._putting.append(self._running)
                    yield PARKED
                self.actor_waits.append((self.version, self.now - began))
                self._queue.append(_Item(version, self.now))
                self._wake(self._taking)

    def learner(self) -> Process:
        """As `queued.take` and the loop around it."""
        topology, stages = self.topology, self.stages
        while True:
            taken = 0
            while taken < topology.batch // topology.rows:
                while not self._queue:
                    self._taking.append(self._running)
                    yield PARKED
                item = self._queue.popleft()
                self._wake(self._putting)
                self.queue_waits.append((self.version, self.now - item.put))
                lag = self.version - item.version
                if lag > topology.max_lag:
                    self.dropped += 1
                    continue
                self.lags.append((self.version, lag))
                taken += 1
            yield self.now + stages.join(self.random)
            seconds = stages.update(self.random)
            if topology.one_device:
                done = self._on_device(seconds)
            else:
                done = max(self.now, self.ready[-1]) + seconds
            self.ready.append(done)
            self.busy.append(seconds)
            yield max(self.now, self.ready[max(0, len(self.ready) - 1 - topology.ahead)])
            self.version += 1

    def _on_device(self, seconds: float) -> float:
        self._free = max(self.now, self._free) + seconds
        return self._free

    def _at(self, time: float, process: Process) -> None:
        heapq.heappush(self._events, (time, next(self._order), process))

    def _wake(self, waiting: collections.deque[Process]) -> None:
        if waiting:
            self._at(self.now, waiting.popleft())


def simulate(
    topology: Topology, stages: Stages, updates: int = 200, warmup: int = 50, seed: int = 0
) -> Outcome:
    """Runs the system for `updates` updates; what is told is of those after the first `warmup`."""
    system = _System(topology, stages, seed)
    system.run(updates)

    def after(rows: list[tuple[int, float]]) -> list[float]:
        return [value for version, value in rows if version >= warmup] or [0.0]

    seconds = system.ready[updates] - system.ready[warmup]
    lags = after([(version, float(lag)) for version, lag in system.lags])
    return Outcome(
        steps_per_second=(updates - warmup) * topology.batch * topology.length / seconds,
        utilisation=sum(system.busy[warmup:updates]) / seconds,
        queue_wait=float(np.mean(after(system.queue_waits))),
        actor_wait=float(np.mean(after(system.actor_waits))),
        lag=float(np.mean(lags)),
        lag_max=int(max(lags)),
        dropped=system.dropped,
    )


def collecting(topology: Topology, simulate: float, act: float) -> float:
    """Seconds of an actor's collection if all take the same: the closed form.

    The thread goes round its groups in max(G · act, act + simulate): either it never waits, and the
    last group simulates alone at the end, or it waits for the simulators in every round.
    """
    G, T = topology.groups, topology.length
    if G * act >= act + simulate:
        return T * G * act + simulate
    return T * (act + simulate) + (G - 1) * act


def rates(
    topology: Topology, simulate: float, act: float, pack: float, update: float
) -> tuple[float, float]:
    """Environment steps per second that the actors make and that the learner takes, each alone."""
    of_actor = topology.groups * topology.rows * topology.length
    seconds = collecting(topology, simulate, act) + topology.groups * pack
    return topology.actors * of_actor / seconds, topology.batch * topology.length / update
