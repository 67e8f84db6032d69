"""A comparison of the simulation in `benchmarks.pipeline` with the topology 'threads'.

    pip install -e '.[sweep,envpool]' && python -m benchmarks.actors

A training run uses the actors, the queue and the update of `mi.rl.actors.loop`, and times every
stage. The simulation draws the duration of each stage from that run. Its rate, lag, learner
utilization and queue are then compared with those of the run. This tests how the simulation models
which stage waits for which. It does not test how stages slow each other down on shared cores,
because the measured durations include this effect.

    catch     Catch, B = 64, T = 20
    babyai    four levels of BabyAI with instructions, EnvPool, B = 128, T = 20
"""

import concurrent.futures
import dataclasses
import functools
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import ml_collections
import numpy as np
from absl import flags
from chex import Array

from benchmarks import babyai, options, pipeline
from configs import rl as configs
from mi.rl import envs, factory
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.threads import Actors
from mi.rl.actors.worker import Policy, PolicyState, Worker, concatenate_trajectories
from mi.rl.agent import Agent, Inputs, Params
from mi.rl.envs.spec import HostEnvironment, Step
from mi.rl.trajectory import Episodes, Trajectory
from mi.training import host, optim, sharding

UPDATES = flags.DEFINE_integer('updates', 60, 'Updates per run after the warm-up.', lower_bound=10)
NUMBERS = flags.DEFINE_list('actors', ['1', '2'], 'Numbers of actor threads.')
ONLY = options.define_only('Sets: catch, babyai')
JSON = options.define_json()

SETS = ('catch', 'babyai')
WARMUP = 10  # updates in which programs are compiled and the queue fills


class Stopwatch:
    """The durations of a repeated stage, in seconds."""

    def __init__(self) -> None:
        self._stages: list[tuple[float, float]] = []  # end, seconds

    def add(self, start_time: float) -> None:
        """Add the duration of a stage that ends now."""
        end_time = time.perf_counter()
        self._stages.append((end_time, end_time - start_time))

    def since(self, start_time: float) -> list[float]:
        """Return the durations of all stages that ended after `start_time`."""
        return [seconds for end_time, seconds in self._stages if end_time >= start_time]


class ClockedEnvironment:
    """A `HostEnvironment` that steps in its own thread and times its steps."""

    def __init__(self, environment: HostEnvironment):
        self.spec, self.batch = environment.spec, environment.batch
        self.simulation = Stopwatch()
        self.caller_wait = Stopwatch()
        self._environment = environment
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def reset(self) -> Step:
        return self._environment.reset()

    def send(self, actions: np.ndarray) -> None:
        self._step = self._thread.submit(self._simulate, actions)

    def recv(self) -> Step:
        start_time = time.perf_counter()
        env_step = self._step.result()
        self.caller_wait.add(start_time)
        return env_step

    def close(self) -> None:
        self._thread.shutdown()
        self._environment.close()

    def _simulate(self, actions: np.ndarray) -> Step:
        start_time = time.perf_counter()
        self._environment.send(actions)
        env_step = self._environment.recv()
        self.simulation.add(start_time)
        return env_step


class ClockedPolicy(Policy):
    """A policy that times its calls, excluding the time spent waiting for parameters."""

    def __init__(self, agent: Agent):
        super().__init__(agent)
        self.calls, self.first_calls = Stopwatch(), Stopwatch()
        self.params_wait = Stopwatch()

    def __call__(
        self,
        params: Params,
        state: PolicyState,
        inputs: Inputs,
        has_new_params: bool = False,
    ) -> tuple[PolicyState, Array, Array]:
        if has_new_params:
            wait_start = time.perf_counter()
            jax.block_until_ready(params)
            self.params_wait.add(wait_start)
        start_time = time.perf_counter()
        decision = jax.block_until_ready(super().__call__(params, state, inputs, has_new_params))
        (self.first_calls if has_new_params else self.calls).add(start_time)
        return decision


class ClockedWorker(Worker):
    """A worker that times its collections."""

    def __init__(self, environments: Sequence[HostEnvironment], *args: Any):
        self.environments = [ClockedEnvironment(environment) for environment in environments]
        self.collections = Stopwatch()
        super().__init__(self.environments, *args)

    def collect(self, params: Params) -> list[tuple[Trajectory, Episodes]]:
        start_time = time.perf_counter()
        trajectories = super().collect(params)
        self.collections.add(start_time)
        return trajectories


class UpdateClock:
    """The durations of updates on the device, in seconds.

    An update starts when it is dispatched or when the previous one ends, whichever is later.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.end_times: list[float] = []
        self._queue: queue.SimpleQueue[tuple[float, chex.ArrayTree] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def add(self, result: chex.ArrayTree) -> None:
        """Time an update that has just been dispatched."""
        self._queue.put((time.perf_counter(), result))

    def wait(self) -> None:
        """Wait until all updates have been computed."""
        self._queue.put(None)
        self._thread.join()

    def _watch(self) -> None:
        while (entry := self._queue.get()) is not None:
            dispatch_time, result = entry
            jax.block_until_ready(result)
            end_time = time.perf_counter()
            self.seconds.append(end_time - max([dispatch_time, *self.end_times[-1:]]))
            self.end_times.append(end_time)


def make_config(set_name: str, num_actors: int) -> ml_collections.ConfigDict:
    """Return the config for 'catch' or 'babyai'."""
    if set_name == 'catch':
        config = configs.get_config('catch').unlock()
    else:
        config = configs.get_config().unlock()
        config.update_from_flattened_dict(babyai.SETTINGS | {'model.fusion.name': 'concat'})
    config.train.topology = 'threads'
    config.actors.number = num_actors
    return config


def make_topology(config: ml_collections.ConfigDict) -> pipeline.Topology:
    """Return the simulated topology for a config."""
    actors = config.actors
    return pipeline.Topology(
        actors=actors.number,
        groups=actors.groups,
        rows=actors.batch,
        batch=config.train.batch,
        length=config.train.length,
        queue=actors.queue,
        max_lag=actors.max_lag,
        one_device=jax.default_backend() != 'cpu',
    )


class ClockedTeam:
    """The actors of a config, which time each of their stages."""

    def __init__(self, config: ml_collections.ConfigDict, agent: Agent):
        self._config, self._agent = config, agent
        self._policies: list[ClockedPolicy] = []
        self._workers: list[ClockedWorker] = []

    def make_worker(self, index: int) -> ClockedWorker:
        """Make the worker of an actor, with its own environments, policy and random key."""
        actors = self._config.actors
        first_seed = 100 * index
        pools = [
            envs.pool(self._config.env.name, actors.batch, first_seed + group)
            for group in range(actors.groups)
        ]
        policy = ClockedPolicy(self._agent)
        worker_key = jax.random.fold_in(jax.random.key(0), index)
        worker = ClockedWorker(pools, policy, self._config.train.length, worker_key)
        self._policies.append(policy)
        self._workers.append(worker)
        return worker

    def simulations(self, start_time: float) -> list[float]:
        """Return the durations of all environment steps after `start_time`."""
        return [
            seconds
            for worker in self._workers
            for environment in worker.environments
            for seconds in environment.simulation.since(start_time)
        ]

    def policy_calls(self, start_time: float) -> tuple[list[float], list[float]]:
        """Return the durations of policy calls after `start_time`, with old and new parameters."""
        calls = [seconds for policy in self._policies for seconds in policy.calls.since(start_time)]
        first_calls = [
            seconds for policy in self._policies for seconds in policy.first_calls.since(start_time)
        ]
        return calls, first_calls

    def overhead(self, start_time: float) -> float:
        """Return the mean seconds per step in which a thread neither acts nor waits."""
        steps_per_collection = self._config.train.length * self._config.actors.groups
        return statistics.mean(
            _collection_overhead(policy, worker, start_time) / steps_per_collection
            for policy, worker in zip(self._policies, self._workers, strict=True)
        )


class LearnerClock:
    """Durations and statistics of the learner after the warm-up."""

    def __init__(self) -> None:
        self.updates = UpdateClock()
        self.joins: list[float] = []
        self.actor_waits: list[float] = []
        self.lags: list[int] = []
        self.num_dropped = 0
        self.start_time = 0.0  # of the first update after the warm-up


def train(config: ml_collections.ConfigDict, num_updates: int) -> tuple[ClockedTeam, LearnerClock]:
    """Train with the parts of `mi.rl.actors.loop`, and return the measured durations."""
    # Make the learner.
    pool = envs.pool(config.env.name, config.actors.batch, 0)
    agent = factory.build_agent(config, pool.spec)
    optimizer = optim.make_optimizer(config.optim, 1000)
    pool.close()
    mesh = sharding.make_mesh(1, config.train.batch)
    learner_state = actors_loop.init_state(agent, optimizer, 0, mesh)
    update = actors_loop.jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)

    # Start the actors, and update with their trajectories.
    team, clock = ClockedTeam(config, agent), LearnerClock()
    makers = [functools.partial(team.make_worker, i) for i in range(config.actors.number)]
    settings = config.actors.queue, config.actors.timeout
    with Actors(makers, learner_state.params, 0, *settings) as actors:
        for step in range(WARMUP + num_updates):
            if step == WARMUP:
                clock.start_time = time.perf_counter()
            window = actors_loop.Window()
            items = actors_loop.take_batch(config, actors, step, window)
            join_start = time.perf_counter()
            trajectory = concatenate_trajectories([item.trajectory for item in items])
            learner_state, _ = update(learner_state, trajectory)
            clock.updates.add(learner_state)
            actors.publish(learner_state.params, step + 1)

            # Add the statistics of the update, unless it belongs to the warm-up.
            if step >= WARMUP:
                clock.joins.append(time.perf_counter() - join_start)
                clock.lags += window.lags
                clock.num_dropped += window.dropped
                clock.actor_waits += [item.wait_seconds for item in items]
        clock.updates.wait()
    return team, clock


class Measurement(NamedTuple):
    """The results of a training run.

    Attributes:
      stages: distribution of each stage's duration.
      outcome: statistics of the run, in the same form as those of the simulation.
      medians: stage → median duration in seconds.
    """

    stages: pipeline.Stages
    outcome: pipeline.Outcome
    medians: dict[str, float]


def measure(config: ml_collections.ConfigDict, num_updates: int) -> Measurement:
    """Train for `num_updates` updates after the warm-up, and measure every stage."""
    team, clock = train(config, num_updates)

    # Collect the times after the warm-up; a call of the policy includes its share of the overhead.
    calls, first_calls = team.policy_calls(clock.start_time)
    overhead = team.overhead(clock.start_time)
    simulations = team.simulations(clock.start_time)
    update_seconds = clock.updates.seconds[WARMUP:]
    span = clock.updates.end_times[-1] - clock.updates.end_times[WARMUP - 1]
    num_steps = num_updates * config.train.batch * config.train.length
    return Measurement(
        stages=pipeline.Stages(
            simulate=pipeline.empirical(simulations),
            act=pipeline.empirical([seconds + overhead for seconds in calls]),
            first_act=pipeline.empirical([seconds + overhead for seconds in first_calls]),
            pack=pipeline.constant(0.0),  # part of the overhead
            join=pipeline.empirical(clock.joins),
            update=pipeline.empirical(update_seconds),
        ),
        outcome=pipeline.Outcome(
            steps_per_second=num_steps / span,
            utilization=sum(update_seconds) / span,
            queue_wait=float('nan'),  # the real queue does not measure it
            actor_wait=float(np.mean(clock.actor_waits)),
            lag=float(np.mean(clock.lags)),
            lag_max=max(clock.lags),
            dropped=clock.num_dropped,
        ),
        medians={
            'simulate': statistics.median(simulations),
            'act': statistics.median(calls) + overhead,
            'first': statistics.median(first_calls) + overhead,
            'join': statistics.median(clock.joins),
            'update': statistics.median(update_seconds),
        },
    )


def _collection_overhead(policy: ClockedPolicy, worker: ClockedWorker, start_time: float) -> float:
    """Return the seconds per collection in which the thread neither acts nor waits."""
    stopwatches = [policy.calls, policy.first_calls, policy.params_wait]
    stopwatches += [environment.caller_wait for environment in worker.environments]
    collections = worker.collections.since(start_time)
    busy_seconds = sum(sum(stopwatch.since(start_time)) for stopwatch in stopwatches)
    return max(0.0, (sum(collections) - busy_seconds) / len(collections))


def compare(set_name: str, num_actors: int) -> dict[str, Any]:
    """Measure, simulate and print one set, and return an entry for the JSON file."""
    config = make_config(set_name, num_actors)
    stages, measured, medians = measure(config, UPDATES.value)
    simulated = pipeline.simulate(make_topology(config), stages, updates=400, warmup=50)

    # Print the seconds of the stages, and a line for each of the two.
    print(f'\n{set_name}, {num_actors} actors: ', end='')
    print(', '.join(f'{stage} {1000 * seconds:.2f}' for stage, seconds in medians.items()))
    for label, outcome in (('measured', measured), ('model', simulated)):
        print(
            f'  {label:<9} {outcome.steps_per_second:9,.0f} steps/s, learner busy '
            f'{outcome.utilization:.2f}, lag {outcome.lag:.2f} (at most '
            f'{outcome.lag_max}), an actor waits {1000 * outcome.actor_wait:.1f} for the '
            f'queue',
            flush=True,
        )
    return {
        'set': set_name,
        'actors': num_actors,
        'seconds': medians,
        'measured': dataclasses.asdict(measured) | {'queue_wait': None},
        'model': dataclasses.asdict(simulated),
        'ratio': simulated.steps_per_second / measured.steps_per_second,
    }


def main(argv: Sequence[str]) -> None:
    """Measure, simulate and print every set."""
    del argv
    host.keep_freed_memory()
    host.set_xla_flags()
    print(f'{host.describe_machine()}, jax {jax.__version__}; seconds in ms, rates in steps/s')
    figures = [
        compare(set_name, num_actors)
        for set_name in options.select(ONLY, SETS)
        for num_actors in map(int, NUMBERS.value)
    ]
    options.write_json(JSON.value, updates=UPDATES.value, figures=figures)


if __name__ == '__main__':
    options.run(main)
