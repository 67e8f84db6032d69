"""A simulation of the actors, the bounded queue and the learner of `mi.rl.actors.threads`.

    actor: newest parameters → T times (receive, act, send) for each group → pack → put
    learner: take batch / rows trajectories → join → dispatch the update → publish immediately

Nothing is trained. The duration of every stage is drawn at random. The simulation models which
stage waits for which:

- A group simulates while its thread acts for the other groups. The thread serves the groups in turn
  and waits for each.
- The queue is bounded. Threads wait while it is full. The first to wait is served first.
- The learner dispatches updates without waiting for them. It publishes parameters before they are
  computed, so the first action with new parameters waits for their update. At most `max_in_flight`
  updates are pending.
- On one accelerator (`one_device`), policy calls and updates run one at a time, in the order of
  dispatch. On a CPU they run simultaneously and slow each other down, so the stages must be
  measured while both run.

Shapes: N actors, G groups of b rows each, T steps, B rows per update.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Generator, Sequence

import numpy as np

Distribution = Callable[[np.random.Generator], float]  # draws seconds
Process = Generator[float, None, None]  # yields when to resume; PARKED: when another wakes it
PARKED = float('inf')


def constant(seconds: float) -> Distribution:
    """Return the distribution of a constant duration."""
    return lambda random: seconds


def exponential(mean: float) -> Distribution:
    """Return an exponential distribution of durations."""
    return lambda random: float(random.exponential(mean))


def empirical(seconds: Sequence[float]) -> Distribution:
    """Return the uniform distribution over measured durations."""
    measured_seconds = np.asarray(seconds, float)
    return lambda random: float(measured_seconds[random.integers(len(measured_seconds))])


@dataclasses.dataclass(frozen=True)
class Engine:
    """The timing of a simulator for one environment on one core.

    Attributes:
      step: mean seconds per step.
      spread: standard deviation of the step time's logarithm, which is normally distributed.
      reset: seconds that a new episode adds.
      episode_length: mean number of steps per episode.
    """

    step: float
    spread: float
    reset: float
    episode_length: int


def engine_group(rows: int, cores: int, engine: Engine) -> Distribution:
    """Return the step-time distribution for a group, which waits for its slowest core.

    Args:
      rows: number of engines, distributed evenly over the cores.
      cores: number of cores, which do nothing else.
      engine: timing of one engine.
    """
    rows_per_core = -(-rows // cores)

    def draw(random: np.random.Generator) -> float:
        shape = min(cores, rows), rows_per_core
        noise = engine.spread * random.standard_normal(shape) - engine.spread**2 / 2
        seconds = engine.step * np.exp(noise)
        seconds += engine.reset * (random.random(shape) < 1 / engine.episode_length)
        return float(seconds.sum(1).max())

    return draw


@dataclasses.dataclass(frozen=True)
class Topology:
    """The sizes of actors, queue and learner, named as in `config.actors` and `config.train`.

    Attributes:
      actors: number of actors, N.
      groups: number of groups per actor, G.
      rows: number of rows per group, b (`actors.batch`).
      batch: number of rows per update, B, a multiple of b.
      length: number of steps in a trajectory, T.
      queue: capacity of the queue in trajectories.
      max_lag: maximum lag in updates. The learner drops older trajectories.
      max_in_flight: maximum number of pending updates when the learner takes the next trajectories.
        On a CPU, XLA allows 32 (`max_inflight_computations_per_device`). 0 waits for each update.
      one_device: whether policy calls and updates take turns on one device.
    """

    actors: int
    groups: int
    rows: int
    batch: int
    length: int
    queue: int
    max_lag: int = 10**9
    max_in_flight: int = 32
    one_device: bool = False

    def __post_init__(self) -> None:
        if self.batch % self.rows:
            raise ValueError(f'batch = {self.batch}: expected a multiple of rows = {self.rows}')


@dataclasses.dataclass(frozen=True)
class Stages:
    """The distribution of each stage's duration.

    Attributes:
      simulate: a step of a group's environments.
      act: the work of a thread for one step of a group: copies, policy, sending.
      first_act: the same for the first step with new parameters, which may take longer.
      pack: combining steps into a trajectory.
      join: the work of the learner's thread before it dispatches an update.
      update: an update on the device.
    """

    simulate: Distribution
    act: Distribution
    first_act: Distribution
    pack: Distribution
    join: Distribution
    update: Distribution


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Statistics of a run, excluding the warm-up.

    Attributes:
      steps_per_second: environment steps per second that the learner consumes.
      utilization: fraction of the time in which the device computes an update.
      queue_wait: mean seconds that a trajectory spends in the queue.
      actor_wait: mean seconds per trajectory that a thread waits because the queue is full.
      lag: mean lag of trajectories in updates.
      lag_max: largest lag.
      dropped: number of trajectories that exceeded `max_lag`.
    """

    steps_per_second: float
    utilization: float
    queue_wait: float
    actor_wait: float
    lag: float
    lag_max: int
    dropped: int


@dataclasses.dataclass
class _Trajectory:
    version: int  # of its parameters
    put_time: float


class _System:
    """The state shared by the simulated processes, and the event queue that runs them."""

    def __init__(self, topology: Topology, stages: Stages, seed: int):
        self.topology, self.stages = topology, stages
        self.random = np.random.default_rng(seed)
        self.now = 0.0
        self.version = 0  # newest published parameters
        self.ready_times = [0.0]  # version → time at which its update is computed
        self.update_seconds: list[float] = []  # version − 1 → seconds of its update
        # Statistics, each with the learner's version.
        self.lags: list[tuple[int, float]] = []
        self.queue_waits: list[tuple[int, float]] = []
        self.actor_waits: list[tuple[int, float]] = []
        self.dropped: list[int] = []  # the learner's version at each drop
        self._device_free_time = 0.0
        self._queue: collections.deque[_Trajectory] = collections.deque()
        self._blocked_actors: collections.deque[Process] = collections.deque()
        self._blocked_learners: collections.deque[Process] = collections.deque()
        self._event_numbers = (
            itertools.count()
        )  # order simultaneous events: first come, first served
        self._events: list[tuple[float, int, Process]] = []

    def run(self, updates: int) -> None:
        """Run all processes until the learner has published `updates` versions."""
        for process in (*(self.actor() for _ in range(self.topology.actors)), self.learner()):
            self._schedule(0.0, process)
        while self.version < updates:
            self.now, _, process = heapq.heappop(self._events)
            self._running = process
            resume_time = next(process)
            if resume_time != PARKED:
                self._schedule(resume_time, process)

    def actor(self) -> Process:
        """Collect and enqueue trajectories, like `Actors._run_worker` and `Worker.collect`."""
        topology, stages = self.topology, self.stages
        simulated_times = [0.0] * topology.groups
        while True:
            # Collect T steps per group with the newest parameters.
            version = self.version
            for step_index in range(topology.length):
                for group in range(topology.groups):
                    yield max(self.now, simulated_times[group])
                    if step_index == 0 and group == 0:
                        yield max(self.now, self.ready_times[version])
                    seconds = (stages.act if step_index else stages.first_act)(self.random)
                    yield self._use_device(seconds) if topology.one_device else self.now + seconds
                    simulated_times[group] = self.now + stages.simulate(self.random)
            # Pack a trajectory per group once all have simulated.
            yield max(self.now, *simulated_times)
            for _ in range(topology.groups):
                yield self.now + stages.pack(self.random)
            # Put them into the queue, and wait while it is full.
            for _ in range(topology.groups):
                put_start = self.now
                while len(self._queue) >= topology.queue:
                    self._blocked_actors.append(self._running)
                    yield PARKED
                self.actor_waits.append((self.version, self.now - put_start))
                self._queue.append(_Trajectory(version, self.now))
                self._wake(self._blocked_learners)

    def learner(self) -> Process:
        """Take trajectories, update and publish, like `mi.rl.actors.loop`."""
        topology, stages = self.topology, self.stages
        while True:
            # Take a batch of trajectories that are not too old.
            num_taken = 0
            while num_taken < topology.batch // topology.rows:
                while not self._queue:
                    self._blocked_learners.append(self._running)
                    yield PARKED
                trajectory = self._queue.popleft()
                self._wake(self._blocked_actors)
                self.queue_waits.append((self.version, self.now - trajectory.put_time))
                lag = self.version - trajectory.version
                if lag > topology.max_lag:
                    self.dropped.append(self.version)
                    continue
                self.lags.append((self.version, float(lag)))
                num_taken += 1
            # Dispatch the update.
            yield self.now + stages.join(self.random)
            seconds = stages.update(self.random)
            if topology.one_device:
                ready_time = self._use_device(seconds)
            else:
                ready_time = max(self.now, self.ready_times[-1]) + seconds
            self.ready_times.append(ready_time)
            self.update_seconds.append(seconds)
            # Publish it as soon as few enough updates are pending.
            oldest_version = max(0, len(self.ready_times) - 1 - topology.max_in_flight)
            yield max(self.now, self.ready_times[oldest_version])
            self.version += 1

    def _use_device(self, seconds: float) -> float:
        self._device_free_time = max(self.now, self._device_free_time) + seconds
        return self._device_free_time

    def _schedule(self, time: float, process: Process) -> None:
        heapq.heappush(self._events, (time, next(self._event_numbers), process))

    def _wake(self, waiting: collections.deque[Process]) -> None:
        if waiting:
            self._schedule(self.now, waiting.popleft())


def simulate(
    topology: Topology, stages: Stages, updates: int = 200, warmup: int = 50, seed: int = 0
) -> Outcome:
    """Simulate `updates` updates and return statistics that exclude the first `warmup`."""
    system = _System(topology, stages, seed)
    system.run(updates)

    def drop_warmup(versioned: list[tuple[int, float]]) -> list[float]:
        return [statistic for version, statistic in versioned if version >= warmup] or [0.0]

    span = system.ready_times[updates] - system.ready_times[warmup]
    lags = drop_warmup(system.lags)
    return Outcome(
        steps_per_second=(updates - warmup) * topology.batch * topology.length / span,
        utilization=sum(system.update_seconds[warmup:updates]) / span,
        queue_wait=float(np.mean(drop_warmup(system.queue_waits))),
        actor_wait=float(np.mean(drop_warmup(system.actor_waits))),
        lag=float(np.mean(lags)),
        lag_max=int(max(lags)),
        dropped=sum(version >= warmup for version in system.dropped),
    )


def compute_collection_time(topology: Topology, simulate: float, act: float) -> float:
    """Return the seconds per collection of an actor with constant stages, in closed form.

    A round over the groups takes max(G · act, act + simulate). Either the thread waits for the
    simulators in every round, or it waits only for the last group at the end.
    """
    G, T = topology.groups, topology.length
    if G * act >= act + simulate:
        return T * G * act + simulate
    return T * (act + simulate) + (G - 1) * act


def compute_rates(
    topology: Topology, simulate: float, act: float, pack: float, update: float
) -> tuple[float, float]:
    """Return the environment steps per second of the actors alone and of the learner alone."""
    actor_steps = topology.groups * topology.rows * topology.length
    seconds = compute_collection_time(topology, simulate, act) + topology.groups * pack
    return topology.actors * actor_steps / seconds, topology.batch * topology.length / update
