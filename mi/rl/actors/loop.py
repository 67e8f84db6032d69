"""Topologies 'threads' and 'ray': actors feed a bounded queue to the learner.

The learner's state is saved and resumed exactly; the environments restart. The lag of a trajectory
is the number of updates since the parameters that acted. Trajectories with a lag above
`config.actors.max_lag` are dropped and counted.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from mi.rl import config as rl_config
from mi.rl import envs, episode_metrics, factory, learner, loss, popart
from mi.rl.actors import ray as ray_actors
from mi.rl.actors.threads import Actors, QueueItem
from mi.rl.actors.worker import Policy, Worker, concatenate_trajectories
from mi.rl.agent import Agent, Params
from mi.rl.checkpointing import Snapshot, is_evaluation_due, resume, save_or_stop
from mi.rl.envs.spec import Spec
from mi.rl.evaluate import Evaluate, Evaluation, write_evaluations
from mi.rl.play import never
from mi.rl.trajectory import Episodes, Trajectory
from mi.rows import mean_over_rows
from mi.training import checkpoint, logger, optim, progress, run_dir, sharding


def make_worker(
    config: ml_collections.ConfigDict,
    version: int,
    index: int,
    policy: Policy | None = None,
    birth: int = 0,
) -> Worker:
    """Make worker `index` of this process.

    Args:
      config: config of the run.
      version: number of updates when the run was started or resumed.
      index: index of the worker.
      policy: policy to share; None to make one.
      birth: number of workers at this index that died. It changes the episodes.
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
    """Train and evaluate in a run directory, or resume the run that it holds."""
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
    evaluations: Mapping[str, Evaluation],
    agent: Agent,
    run: run_dir.Run,
) -> None:
    """Run the training loop.

    Args:
      config: config of the run.
      evaluations: split → evaluation.
      agent: the agent.
      run: the open run.
    """
    num_updates, B, T = rl_config.count_updates(config), config.train.batch, config.train.length
    optimizer = optim.make_optimizer(config.optim, num_updates)
    run.write('cost.json', {'steps': num_updates, **factory.compute_costs(agent, B, T)})

    # A new state, or that of the newest checkpoint.
    mesh = sharding.make_mesh(1, B, shape=config.train.mesh)
    state = init_state(agent, optimizer, config.seeds[0], mesh)
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored, meta, records_end = resume(run, checkpoints, state, len(evaluations))
    if restored is not None:
        state = restored
    env_steps = meta.get('env_steps', run.step * B * T)

    update = jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    is_asked_to_stop = functools.partial(run.should_stop, recorded=False)
    window = Window()
    with (
        run.open_logger(num_updates, records_end or meta['metrics']) as log,
        contextlib.ExitStack() as stack,
    ):
        if records_end is None:
            _evaluate(evaluations, agent, state, run, log, env_steps)
        if run.step < num_updates:
            params = sharding.to_local(state.params)
            actors = stack.enter_context(start_actors(config, agent, params, run.step))
        first_step = run.step
        while run.step < num_updates:
            # Update the learner and publish its parameters.
            is_first = run.step == first_step
            with progress.work_if(is_first, 'waiting for the first trajectories'):
                items = take_batch(config, actors, run.step, window, is_asked_to_stop)
            if items is not None:
                trajectory = concatenate_trajectories([item.trajectory for item in items])
                with progress.work_if(is_first, 'compiling the update'):
                    state, metrics = run.call_traced(
                        1, update, state, shard_trajectory(trajectory, mesh)
                    )
                run.step += 1
                actors.publish(sharding.to_local(state.params), run.step)
                window.add(metrics, items)
            is_recorded = run.step % config.train.log_every == 0
            is_stopping = run.should_stop(is_recorded)
            will_evaluate = items is not None and is_evaluation_due(config, run.step)
            will_save = run.step % config.train.save_every == 0 or will_evaluate or is_stopping

            # Write the record since the last one.
            if (is_recorded or will_save) and window.updates:
                new_steps = sharding.sum_over_processes(window.transitions)
                env_steps += new_steps
                values, timing = window.take(is_complete=will_save)
                statistics = sharding.to_local(state.statistics)
                record = _make_record(run, values, window.episodes(), statistics, agent.spec)
                log.write(run.step, config.seeds[0], 'train', {'env_steps': env_steps, **record})
                rate = new_steps / timing['seconds']
                timing |= {'steps_per_second': rate, 'queue': actors.count_waiting()}
                log.write_timing(run.step, timing)
                note = episode_metrics.make_note(record)
                log.show_progress(run.step, note, f'{rate:,.0f} steps/s')

            # Save, stop and evaluate.
            if will_save:
                snapshot = Snapshot(state, state, env_steps)
                save_or_stop(run, checkpoints, log, snapshot, will_evaluate, is_stopping)
            if will_evaluate:
                _evaluate(evaluations, agent, state, run, log, env_steps)
            if is_recorded or will_save:
                window = Window()  # its clock excludes evaluation and saving


def _make_record(
    run: run_dir.Run,
    values: Mapping[str, np.ndarray],
    episodes: Episodes,
    statistics: popart.Statistics,
    spec: Spec,
) -> episode_metrics.Record:
    """Return the record of a window of updates.

    Raises:
      UserError: if a value is not finite.
    """
    means = {name: value.mean(keepdims=True) for name, value in values.items()}
    logger.refuse_non_finite(run.config.seeds, run.step, means)
    record: episode_metrics.Record = {name: float(mean[0]) for name, mean in means.items()}
    record |= episode_metrics.summarize_episodes(episodes, spec.tasks, spec.has_success)
    record |= episode_metrics.summarize_statistics(statistics, spec.tasks)
    return record


def _evaluate(
    evaluations: Mapping[str, Evaluation],
    agent: Agent,
    state: learner.LearnerState,
    run: run_dir.Run,
    log: logger.RunLogger,
    env_steps: int,
) -> None:
    """Evaluate every split in the first process, or end the run if it is asked to stop."""
    if not sharding.is_primary():
        return
    params, seed = sharding.to_local(state.params), run.config.seeds[0]

    def evaluate(evaluation: Evaluation) -> Evaluate:
        return lambda stops: [evaluation(agent, params, run.step, seed, stops)]

    splits = {split: evaluate(evaluation) for split, evaluation in evaluations.items()}
    write_evaluations(splits, run, log, [env_steps])


def init_state(
    agent: Agent, optimizer: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh
) -> learner.LearnerState:
    """Return the learner's state before the first update, on every device."""

    def init() -> learner.LearnerState:
        params = factory.init_params(agent, jax.random.key(seed))
        return learner.init_learner_state(params, optimizer, len(agent.spec.tasks))

    state: learner.LearnerState = sharding.jit_once(init, out_shardings=sharding.replicated(mesh))
    return state


def jit_update(
    agent: Agent,
    optimizer: optax.GradientTransformation,
    hyperparameters: loss.Hyperparameters,
    mesh: jax.sharding.Mesh,
) -> Any:
    """Return `learner.update` jitted for a mesh: (state, trajectory [T, B]) → (state, metrics).

    Each device computes the gradient of its rows; the devices reduce it and the sums of PopArt.
    """

    def update(
        state: learner.LearnerState, trajectory: Trajectory
    ) -> tuple[learner.LearnerState, dict[str, jax.Array]]:
        state, metrics = learner.update(agent, optimizer, hyperparameters, state, trajectory)
        return state, mean_over_rows(metrics)

    replicated: Any = sharding.replicated(mesh).spec
    steps: Any = sharding.batch_sharding(mesh, 1).spec
    carry: Any = sharding.batch_sharding(mesh, 0).spec
    rows = Trajectory(steps, steps, steps, steps, steps, carry)
    return jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(replicated, rows),
            out_specs=replicated,
            check_vma=False,
        )
    )


def lower_update(
    update: Any, state: learner.LearnerState, trajectory: Trajectory, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    """Lower a `jit_update` for the shapes of a state and a trajectory."""

    def add_sharding(tree: Any, leaf_sharding: jax.sharding.NamedSharding) -> Any:
        return sharding.with_shardings(tree, jax.tree.map(lambda _: leaf_sharding, tree))

    steps = add_sharding(trajectory._replace(carry={}), sharding.batch_sharding(mesh, 1))
    carry = add_sharding(trajectory.carry, sharding.batch_sharding(mesh, 0))
    state = add_sharding(state, sharding.replicated(mesh))
    return update.lower(state, steps._replace(carry=carry))


def start_actors(
    config: ml_collections.ConfigDict, agent: Agent, params: Params, version: int
) -> Actors:
    """Return the actors of the config's topology, which start when the context is entered."""
    make = functools.partial(make_worker, config, version)
    queue = params, version, config.actors.queue, config.actors.timeout
    indices = range(config.actors.number)
    if config.train.topology == 'ray':
        cpus = ray_actors.compute_cpus_per_actor(config.actors.number)
        remotes = [
            functools.partial(ray_actors.Remote, functools.partial(make, index), cpus)
            for index in indices
        ]
        return Actors(remotes, *queue, share=ray_actors.share)
    policy = Policy(agent)
    return Actors([functools.partial(make, index, policy) for index in indices], *queue)


def take_batch(
    config: ml_collections.ConfigDict,
    actors: Actors,
    step: int,
    window: 'Window',
    stops: Callable[[], bool] = never,
) -> list[QueueItem] | None:
    """Return this process's trajectories of one update; None if the run is to end.

    Trajectories of parameters that are too old are dropped. The window counts them and the wait.
    """
    items: list[QueueItem] = []
    start_time = time.perf_counter()
    rows = config.train.batch // jax.process_count()
    while len(items) < rows // config.actors.batch:
        item = actors.get(stops)
        if item is None:
            return None
        lag = step - item.version
        if lag > config.actors.max_lag:
            window.dropped += 1
            continue
        window.lags.append(lag)
        items.append(item)
    window.wait_seconds += time.perf_counter() - start_time
    return items


def shard_trajectory(trajectory: Trajectory, mesh: jax.sharding.Mesh) -> Trajectory:
    """Divide the rows of this process's trajectory over its devices."""
    carry = sharding.shard_batch(trajectory.carry, mesh, axis=0)
    steps: Trajectory = sharding.shard_batch(trajectory._replace(carry={}), mesh, axis=1)
    return steps._replace(carry=carry)


class Window:
    """Measurements since the last record.

    Attributes:
      updates: number of updates.
      transitions: number of valid transitions learned from in this process.
      lags: lags of the trajectories, in updates.
      dropped: number of trajectories that were too old.
      wait_seconds: time that the learner waited for trajectories.
    """

    def __init__(self) -> None:
        self._start_time = time.perf_counter()
        self._metrics: list[dict[str, jax.Array]] = []
        self._episodes: list[Episodes] = []
        self._actor_wait_seconds = 0.0
        self.lags: list[int] = []
        self.updates = self.transitions = 0
        self.dropped = 0
        self.wait_seconds = 0.0

    def add(self, metrics: dict[str, jax.Array], items: list[QueueItem]) -> None:
        """Add an update and the trajectories that it learned from."""
        self.updates += 1
        self._metrics.append(metrics)
        self._episodes += [item.episodes for item in items]
        self._actor_wait_seconds += sum(item.wait_seconds for item in items)
        self.transitions += sum(int(item.trajectory.valid.sum()) for item in items)

    def take(self, is_complete: bool) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the values of the updates, [updates], and their timing in seconds.

        Unless `is_complete`, the newest of several updates is left out, because the learner would
        have to wait for it.
        """
        skips_newest = not is_complete and self.updates > 1
        metrics = jax.device_get(self._metrics[:-1] if skips_newest else self._metrics)
        values = {name: np.stack([m[name] for m in metrics]) for name in metrics[0]}
        values |= {
            'lag': np.asarray(self.lags),
            'lag_max': np.max(self.lags, keepdims=True),
            'dropped': np.asarray([self.dropped]),
        }
        timing = {
            'seconds': time.perf_counter() - self._start_time,
            'updates': self.updates,
            'learner_waited': self.wait_seconds,
            'actors_waited': self._actor_wait_seconds,
        }
        return values, timing

    def episodes(self) -> Episodes:
        """Return the sums over the episodes that ended."""
        return episode_metrics.add_episodes(self._episodes)
