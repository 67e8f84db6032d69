"""Topologies 'threads' and 'ray': actors feed a bounded queue, the learner takes what there is.

The learner's state is saved and continued exactly; the environments start anew. The lag of a
trajectory is how many updates older the parameters are that acted on it; what is older than
`config.actors.max_lag` is dropped and counted.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from mi.rl import (
    config as rl_config,
)
from mi.rl import (
    envs,
    episode_metrics,
    factory,
    learner,
    loss,
)
from mi.rl.actors import ray as ray_actors
from mi.rl.actors.threads import Actors, Item
from mi.rl.actors.worker import Policy, Worker, joined
from mi.rl.agent import Agent
from mi.rl.evaluate import Evaluation
from mi.rl.play import StoppedError, never
from mi.rl.trajectory import Episodes, Trajectory
from mi.rows import mean_over_rows
from mi.training import (
    checkpoint,
    logger,
    optim,
    progress,
    run_dir,
)
from mi.training import (
    sharding as training_sharding,
)


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
    name, options = factory.get_environment_args(config)
    groups = [envs.pool(name, actors.batch, int(seed), options) for seed in seeds]
    policy = policy or Policy(factory.build_agent(config, groups[0].spec))
    return Worker(groups, policy, config.train.length, key)


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one."""
    with contextlib.ExitStack() as stack:
        keys = {'eval': 'env.name'}
        if config.eval.held_out:
            keys['held_out'] = 'eval.held_out'
        evaluations = {
            split: stack.enter_context(Evaluation(config, key)) for split, key in keys.items()
        }
        agent = factory.build_agent(config, evaluations['eval'].spec)
        for evaluation in evaluations.values():
            factory.check_held_out(config, agent.spec, evaluation.spec)
        with run_dir.open_run(workdir, config, profile) as run:
            _train(config, evaluations, agent, run)


def _train(
    config: ml_collections.ConfigDict,
    evaluations: dict[str, Evaluation],
    agent: Agent,
    run: run_dir.Run,
) -> None:
    total, B, T = rl_config.count_updates(config), config.train.batch, config.train.length
    seed, tasks = config.seeds[0], agent.spec.tasks
    optimiser = optim.make_optimizer(config.optim, total)
    run.write('cost.json', {'steps': total, **factory.compute_costs(agent, B, T)})
    mesh = training_sharding.make_mesh(1, B, shape=config.train.mesh)
    state = start(agent, optimiser, seed, mesh)
    saved = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored = saved.restore(state)
    meta: dict[str, Any] = {'step': 0, 'metrics': 0}
    if restored is not None:
        state, meta = restored
    run.step = meta['step']
    env_steps = meta.get('env_steps', run.step * B * T)

    # A run that ended between a checkpoint and the evaluation of its step has that to do still.
    policies = 1 + config.eval.greedy
    pending = len(evaluations) * policies if meta.get('is_evaluated') is False else 0
    position = logger.find_records_end(run.path, meta['metrics'], run.step, pending)

    update = learner_update(agent, optimiser, factory.get_hyperparameters(config), mesh)
    is_asked_to_stop = functools.partial(run.should_stop, recorded=False)
    window = Window()
    with (
        run.open_logger(total, position or meta['metrics']) as log,
        contextlib.ExitStack() as stack,
    ):
        if position is None:
            _evaluate(evaluations, agent, state, run, log, env_steps)
        if run.step < total:
            actors = stack.enter_context(
                start_actors(config, agent, training_sharding.to_local(state.params), run.step)
            )
        first_step = run.step
        while run.step < total:
            is_first = run.step == first_step
            with progress.work_if(is_first, 'waiting for the first trajectories'):
                items = take(config, actors, run.step, window, is_asked_to_stop)
            if items is not None:
                trajectory = on_devices(joined([item.trajectory for item in items]), mesh)
                with progress.work_if(is_first, 'compiling the update'):
                    state, measured = run.call_traced(1, update, state, trajectory)
                run.step += 1
                actors.publish(training_sharding.to_local(state.params), run.step)
                window.add(measured, items)
            step = run.step
            recorded = step % config.train.log_every == 0
            stops = run.should_stop(recorded)
            evaluates = step % config.train.eval_every == 0 or step == total
            evaluates = evaluates and items is not None
            saves = step % config.train.save_every == 0 or evaluates or stops

            # What was learned since the last record.
            if (recorded or saves) and window.updates:
                new_steps = training_sharding.sum_over_processes(window.transitions)
                env_steps += new_steps
                values, timing = window.take(whole=saves)
                means = {name: value.mean(keepdims=True) for name, value in values.items()}
                logger.refuse_non_finite([seed], step, means)
                record: episode_metrics.Record = {n: float(value[0]) for n, value in means.items()}
                record |= episode_metrics.of_episodes(
                    window.episodes(), tasks, agent.spec.has_success
                )
                record |= episode_metrics.of_statistics(
                    training_sharding.to_local(state.statistics), tasks
                )
                log.write(step, seed, 'train', {'env_steps': env_steps, **record})
                rate = new_steps / timing['seconds']
                timing |= {'steps_per_second': rate, 'queue': actors.waiting()}
                log.write_timing(step, timing)
                log.show_progress(step, episode_metrics.note(record), f'{rate:,.0f} steps/s')

            # The checkpoint comes before the evaluation, which may take long and be cut short.
            if saves:
                logger.refuse_broken_state([seed], step, learner.name_parts(state))
                meta = {'metrics': log.position(), 'env_steps': env_steps}
                saved.save(step, state, meta | {'is_evaluated': not evaluates})
                if stops and (step < total or evaluates):
                    run.exit_preempted()
            if evaluates:
                _evaluate(evaluations, agent, state, run, log, env_steps)
            if recorded or saves:
                window = Window()  # after evaluation and saving, which are not training


def _evaluate(
    evaluations: dict[str, Evaluation],
    agent: Agent,
    state: learner.LearnerState,
    run: run_dir.Run,
    log: logger.RunLogger,
    env_steps: int,
) -> None:
    """Write a record for each environment and policy; or end the run, if it is asked to end."""
    if not training_sharding.is_primary():
        return
    params, seed = training_sharding.to_local(state.params), run.config.seeds[0]
    stops = functools.partial(run.should_stop, recorded=False)
    try:
        for split, evaluation in evaluations.items():
            with progress.Work(f'evaluating {split}'):
                measured = evaluation(agent, params, run.step, seed, stops)
            for policy, scores in measured.items():
                log.write(run.step, seed, split + policy, {'env_steps': env_steps, **scores})
    except StoppedError:
        run.exit_preempted()


def start(
    agent: Agent, optimiser: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh
) -> learner.LearnerState:
    """The learner's state before the first update, on every device."""

    def fresh() -> learner.LearnerState:
        params = factory.init_params(agent, jax.random.key(seed))
        return learner.init_learner_state(params, optimiser, len(agent.spec.tasks))

    return training_sharding.jit_once(fresh, out_shardings=training_sharding.replicated(mesh))


def learner_update(
    agent: Agent,
    optimiser: optax.GradientTransformation,
    hyperparameters: loss.Hyperparameters,
    mesh: jax.sharding.Mesh,
) -> Any:
    """Return `learner.update` jitted for a mesh: (state, trajectory [T, B]) → (state, metrics).

    Each device computes the gradient of its rows; they exchange it and the sums of PopArt.
    """

    def update(state: learner.LearnerState, trajectory: Trajectory) -> Any:
        state, measured = learner.update(agent, optimiser, hyperparameters, state, trajectory)
        return state, mean_over_rows(measured)

    everywhere: Any = training_sharding.replicated(mesh).spec
    steps: Any = training_sharding.batch_sharding(mesh, 1).spec
    carry: Any = training_sharding.batch_sharding(mesh, 0).spec
    rows = Trajectory(steps, steps, steps, steps, steps, carry)
    return jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(everywhere, rows),
            out_specs=everywhere,
            check_vma=False,
        )
    )


def lower_update(
    update: Any, state: learner.LearnerState, trajectory: Trajectory, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    """Return a `learner_update` lowered for the shapes of a state and a trajectory."""

    def placed(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
        return training_sharding.with_shardings(tree, jax.tree.map(lambda _: sharding, tree))

    steps = placed(trajectory._replace(carry={}), training_sharding.batch_sharding(mesh, 1))
    carry = placed(trajectory.carry, training_sharding.batch_sharding(mesh, 0))
    everywhere = placed(state, training_sharding.replicated(mesh))
    return update.lower(everywhere, steps._replace(carry=carry))


def start_actors(
    config: ml_collections.ConfigDict, agent: Agent, params: Any, version: int
) -> Actors:
    numbers = range(config.actors.number)
    make = functools.partial(make_worker, config, version)
    queue = params, version, config.actors.queue, config.actors.timeout
    if config.train.topology == 'ray':
        cpus = ray_actors.cpus_per_actor(config.actors.number)
        makers: Any = [
            functools.partial(ray_actors.Remote, functools.partial(make, i), cpus) for i in numbers
        ]
        return Actors(makers, *queue, share=ray_actors.share)
    policy = Policy(agent)
    makers = [functools.partial(make, i, policy) for i in numbers]
    return Actors(makers, *queue)


def take(
    config: ml_collections.ConfigDict,
    actors: Actors,
    step: int,
    window: 'Window',
    stops: Callable[[], bool] = never,
) -> list[Item] | None:
    """Return this process's trajectories of one update; None if the run is to end."""
    items: list[Item] = []
    began = time.perf_counter()
    each = config.train.batch // jax.process_count()
    while len(items) < each // config.actors.batch:
        item = actors.get(stops)
        if item is None:
            return None
        lag = step - item.version
        if lag > config.actors.max_lag:
            window.dropped += 1
            continue
        window.lags.append(lag)
        items.append(item)
    window.waited += time.perf_counter() - began
    return items


def on_devices(trajectory: Trajectory, mesh: jax.sharding.Mesh) -> Trajectory:
    carry = training_sharding.shard_batch(trajectory.carry, mesh, axis=0)
    return training_sharding.shard_batch(trajectory._replace(carry={}), mesh, axis=1)._replace(
        carry=carry
    )


class Window:
    """What was measured since the last record.

    Attributes:
      updates: how many there were.
      transitions: learned from, in this process; rows whose action was ignored are none.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._measured: list[dict[str, jax.Array]] = []
        self._episodes: list[Episodes] = []
        self._actors_waited = 0.0
        self.lags: list[int] = []
        self.updates = self.transitions = 0
        self.dropped = 0
        self.waited = 0.0

    def add(self, measured: dict[str, jax.Array], items: list[Item]) -> None:
        self.updates += 1
        self._measured.append(measured)
        self._episodes += [item.episodes for item in items]
        self._actors_waited += sum(item.waited for item in items)
        self.transitions += sum(int(item.trajectory.valid.sum()) for item in items)

    def take(self, whole: bool) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Values of the updates, [updates], and what they took in seconds.

        Unless `whole`, the newest update is left out, as waiting for it would hold the learner up.
        """
        updates = self.updates
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
        return episode_metrics.total(self._episodes)
