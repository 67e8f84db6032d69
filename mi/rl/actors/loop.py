"""The training loop of the topologies 'threads' and 'ray', whose actors fill a bounded queue.

A resumed run restores the exact state of the learner and restarts the environments. The lag of a
trajectory is the number of updates since its parameters were published. Trajectories with a lag
above `config.actors.max_lag` are dropped and counted.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
import optax

from mi.rl import config as rl_config
from mi.rl import episode_metrics, factory, learner, loss, popart
from mi.rl.actors import ray as ray_actors
from mi.rl.actors.threads import Actors, QueueItem
from mi.rl.actors.window import Window
from mi.rl.actors.worker import Policy, Worker, concatenate_trajectories
from mi.rl.agent import Agent, Params
from mi.rl.checkpointing import Snapshot, is_evaluation_due, resume, save_or_stop, write_costs
from mi.rl.envs.spec import Spec
from mi.rl.evaluate import Evaluate, Evaluation, write_evaluations
from mi.rl.play import never
from mi.rl.trajectory import Episodes, Trajectory
from mi.rows import mean_over_rows
from mi.training import (
    averaging,
    checkpoint,
    logger,
    optim,
    progress,
    run_dir,
    run_mesh,
    sharding,
    utilization,
)
from mi.training.sharding import Tree


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
      policy: policy shared with other workers. If None, a new one is made.
      birth: number of workers at this index that have died. Each birth draws different episodes.
    """
    # Each start of the run, worker, process and birth draws episodes of its own.
    worker_key = jax.random.key(config.seeds[0])
    for identifier in (version, index, jax.process_index(), birth):
        worker_key = jax.random.fold_in(worker_key, identifier)
    env_seeds = np.asarray(jax.random.randint(worker_key, (config.actors.groups,), 0, 2**30))
    batch_size = config.actors.batch
    groups = [factory.make_pool(config, batch_size, int(env_seed)) for env_seed in env_seeds]
    policy = policy or Policy(factory.build_agent(config, groups[0].spec))
    return Worker(groups, policy, config.train.length, worker_key)


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Train and evaluate an agent in a run directory, or resume the run stored there."""
    config_keys = factory.get_environment_keys(config)
    with contextlib.ExitStack() as stack:
        # Only the first process evaluates; the others need no environments for it.
        evaluations: dict[str, Evaluation] = {}
        if sharding.is_primary():
            for split, config_key in config_keys.items():
                evaluations[split] = stack.enter_context(Evaluation(config, config_key))
            specs = {split: evaluation.spec for split, evaluation in evaluations.items()}
        else:
            specs = {split: factory.read_spec(config, key) for split, key in config_keys.items()}
        agent = factory.build_agent(config, specs['eval'])
        for spec in specs.values():
            factory.check_held_out(config, agent.spec, spec)
        with run_dir.open_run(workdir, config, profile) as run:
            _train(config, evaluations, agent, run)


def _train(
    config: ml_collections.ConfigDict,
    evaluations: Mapping[str, Evaluation],
    agent: Agent,
    run: run_dir.Run,
) -> None:
    """Run the training loop: take trajectories, update, log, save and evaluate."""
    num_updates = rl_config.count_updates(config)
    optimizer = optim.make_optimizer(config.optim, num_updates)
    mesh = run_mesh.make_run_mesh(config)
    update = jit_update(agent, optimizer, factory.get_hyperparameters(config), mesh)
    numbers = factory.get_swept_numbers(config, num_updates, mesh)
    is_asked_to_stop = functools.partial(run.should_stop, recorded=False)
    meter = utilization.Meter(utilization.UPDATE * write_costs(run, agent), mesh.devices.flat)

    # A new state, or that of the newest checkpoint.
    state = init_state(agent, optimizer, config.seeds[0], mesh)
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored, meta, records_end = resume(
        run, checkpoints, state, len(factory.get_environment_keys(config))
    )
    state = state if restored is None else restored
    env_steps = meta.get('env_steps', run.step * config.train.batch * config.train.length)
    first_step = run.step
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(run.open_logger(num_updates, records_end or meta['metrics']))
        recorder = _Recorder(run, log, agent.spec, env_steps, meter)
        if records_end is None:
            _evaluate(evaluations, agent, state, recorder)
        if run.step < num_updates:
            params = sharding.to_local(state.params)
            actors = stack.enter_context(start_actors(config, agent, params, run.step))
            window = Window()
        while run.step < num_updates:
            # Update the learner and publish its parameters.
            is_first = run.step == first_step
            with progress.work_if(is_first, 'waiting for the first trajectories'):
                queue_items = take_batch(config, actors, run.step, window, is_asked_to_stop)
            if queue_items is not None:
                trajectory = concatenate_trajectories([item.trajectory for item in queue_items])
                with progress.work_if(is_first, 'compiling the update'):
                    state, metrics = run.call_traced(
                        1, update, state, shard_trajectory(trajectory, mesh), numbers
                    )
                run.step += 1
                actors.publish(sharding.to_local(state.params), run.step)
                window.add(metrics, queue_items)

            # Write the record since the last one.
            is_recorded = run.step % config.train.log_every == 0
            is_stopping = run.should_stop(is_recorded)
            will_evaluate = queue_items is not None and is_evaluation_due(config, run.step)
            will_save = run.step % config.train.save_every == 0 or will_evaluate or is_stopping
            if (is_recorded or will_save) and window.updates:
                recorder.write(window, state.statistics, actors, is_complete=will_save)

            # Save, stop and evaluate.
            if will_save:
                snapshot = Snapshot(state, state, recorder.env_steps)
                save_or_stop(run, checkpoints, log, snapshot, will_evaluate, is_stopping)
            if will_evaluate:
                _evaluate(evaluations, agent, state, recorder)
            if is_recorded or will_save:
                window = Window()  # its clock excludes evaluation and saving


class _Recorder:
    """A writer for the records of a run.

    Attributes:
      run: the open run.
      log: logger of the run.
      env_steps: environment steps of all processes so far.
    """

    def __init__(
        self,
        run: run_dir.Run,
        log: logger.RunLogger,
        spec: Spec,
        env_steps: int,
        meter: utilization.Meter,
    ):
        self.run, self.log, self.env_steps = run, log, env_steps
        self._spec, self._meter = spec, meter

    def write(
        self,
        window: Window,
        statistics: popart.Statistics,
        actors: Actors,
        is_complete: bool,
    ) -> None:
        """Write the metrics and the timing of a window of updates, and show the progress.

        Args:
          window: measurements of the updates and their trajectories.
          statistics: PopArt statistics after the last update.
          actors: the actors, for the length of their queue.
          is_complete: see `Window.take`.

        Raises:
          UserError: if a metric is not finite.
        """
        run, log = self.run, self.log
        new_steps = sharding.sum_over_processes(window.transitions)
        self.env_steps += new_steps
        values, timing = window.take(is_complete)
        record = self._make_record(values, window.episodes(), sharding.to_local(statistics))
        full_record = {'env_steps': self.env_steps, **record}
        log.write(run.step, run.config.seeds[0], 'train', full_record)

        # The timing is in a file of its own, because it differs between equal runs.
        steps_per_second = new_steps / timing['seconds']
        timing |= {'steps_per_second': steps_per_second, 'queue': actors.count_waiting()}
        timing |= self._meter.measure(steps_per_second)
        log.write_timing(run.step, timing)
        note = episode_metrics.make_note(record)
        rate = utilization.format_rate(f'{steps_per_second:,.0f} steps/s', timing)
        log.show_progress(run.step, note, rate)

    def _make_record(
        self,
        values: Mapping[str, np.ndarray],
        episodes: Episodes,
        statistics: popart.Statistics,
    ) -> episode_metrics.Record:
        """Return the mean of each value, with episodes and PopArt statistics by task."""
        means = {name: array.mean(keepdims=True) for name, array in values.items()}
        logger.refuse_non_finite(self.run.config.seeds, self.run.step, means)
        record: episode_metrics.Record = {name: float(mean[0]) for name, mean in means.items()}
        tasks, has_success = self._spec.tasks, self._spec.has_success
        record |= episode_metrics.summarize_episodes(episodes, tasks, has_success)
        record |= episode_metrics.summarize_statistics(statistics, tasks)
        return record


def _evaluate(
    evaluations: Mapping[str, Evaluation],
    agent: Agent,
    state: learner.LearnerState,
    recorder: _Recorder,
) -> None:
    """Evaluate every split in the first process, and end the run if a stop is requested."""
    if not sharding.is_primary():
        return
    run = recorder.run
    opt_state, params = sharding.to_local((state.opt_state, state.params))
    params, seed = averaging.get_eval_params(opt_state, params), run.config.seeds[0]

    def evaluate(evaluation: Evaluation) -> Evaluate:
        return lambda stops: [evaluation(agent, params, run.step, seed, stops)]

    splits = {split: evaluate(evaluation) for split, evaluation in evaluations.items()}
    write_evaluations(splits, run, recorder.log, [recorder.env_steps])


def init_state(
    agent: Agent, optimizer: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh
) -> learner.LearnerState:
    """Initialize the state of the learner on every device."""

    def init(seed: jax.Array) -> learner.LearnerState:
        params = factory.init_params(agent, jax.random.key(seed))
        return learner.init_learner_state(params, optimizer, len(agent.spec.tasks))

    replicated = sharding.replicated(mesh)
    state: learner.LearnerState = sharding.jit_once(init, np.int32(seed), out_shardings=replicated)
    return state


def jit_update(
    agent: Agent,
    optimizer: optax.GradientTransformation,
    hyperparameters: loss.Hyperparameters,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Wrapped:
    """Return `learner.update` jitted for a mesh: (state, trajectory [T, B]) → (state, metrics).

    Each device computes the gradient of its own rows. Gradients are averaged over devices, and the
    sums for PopArt are added up. The jitted function accepts an optional third argument of type
    `SweptNumbers`, which replaces the learning rates of `optimizer` and the entropy cost of
    `hyperparameters`.
    """

    def update_rows(
        state: learner.LearnerState,
        trajectory: Trajectory,
        numbers: learner.SweptNumbers | None,
    ) -> tuple[learner.LearnerState, dict[str, jax.Array]]:
        parts = learner.bind_numbers(optimizer, hyperparameters, numbers)
        state, metrics = learner.update(agent, *parts, state, trajectory)
        return state, mean_over_rows(metrics)

    # A device has its rows of the trajectory, and all of the state.
    replicated = sharding.replicated(mesh).spec
    steps = sharding.batch_sharding(mesh, axis=1).spec
    carry = sharding.batch_sharding(mesh, axis=0).spec
    trajectory_spec = Trajectory(steps, steps, steps, steps, steps, carry)  # type: ignore[arg-type]
    sharded = jax.shard_map(
        update_rows,
        mesh=mesh,
        in_specs=(replicated, trajectory_spec, replicated),
        out_specs=replicated,
        check_vma=False,
    )

    def update(
        state: learner.LearnerState,
        trajectory: Trajectory,
        numbers: learner.SweptNumbers | None = None,
    ) -> tuple[learner.LearnerState, dict[str, jax.Array]]:
        return sharded(state, trajectory, numbers)

    return jax.jit(update)


def lower_update(
    update: jax.stages.Wrapped,
    state: learner.LearnerState,
    trajectory: Trajectory,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Lowered:
    """Lower the function from `jit_update` for the shapes of a state and a trajectory."""

    def add_sharding(shapes: Tree, leaf_sharding: jax.sharding.NamedSharding) -> Tree:
        return sharding.with_shardings(shapes, jax.tree.map(lambda _: leaf_sharding, shapes))

    steps = add_sharding(trajectory._replace(carry={}), sharding.batch_sharding(mesh, axis=1))
    carry = add_sharding(trajectory.carry, sharding.batch_sharding(mesh, axis=0))
    state = add_sharding(state, sharding.replicated(mesh))
    return update.lower(state, steps._replace(carry=carry))


def start_actors(
    config: ml_collections.ConfigDict, agent: Agent, params: Params, version: int
) -> Actors:
    """Return the actors for the topology in the config. Entering their context starts them."""
    make_indexed = functools.partial(make_worker, config, version)
    worker_indices = range(config.actors.number)
    connect = functools.partial(
        Actors,
        params=params,
        version=version,
        capacity=config.actors.queue,
        timeout=config.actors.timeout,
    )
    # Processes, which build policies of their own, or threads, which share one.
    if config.train.topology == 'ray':
        cpus = ray_actors.compute_cpus_per_actor(config.actors.number)
        remotes = [
            functools.partial(ray_actors.Remote, functools.partial(make_indexed, index), cpus)
            for index in worker_indices
        ]
        return connect(remotes, share=ray_actors.share)
    policy = Policy(agent)
    return connect([functools.partial(make_indexed, index, policy) for index in worker_indices])


def take_batch(
    config: ml_collections.ConfigDict,
    actors: Actors,
    step: int,
    window: Window,
    stops: Callable[[], bool] = never,
) -> list[QueueItem] | None:
    """Return this process's trajectories for one update, or None if the run should end.

    Trajectories whose parameters are too old are dropped. `window` counts them and the time spent
    waiting.
    """
    queue_items: list[QueueItem] = []
    start_time = time.perf_counter()
    local_batch_size = config.train.batch // jax.process_count()
    while len(queue_items) < local_batch_size // config.actors.batch:
        queue_item = actors.get(stops)
        if queue_item is None:
            return None
        lag = step - queue_item.version
        if lag > config.actors.max_lag:
            window.dropped += 1
            continue
        window.lags.append(lag)
        queue_items.append(queue_item)
    window.wait_seconds += time.perf_counter() - start_time
    return queue_items


def shard_trajectory(trajectory: Trajectory, mesh: jax.sharding.Mesh) -> Trajectory:
    """Divide the rows of this process's trajectory over the devices of the mesh."""
    carry = sharding.shard_batch(trajectory.carry, mesh, axis=0)
    steps: Trajectory = sharding.shard_batch(trajectory._replace(carry={}), mesh, axis=1)
    return steps._replace(carry=carry)
