"""The model of `benchmarks.pipeline` against the real topology `threads`, on this machine.

    pip install -e '.[envpool]' && python -m benchmarks.actors

A training run is made of the parts of `mi.rl.actors.loop`: its actors, queue, `take` and update,
with a clock at every stage. The seconds of the stages, as they were in that run, go into the model;
what the model says of rate, lag, learner and queue stands beside what the run did. So the model is
checked in what it adds, who waits for whom; how stages slow each other down on shared cores is in
the measured seconds, and no prediction.

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
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags

from benchmarks import pipeline
from configs import rl as configs
from mi.rl import envs, factory
from mi.rl.actors import loop as actors_loop
from mi.rl.actors.threads import Actors
from mi.rl.actors.worker import Policy, Worker, joined
from mi.rl.envs.spec import HostEnvironment, Step
from mi.training import host, optim, sharding

UPDATES = flags.DEFINE_integer('updates', 60, 'Of each run, after the warm-up.', lower_bound=10)
ONLY = flags.DEFINE_list('only', ['catch', 'babyai'], 'Of these two.')
NUMBERS = flags.DEFINE_list('actors', ['1', '2'], 'Actor threads of the runs.')
JSON = flags.DEFINE_string('json', None, 'Where to write the figures too.')

WARMUP = 10  # updates in which programs are compiled and the queue fills
LEVELS = 'babyai/GoToRedBallGrey,GoToLocal,PickupLoc,PutNextLocal'


class Times:
    """Seconds of something that happens again and again."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float]] = []  # when it ended, how long it took

    def add(self, began: float) -> None:
        now = time.perf_counter()
        self._rows.append((now, now - began))

    def since(self, time: float) -> list[float]:
        return [seconds for ended, seconds in self._rows if ended >= time]


class ClockedEnvironment:
    """A `HostEnvironment` whose steps are waited for, and timed, in a thread of its own."""

    def __init__(self, environment: HostEnvironment):
        self.spec, self.batch = environment.spec, environment.batch
        self.simulated = Times()
        self.waited = Times()  # of its caller, for it
        self._environment = environment
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def reset(self) -> Step:
        return self._environment.reset()

    def send(self, actions: np.ndarray) -> None:
        self._step = self._thread.submit(self._simulate, actions)

    def recv(self) -> Step:
        began = time.perf_counter()
        step = self._step.result()
        self.waited.add(began)
        return step

    def close(self) -> None:
        self._thread.shutdown()
        self._environment.close()

    def _simulate(self, actions: np.ndarray) -> Step:
        began = time.perf_counter()
        self._environment.send(actions)
        step = self._environment.recv()
        self.simulated.add(began)
        return step


class ClockedPolicy(Policy):
    """A policy that is timed from the moment at which its parameters are there."""

    def __init__(self, agent: Any):
        super().__init__(agent)
        self.acted, self.first = Times(), Times()
        self.waited = Times()  # for parameters

    def __call__(self, params: Any, acting: Any, inputs: Any, new: bool = False) -> Any:
        if new:
            asked = time.perf_counter()
            jax.block_until_ready(params)
            self.waited.add(asked)
        began = time.perf_counter()
        result = jax.block_until_ready(super().__call__(params, acting, inputs, new))
        (self.first if new else self.acted).add(began)
        return result


class ClockedWorker(Worker):
    """A worker that is timed; what is neither policy nor waiting is `rest`."""

    def __init__(self, environments: Sequence[HostEnvironment], *args: Any):
        self.environments = [ClockedEnvironment(e) for e in environments]
        self.collected = Times()
        super().__init__(self.environments, *args)

    def collect(self, params: Any) -> Any:
        began = time.perf_counter()
        result = super().collect(params)
        self.collected.add(began)
        return result


class Updates:
    """How long each update took on the device: from its start, or the end of the one before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.done: list[float] = []
        self._queue: queue.SimpleQueue[tuple[float, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def dispatched(self, result: Any) -> None:
        self._queue.put((time.perf_counter(), result))

    def wait(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _watch(self) -> None:
        while (entry := self._queue.get()) is not None:
            dispatched, result = entry
            jax.block_until_ready(result)
            now = time.perf_counter()
            self.seconds.append(now - max([dispatched, *self.done[-1:]]))
            self.done.append(now)


def config_of(name: str, number: int) -> ml_collections.ConfigDict:
    """The config of a set, with so many actor threads."""
    if name == 'catch':
        config = configs.get_config('catch').unlock()
    else:
        config = configs.get_config().unlock()
        config.env.name = LEVELS
        config.model.update({'instruction': True, 'sites': ('instruction',)})
        config.model.fusion.name = 'concat'
    config.train.topology = 'threads'
    config.actors.number = number
    return config


def topology(config: ml_collections.ConfigDict) -> pipeline.Topology:
    """What the model has to know of a config, on a CPU."""
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


def measure(
    config: ml_collections.ConfigDict, updates: int
) -> tuple[pipeline.Stages, pipeline.Outcome, dict[str, float]]:
    """Trains for so many updates: what the stages took, what came of it, medians of the stages."""
    T, B, G = config.train.length, config.train.batch, config.actors.groups
    pool = envs.pool(config.env.name, config.actors.batch, 0)
    agent, optimiser = factory.agent(config, pool.spec), optim.optimiser(config.optim, 1000)
    pool.close()
    mesh = sharding.mesh(1, B)
    state = actors_loop.start(agent, optimiser, 0, mesh)
    update = actors_loop.learner_update(agent, optimiser, factory.hyperparameters(config), mesh)
    policies, workers = [], []

    def make(index: int) -> ClockedWorker:
        groups = [
            envs.pool(config.env.name, config.actors.batch, 100 * index + g) for g in range(G)
        ]
        policies.append(ClockedPolicy(agent))
        key = jax.random.fold_in(jax.random.key(0), index)
        workers.append(ClockedWorker(groups, policies[-1], T, key))
        return workers[-1]

    watch, joins, actor_waits = Updates(), [], []
    lags: list[int] = []
    dropped = 0
    makers = [functools.partial(make, i) for i in range(config.actors.number)]
    settings = config.actors.queue, config.actors.timeout
    with Actors(makers, state.params, 0, *settings) as actors:
        for step in range(WARMUP + updates):
            if step == WARMUP:
                start = time.perf_counter()
            window = actors_loop.Window()
            items = actors_loop.take(config, actors, step, window)
            began = time.perf_counter()
            trajectory = joined([item.trajectory for item in items])
            state, _ = update(state, trajectory)
            watch.dispatched(state)
            actors.publish(state.params, step + 1)
            if step >= WARMUP:
                joins.append(time.perf_counter() - began)
                lags += window.lags
                dropped += window.dropped
                actor_waits += [item.waited for item in items]
        watch.wait()
    acted = [s for policy in policies for s in policy.acted.since(start)]
    first = [s for policy in policies for s in policy.first.since(start)]
    rest = statistics.mean(
        _rest(policy, worker, start) / (T * G)
        for policy, worker in zip(policies, workers, strict=True)
    )
    simulated = [s for w in workers for e in w.environments for s in e.simulated.since(start)]
    taken = watch.seconds[WARMUP:]
    span = watch.done[-1] - watch.done[WARMUP - 1]
    stages = pipeline.Stages(
        simulate=pipeline.measured(simulated),
        act=pipeline.measured([a + rest for a in acted]),
        first=pipeline.measured([a + rest for a in first]),
        pack=pipeline.constant(0.0),  # in the rest
        join=pipeline.measured(joins),
        update=pipeline.measured(taken),
    )
    outcome = pipeline.Outcome(
        steps_per_second=updates * B * T / span,
        utilisation=sum(taken) / span,
        queue_wait=float('nan'),  # the queue does not tell
        actor_wait=float(np.mean(actor_waits)),
        lag=float(np.mean(lags)),
        lag_max=max(lags),
        dropped=dropped,
    )
    medians = {
        'simulate': statistics.median(simulated),
        'act': statistics.median(acted) + rest,
        'first': statistics.median(first) + rest,
        'join': statistics.median(joins),
        'update': statistics.median(taken),
    }
    return stages, outcome, medians


def _rest(policy: ClockedPolicy, worker: ClockedWorker, start: float) -> float:
    """Seconds of a collection in which its thread neither acted nor waited."""
    parts = policy.acted, policy.first, policy.waited, *(e.waited for e in worker.environments)
    collected = worker.collected.since(start)
    busy = sum(sum(part.since(start)) for part in parts)
    return max(0.0, (sum(collected) - busy) / len(collected))


def main(argv: Sequence[str]) -> None:
    del argv
    host.keep_freed_memory()
    host.set_xla_flags()
    print(f'{host.machine()}, jax {jax.__version__}; seconds in ms, rates in environment steps/s')
    figures = []
    for name in ONLY.value:
        for number in map(int, NUMBERS.value):
            config = config_of(name, number)
            stages, outcome, medians = measure(config, UPDATES.value)
            model = pipeline.simulate(topology(config), stages, updates=400, warmup=50)
            print(f'\n{name}, {number} actors: ', end='')
            print(', '.join(f'{stage} {1000 * s:.2f}' for stage, s in medians.items()))
            for label, it in (('measured', outcome), ('model', model)):
                print(
                    f'  {label:<9} {it.steps_per_second:9,.0f} steps/s, learner busy '
                    f'{it.utilisation:.2f}, lag {it.lag:.2f} (at most {it.lag_max}), an actor '
                    f'waits {1000 * it.actor_wait:.1f} for room',
                    flush=True,
                )
            figures.append(
                {
                    'set': name,
                    'actors': number,
                    'seconds': medians,
                    'measured': dataclasses.asdict(outcome) | {'queue_wait': None},
                    'model': dataclasses.asdict(model),
                    'ratio': model.steps_per_second / outcome.steps_per_second,
                }
            )
    if JSON.value:
        record = {
            'machine': host.machine(), 'jax': jax.__version__, 'updates': UPDATES.value,
            'figures': figures,
        }  # fmt: skip
        with open(JSON.value, 'w') as file:
            json.dump(record, file, indent=2)
            file.write('\n')


if __name__ == '__main__':
    app.run(main)
