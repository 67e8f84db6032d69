"""The simulation of `benchmarks.pipeline` against the real topology `threads`, on this machine.

    pip install -e '.[envpool]' && python -m benchmarks.actors

A training run consists of the parts of `mi.rl.actors.loop`: its actors, queue, `take` and update,
with a clock at every stage. The simulation takes the seconds of the stages from that run, and its
rate, lag, learner and queue are compared with those of the run. This checks what the simulation
adds: who waits for whom. It does not predict how stages slow each other down on shared cores, which
is part of the measured seconds.

    catch     Catch, B = 64, T = 20
    babyai    four levels of BabyAI with instructions, EnvPool, B = 128, T = 20
"""

import concurrent.futures
import dataclasses
import functools
import json
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags

from benchmarks import pipeline
from configs import rl as configs
from mi.rl import envs, factory
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.threads import Actors
from mi.rl.actors.worker import Policy, Worker, concatenate_trajectories
from mi.rl.envs.spec import HostEnvironment, Step
from mi.training import host, optim, sharding

UPDATES = flags.DEFINE_integer('updates', 60, 'Updates per run after the warm-up.', lower_bound=10)
ONLY = flags.DEFINE_list('only', ['catch', 'babyai'], 'Sets: catch, babyai.')
NUMBERS = flags.DEFINE_list('actors', ['1', '2'], 'Numbers of actor threads.')
JSON = flags.DEFINE_string('json', None, 'JSON file to write the figures to.')

WARMUP = 10  # updates in which programs are compiled and the queue fills
LEVELS = 'babyai/GoToRedBallGrey,GoToLocal,PickupLoc,PutNextLocal'


class Stopwatch:
    """Seconds of a repeated stage."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float]] = []  # end, seconds

    def add(self, start: float) -> None:
        """Add a stage that ends now."""
        end = time.perf_counter()
        self._rows.append((end, end - start))

    def since(self, start: float) -> list[float]:
        """Return the seconds of all stages that ended after a time."""
        return [seconds for end, seconds in self._rows if end >= start]


class ClockedEnvironment:
    """A `HostEnvironment` that simulates in its own thread and times its steps."""

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
        start = time.perf_counter()
        step = self._step.result()
        self.caller_wait.add(start)
        return step

    def close(self) -> None:
        self._thread.shutdown()
        self._environment.close()

    def _simulate(self, actions: np.ndarray) -> Step:
        start = time.perf_counter()
        self._environment.send(actions)
        step = self._environment.recv()
        self.simulation.add(start)
        return step


class ClockedPolicy(Policy):
    """A policy that times its calls, without the wait for its parameters."""

    def __init__(self, agent: Any):
        super().__init__(agent)
        self.calls, self.first_calls = Stopwatch(), Stopwatch()
        self.params_wait = Stopwatch()

    def __call__(self, params: Any, state: Any, inputs: Any, has_new_params: bool = False) -> Any:
        if has_new_params:
            wait_start = time.perf_counter()
            jax.block_until_ready(params)
            self.params_wait.add(wait_start)
        start = time.perf_counter()
        result = jax.block_until_ready(super().__call__(params, state, inputs, has_new_params))
        (self.first_calls if has_new_params else self.calls).add(start)
        return result


class ClockedWorker(Worker):
    """A worker that times its collections."""

    def __init__(self, environments: Sequence[HostEnvironment], *args: Any):
        self.environments = [ClockedEnvironment(environment) for environment in environments]
        self.collections = Stopwatch()
        super().__init__(self.environments, *args)

    def collect(self, params: Any) -> Any:
        start = time.perf_counter()
        result = super().collect(params)
        self.collections.add(start)
        return result


class UpdateClock:
    """Seconds of each update on the device, from its dispatch or the end of the previous update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.end_times: list[float] = []
        self._queue: queue.SimpleQueue[tuple[float, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def add(self, result: Any) -> None:
        """Time an update that was just dispatched."""
        self._queue.put((time.perf_counter(), result))

    def wait(self) -> None:
        """Wait until all updates are computed."""
        self._queue.put(None)
        self._thread.join()

    def _watch(self) -> None:
        while (entry := self._queue.get()) is not None:
            dispatch_time, result = entry
            jax.block_until_ready(result)
            end = time.perf_counter()
            self.seconds.append(end - max([dispatch_time, *self.end_times[-1:]]))
            self.end_times.append(end)


def make_config(name: str, num_actors: int) -> ml_collections.ConfigDict:
    """Return the config of a set."""
    if name == 'catch':
        config = configs.get_config('catch').unlock()
    else:
        config = configs.get_config().unlock()
        config.env.name = LEVELS
        config.model.update({'instruction': True, 'sites': ('instruction',)})
        config.model.fusion.name = 'concat'
    config.train.topology = 'threads'
    config.actors.number = num_actors
    return config


def make_topology(config: ml_collections.ConfigDict) -> pipeline.Topology:
    """Return the topology that a config describes."""
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


class Measurement(NamedTuple):
    """Stages and statistics of a run.

    Attributes:
      stages: distributions of the seconds per stage.
      outcome: statistics, as the simulation has them.
      medians: median seconds by stage.
    """

    stages: pipeline.Stages
    outcome: pipeline.Outcome
    medians: dict[str, float]


def measure(config: ml_collections.ConfigDict, updates: int) -> Measurement:
    """Train for a number of updates after the warm-up, and time every stage."""
    T, B, G = config.train.length, config.train.batch, config.actors.groups
    # Make the learner.
    pool = envs.pool(config.env.name, config.actors.batch, 0)
    agent, optimizer = (
        factory.build_agent(config, pool.spec),
        optim.make_optimizer(config.optim, 1000),
    )
    pool.close()
    mesh = sharding.make_mesh(1, B)
    state = actors_loop.init_state(agent, optimizer, 0, mesh)
    update = actors_loop.jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    policies: list[ClockedPolicy] = []
    workers: list[ClockedWorker] = []

    def make_worker(index: int) -> ClockedWorker:
        groups = [
            envs.pool(config.env.name, config.actors.batch, 100 * index + g) for g in range(G)
        ]
        policies.append(ClockedPolicy(agent))
        key = jax.random.fold_in(jax.random.key(0), index)
        workers.append(ClockedWorker(groups, policies[-1], T, key))
        return workers[-1]

    # Train, with the loop of `mi.rl.actors.loop`.
    clock = UpdateClock()
    joins: list[float] = []
    actor_waits: list[float] = []
    lags: list[int] = []
    dropped = 0
    makers = [functools.partial(make_worker, i) for i in range(config.actors.number)]
    settings = config.actors.queue, config.actors.timeout
    with Actors(makers, state.params, 0, *settings) as actors:
        for step in range(WARMUP + updates):
            if step == WARMUP:
                start = time.perf_counter()
            window = actors_loop.Window()
            items = actors_loop.take_batch(config, actors, step, window)
            join_start = time.perf_counter()
            trajectory = concatenate_trajectories([item.trajectory for item in items])
            state, _ = update(state, trajectory)
            clock.add(state)
            actors.publish(state.params, step + 1)
            if step >= WARMUP:
                joins.append(time.perf_counter() - join_start)
                lags += window.lags
                dropped += window.dropped
                actor_waits += [item.wait_seconds for item in items]
        clock.wait()
    # Collect the times after the warm-up.
    calls = [seconds for policy in policies for seconds in policy.calls.since(start)]
    first_calls = [seconds for policy in policies for seconds in policy.first_calls.since(start)]
    overhead = statistics.mean(
        _collection_overhead(policy, worker, start) / (T * G)
        for policy, worker in zip(policies, workers, strict=True)
    )
    simulations = [
        seconds
        for worker in workers
        for environment in worker.environments
        for seconds in environment.simulation.since(start)
    ]
    update_seconds = clock.seconds[WARMUP:]
    span = clock.end_times[-1] - clock.end_times[WARMUP - 1]
    return Measurement(
        stages=pipeline.Stages(
            simulate=pipeline.empirical(simulations),
            act=pipeline.empirical([seconds + overhead for seconds in calls]),
            first_act=pipeline.empirical([seconds + overhead for seconds in first_calls]),
            pack=pipeline.constant(0.0),  # part of the overhead
            join=pipeline.empirical(joins),
            update=pipeline.empirical(update_seconds),
        ),
        outcome=pipeline.Outcome(
            steps_per_second=updates * B * T / span,
            utilization=sum(update_seconds) / span,
            queue_wait=float('nan'),  # the real queue does not measure it
            actor_wait=float(np.mean(actor_waits)),
            lag=float(np.mean(lags)),
            lag_max=max(lags),
            dropped=dropped,
        ),
        medians={
            'simulate': statistics.median(simulations),
            'act': statistics.median(calls) + overhead,
            'first': statistics.median(first_calls) + overhead,
            'join': statistics.median(joins),
            'update': statistics.median(update_seconds),
        },
    )


def _collection_overhead(policy: ClockedPolicy, worker: ClockedWorker, start: float) -> float:
    """Return seconds per collection in which the thread neither acts nor waits."""
    stopwatches = [policy.calls, policy.first_calls, policy.params_wait]
    stopwatches += [environment.caller_wait for environment in worker.environments]
    collections = worker.collections.since(start)
    busy = sum(sum(stopwatch.since(start)) for stopwatch in stopwatches)
    return max(0.0, (sum(collections) - busy) / len(collections))


def main(argv: Sequence[str]) -> None:
    """Measure and simulate every set; print both."""
    del argv
    host.keep_freed_memory()
    host.set_xla_flags()
    print(f'{host.describe_machine()}, jax {jax.__version__}; seconds in ms, rates in steps/s')
    figures = []
    for name in ONLY.value:
        for num_actors in map(int, NUMBERS.value):
            config = make_config(name, num_actors)
            stages, real, medians = measure(config, UPDATES.value)
            model = pipeline.simulate(make_topology(config), stages, updates=400, warmup=50)
            print(f'\n{name}, {num_actors} actors: ', end='')
            print(', '.join(f'{stage} {1000 * s:.2f}' for stage, s in medians.items()))
            for label, outcome in (('measured', real), ('model', model)):
                print(
                    f'  {label:<9} {outcome.steps_per_second:9,.0f} steps/s, learner busy '
                    f'{outcome.utilization:.2f}, lag {outcome.lag:.2f} (at most '
                    f'{outcome.lag_max}), an actor waits {1000 * outcome.actor_wait:.1f} for the '
                    f'queue',
                    flush=True,
                )
            figures.append(
                {
                    'set': name,
                    'actors': num_actors,
                    'seconds': medians,
                    'measured': dataclasses.asdict(real) | {'queue_wait': None},
                    'model': dataclasses.asdict(model),
                    'ratio': model.steps_per_second / real.steps_per_second,
                }
            )
    if JSON.value:
        record = {
            'machine': host.describe_machine(), 'jax': jax.__version__, 'updates': UPDATES.value,
            'figures': figures,
        }  # fmt: skip
        with open(JSON.value, 'w') as file:
            json.dump(record, file, indent=2)
            file.write('\n')


if __name__ == '__main__':
    app.run(main)
