"""Topologies 'threads' and 'ray': actors feed a bounded queue, the learner takes what there is.

The learner's state is saved and continued exactly; the environments start anew. The lag of a
trajectory is how many updates older the parameters are that acted on it; what is older than
`config.actors.max_lag` is dropped and counted.
"""

import contextlib
import functools
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from mi import checkpoint, metrics, optim, parallel, progress, run
from mi.rl import envs, learner, records, remote, setup
from mi.rl.actor import Episodes, Trajectory
from mi.rl.evaluate import Evaluation
from mi.rl.networks import Agent
from mi.rl.threads import Actors, Item
from mi.rl.worker import Policy, Worker, joined


def make_worker(
    config: ml_collections.ConfigDict,
    version: int,
    index: int,
    policy: Policy | None = None,
    birth: int = 0,
) -> Worker:
    """Worker `index` of this process of a run that goes on at `version`.

    With the policy, where there is one to share. The one that takes its place when it dies has the
    next number of birth, and with it other episodes.
    """
    actors = config.actors
    key = jax.random.key(config.seeds[0])
    for number in (version, index, jax.process_index(), birth):
        key = jax.random.fold_in(key, number)
    seeds = np.asarray(jax.random.randint(key, (actors.groups,), 0, 2**30))
    groups = [envs.pool(config.env.name, actors.batch, int(seed)) for seed in seeds]
    policy = policy or Policy(setup.agent(config, groups[0].spec))
    return Worker(groups, policy, config.train.length, key)


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one."""
    with contextlib.ExitStack() as stack:
        splits = {'eval': config.env.name, 'held_out': config.eval.held_out}
        evaluations = {
            split: stack.enter_context(Evaluation(name, config))
            for split, name in splits.items()
            if name
        }
        agent = setup.agent(config, evaluations['eval'].spec)
        for evaluation in evaluations.values():
            setup.fits(config, agent.spec, evaluation.spec)
        with run.start(workdir, config, profile) as this:
            _train(config, evaluations, agent, this)


def _train(
    config: ml_collections.ConfigDict,
    evaluations: dict[str, Evaluation],
    agent: Agent,
    this: run.Run,
) -> None:
    total, B, T = setup.updates(config), config.train.batch, config.train.length
    seed, tasks = config.seeds[0], agent.spec.tasks
    optimiser = optim.optimiser(config.optim, total)
    this.write('cost.json', {'steps': total, **setup.costs(agent, B, T)})
    mesh = parallel.mesh(B)
    state = start(agent, optimiser, seed, mesh)
    saved = checkpoint.Checkpoints(this.path / 'checkpoints', config.train.keep)
    restored = saved.restore(state)
    meta: dict[str, Any] = {'step': 0, 'metrics': 0}
    if restored is not None:
        state, meta = restored
    this.step = meta['step']

    hyperparameters = setup.hyperparameters(config)
    update = jax.jit(functools.partial(learner.update, agent, optimiser, hyperparameters))
    window = Window()
    with (
        this.log(total, meta['metrics']) as log,
        start_actors(config, agent, parallel.here(state.params), this.step) as actors,
    ):
        first_step = this.step
        while this.step < total:
            is_first = this.step == first_step
            with progress.work_if(is_first, 'waiting for the first trajectories'):
                items = take(config, actors, this.step, window)
            trajectory = on_devices(joined([item.trajectory for item in items]), mesh)
            with progress.work_if(is_first, 'compiling the update'):
                state, measured = this.traced(1, update, state, trajectory)
            this.step += 1
            step = this.step
            params = parallel.here(state.params)
            actors.publish(params, step)
            window.add(measured, items)
            recorded = step % config.train.log_every == 0
            stops = this.stops(recorded)
            saves = step % config.train.save_every == 0 or step == total or stops
            if recorded or saves:
                values, timing = window.take(whole=saves)
                means = {name: value.mean(keepdims=True) for name, value in values.items()}
                metrics.refuse_non_finite([seed], step, means)
                record: records.Record = {n: float(value[0]) for n, value in means.items()}
                record |= records.of_episodes(window.episodes(), tasks)
                record |= records.of_statistics(parallel.here(state.statistics), tasks)
                log.write(step, seed, 'train', {'env_steps': step * B * T, **record})
                rate = timing['updates'] * B * T / timing['seconds']
                timing |= {'steps_per_second': rate, 'queue': actors.waiting()}
                log.timing(step, timing)
                success = record['success'] or 0
                log.progress(step, f'success {success:.3f}', f'{rate:,.0f} steps/s')
            evaluates = step % config.train.eval_every == 0 or step == total
            if evaluates and parallel.first():
                for split, evaluation in evaluations.items():
                    for policy, scores in evaluation(agent, params, step, seed).items():
                        log.write(step, seed, split + policy, scores)
            if saves:
                saved.save(step, state, {'metrics': log.position()})
                if stops and step < total:
                    this.preempted()
            if recorded or saves:
                window = Window()  # after evaluation and saving, which are not training


def start(
    agent: Agent, optimiser: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh
) -> learner.State:
    """The learner's state before the first update, on every device."""

    def fresh() -> learner.State:
        params = setup.init_params(agent, jax.random.key(seed))
        return learner.start(params, optimiser, len(agent.spec.tasks))

    return parallel.once(fresh, out_shardings=parallel.whole(mesh))


def start_actors(
    config: ml_collections.ConfigDict, agent: Agent, params: Any, version: int
) -> Actors:
    numbers = range(config.actors.number)
    make = functools.partial(make_worker, config, version)
    queue = params, version, config.actors.queue, config.actors.timeout
    if config.train.topology == 'ray':
        cpus = remote.cpus_per_actor(config.actors.number)
        makers: Any = [
            functools.partial(remote.Remote, functools.partial(make, i), cpus) for i in numbers
        ]
        return Actors(makers, *queue, share=remote.share)
    policy = Policy(agent)
    makers = [functools.partial(make, i, policy) for i in numbers]
    return Actors(makers, *queue)


def take(
    config: ml_collections.ConfigDict, actors: Actors, step: int, window: 'Window'
) -> list[Item]:
    """The trajectories of one update, of this process's actors."""
    items: list[Item] = []
    began = time.perf_counter()
    each = config.train.batch // jax.process_count()
    while len(items) < each // config.actors.batch:
        item = actors.get()
        lag = step - item.version
        if lag > config.actors.max_lag:
            window.dropped += 1
            continue
        window.lags.append(lag)
        items.append(item)
    window.waited += time.perf_counter() - began
    return items


def on_devices(trajectory: Trajectory, mesh: jax.sharding.Mesh) -> Trajectory:
    carry = parallel.split(trajectory.carry, mesh, axis=0)
    return parallel.split(trajectory._replace(carry={}), mesh, axis=1)._replace(carry=carry)


class Window:
    """What was measured since the last record."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._measured: list[dict[str, jax.Array]] = []
        self._episodes: list[Episodes] = []
        self._actors_waited = 0.0
        self.lags: list[int] = []
        self.dropped = 0
        self.waited = 0.0

    def add(self, measured: dict[str, jax.Array], items: list[Item]) -> None:
        self._measured.append(measured)
        self._episodes += [item.episodes for item in items]
        self._actors_waited += sum(item.waited for item in items)

    def take(self, whole: bool) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Values of the updates, [updates], and what they took in seconds.

        Unless `whole`, the newest update is left out, as waiting for it would hold the learner up.
        """
        updates = len(self._measured)
        there = self._measured if whole or updates == 1 else self._measured[:-1]
        fetched = jax.device_get(there)
        values = {name: np.stack([m[name] for m in fetched]) for name in fetched[0]}
        values |= {
            'lag': np.asarray(self.lags),
            'lag_max': np.max(self.lags, keepdims=True),
            'dropped': np.asarray([self.dropped]),
        }
        timing = {
            'seconds': time.perf_counter() - self._began,
            'updates': updates,
            'learner_waited': self.waited,
            'actors_waited': self._actors_waited,
        }
        return values, timing

    def episodes(self) -> Episodes:
        return records.total(self._episodes)
