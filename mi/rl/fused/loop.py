"""The training loop of the topology 'fused', where one program acts and learns for all seeds.

Arrays with a leading axis of seeds are marked [S, …]. The same program divides seeds and
environments over several devices (`mi.training.sharding`). Training is deterministic.
"""

import functools
import operator
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

from mi.rl import config as rl_config
from mi.rl import episode_metrics, factory, learner, loss, popart
from mi.rl.agent import Agent
from mi.rl.checkpointing import Snapshot, is_evaluation_due, resume, save_or_stop, write_costs
from mi.rl.envs import auto_reset, finite
from mi.rl.envs.spec import JaxEnvironment, Spec
from mi.rl.evaluate import (
    Evaluate,
    Simulation,
    evaluate_seeds,
    make_evaluation_keys,
    write_evaluations,
)
from mi.rl.fused import rollout
from mi.rl.trajectory import Episodes
from mi.rows import max_over_rows, mean_over_rows, sum_over_rows
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


class TrainState(NamedTuple):
    """The state of training. In a run, every array has a leading axis of seeds."""

    learner: learner.LearnerState
    actor: rollout.ActorState


class UpdateMetrics(NamedTuple):
    """Metrics of one or several updates.

    Attributes:
      learner: name → mean over the updates.
      episodes: statistics of the episodes that ended.
      counts: counts of the unrolls.
    """

    learner: dict[str, Array]
    episodes: Episodes
    counts: rollout.UnrollCounts


def init_state(
    environment: JaxEnvironment,
    agent: Agent,
    optimizer: optax.GradientTransformation,
    batch: int,
    seed: Array,
) -> TrainState:
    """Initialize the state of one seed."""
    params_key, actor_key = jax.random.split(jax.random.key(seed))
    params = factory.init_params(agent, params_key)
    num_tasks = len(environment.spec.tasks)
    actor = rollout.init_actor_state(environment, agent, batch, actor_key)
    return TrainState(learner.init_learner_state(params, optimizer, num_tasks), actor)


def update(
    environment: JaxEnvironment,
    agent: Agent,
    optimizer: optax.GradientTransformation,
    hyperparameters: loss.Hyperparameters,
    length: int,
    state: TrainState,
) -> tuple[TrainState, UpdateMetrics]:
    """Unroll the environments of one seed and update its learner once. This function is pure."""
    actor, trajectory, episodes, counts = rollout.unroll(
        environment, agent, length, state.learner.params, state.actor
    )
    learner_state, metrics = learner.update(
        agent, optimizer, hyperparameters, state.learner, trajectory
    )
    return TrainState(learner_state, actor), UpdateMetrics(metrics, episodes, counts)


SeedUpdate = Callable[[TrainState, learner.SweptNumbers | None], tuple[TrainState, UpdateMetrics]]


def make_update(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimizer: optax.GradientTransformation,
) -> SeedUpdate:
    """Return `update` with all static arguments bound: (state, numbers) → (state, metrics).

    The state is that of one seed. `numbers` are `SweptNumbers` that replace those of the config, or
    None.
    """
    hyperparameters = factory.get_hyperparameters(config)

    def update_once(
        state: TrainState, numbers: learner.SweptNumbers | None
    ) -> tuple[TrainState, UpdateMetrics]:
        learner_parts = learner.bind_numbers(optimizer, hyperparameters, numbers)
        return update(environment, agent, *learner_parts, config.train.length, state)

    return update_once


def compile_updates(
    update_once: SeedUpdate,
    state: TrainState,
    num_updates: int,
    mesh: jax.sharding.Mesh,
    numbers: learner.SweptNumbers | None = None,
) -> jax.stages.Compiled:
    """Compile several updates of all seeds ahead of time: state → state and `UpdateMetrics`.

    Each device steps its environments and computes the gradient for their rows. In each update, the
    gradient and the sums for PopArt are reduced over devices. After the last update, so are the
    metrics. The state is donated.

    Args:
      update_once: update of one seed, from `make_update`.
      state: state of all seeds, or its shapes and shardings.
      num_updates: number of updates per call.
      mesh: mesh of devices.
      numbers: second argument of the program and of `update_once`, shared by all seeds. If None,
        the program has only one argument.
    """

    # All updates of one seed, then the reductions of their metrics over devices.
    def update_seed(
        state: TrainState, numbers: learner.SweptNumbers | None
    ) -> tuple[TrainState, UpdateMetrics]:
        state, metrics = jax.lax.scan(
            lambda state, _: update_once(state, numbers), state, None, num_updates
        )
        counts = metrics.counts
        has_failed = jax.tree.map(lambda a: (~a).any(0).astype(jnp.int32), counts.are_finite)
        longest, has_failed = max_over_rows((counts.longest_unfinished.max(0), has_failed))
        return state, UpdateMetrics(
            mean_over_rows(jax.tree.map(lambda a: a.mean(0), metrics.learner)),
            sum_over_rows(jax.tree.map(lambda a: a.sum(0), metrics.episodes)),
            rollout.UnrollCounts(
                sum_over_rows(counts.transitions.sum(0)),
                longest,
                jax.tree.map(lambda a: a == 0, has_failed),
            ),
        )

    # Map over the seeds of each device, and compile.
    partition = sharding.partition_specs(state)

    def update_seeds(
        state: TrainState, numbers: learner.SweptNumbers | None = None
    ) -> tuple[TrainState, UpdateMetrics]:
        def update_local_seeds(
            state: TrainState, numbers: learner.SweptNumbers | None
        ) -> tuple[TrainState, UpdateMetrics]:
            update_one = functools.partial(update_seed, numbers=numbers)
            return sharding.map_seeds(update_one, mesh)(state)

        return jax.shard_map(
            update_local_seeds,
            mesh=mesh,
            in_specs=(partition, sharding.replicated(mesh).spec),
            out_specs=(partition, sharding.seed_sharding(mesh).spec),
            check_vma=False,
        )(state, numbers)

    shardings = jax.tree.map(lambda a: a.sharding, state), sharding.metrics_sharding(mesh)
    jitted = jax.jit(update_seeds, donate_argnums=0, out_shardings=shardings)
    arguments = (state,) if numbers is None else (state, numbers)
    return jitted.lower(*arguments).compile()


def init_states(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Initialize the state of all seeds, [S, …], with seeds and environments sharded."""
    # Jitted once, so that the shapes and the values of the state share a trace.
    init = functools.partial(init_state, environment, agent, optimizer, config.train.batch)
    init_seeds, seeds = jax.jit(jax.vmap(init)), np.asarray(config.seeds, np.int32)
    shapes = _shard_state(jax.eval_shape(init_seeds, seeds), mesh)
    shardings = jax.tree.map(lambda a: a.sharding, shapes)
    state: TrainState = sharding.jit_once(init_seeds, seeds, out_shardings=shardings)
    return state


def get_state_shapes(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Return the shapes and shardings of the result of `init_states` without computing it."""
    init = functools.partial(init_state, environment, agent, optimizer, config.train.batch)
    return _shard_state(jax.eval_shape(jax.vmap(init), np.asarray(config.seeds, np.int32)), mesh)


def _shard_state(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Return the shapes and shardings of a state for all seeds.

    The learner and the random key for actions are replicated over the devices of a seed.
    """
    by_seed = sharding.seed_sharding(mesh)
    by_rows = sharding.batch_sharding(mesh, axis=1, has_seeds=True)
    learner_shardings = jax.tree.map(lambda _: by_seed, state.learner)
    actor_shardings = jax.tree.map(lambda _: by_rows, state.actor)._replace(key=by_seed)
    return sharding.with_shardings(state, TrainState(learner_shardings, actor_shardings))


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Train and evaluate an agent in a run directory, or resume the run stored there."""
    environment = factory.make_environment(config)
    agent = factory.build_agent(config, environment.spec)
    environments = {'eval': environment}
    if config.eval.held_out:
        environments['held_out'] = factory.make_environment(config, 'eval.held_out')
        factory.check_held_out(config, environment.spec, environments['held_out'].spec)
    with run_dir.open_run(workdir, config, profile) as run:
        _train(config, environments, agent, run)


def _train(
    config: ml_collections.ConfigDict,
    environments: Mapping[str, JaxEnvironment],
    agent: Agent,
    run: run_dir.Run,
) -> None:
    """Run the training loop. `environments` maps evaluation splits to environments."""
    num_updates, environment = rl_config.count_updates(config), environments['eval']
    optimizer = optim.make_optimizer(config.optim, num_updates)
    update_once = make_update(config, environment, agent, optimizer)
    forward_flops = write_costs(run, agent)

    # A new state, or that of the newest checkpoint.
    with progress.Work('drawing the initial parameters and episodes'):
        mesh = run_mesh.make_run_mesh(config)
        state = init_states(config, environment, agent, optimizer, mesh)
    numbers = factory.get_swept_numbers(config, num_updates, mesh)
    # An environment step is acted on once and learned from once.
    meter = utilization.Meter((1 + utilization.UPDATE) * forward_flops, mesh.devices.flat)
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored, meta, records_end = resume(run, checkpoints, unwrap_keys(state), len(environments))
    state = state if restored is None else _wrap_keys(restored, state)
    env_steps = np.asarray(meta.get('env_steps', [0] * len(config.seeds)), np.int64)  # [S]

    compiled: dict[int, jax.stages.Compiled] = {}  # number of updates → program
    with run.open_logger(num_updates, records_end or meta['metrics']) as log:
        if records_end is None:
            splits = make_splits(environments, agent, state.learner, run, mesh)
            write_evaluations(splits, run, log, env_steps)
        while run.step < num_updates:
            # Compile as many updates as a record has.
            num_new = min(config.train.log_every, num_updates - run.step)
            if num_new not in compiled:
                with progress.Work(f'compiling {num_new:,} updates'):
                    compiled[num_new] = compile_updates(update_once, state, num_new, mesh, numbers)

            # Train.
            start_time = time.perf_counter()
            with progress.Work(f'updates {run.step + 1:,} to {run.step + num_new:,}'):
                state, metrics = run.call_traced(num_new, compiled[num_new], state, numbers)
                metrics, statistics = sharding.to_host((metrics, state.learner.statistics))
            seconds = time.perf_counter() - start_time

            # Write the records.
            _check_counts(environment.spec, metrics.counts)
            run.step += num_new
            env_steps += metrics.counts.transitions
            logger.refuse_non_finite(config.seeds, run.step, metrics.learner)
            note = _write_records(run, log, environment.spec, env_steps, metrics, statistics)
            steps_per_second = float(metrics.counts.transitions.sum() / seconds)
            timing = {'seconds': seconds, 'steps_per_second': steps_per_second}
            timing |= meter.measure(steps_per_second)
            log.write_timing(run.step, timing)
            rate = utilization.format_rate(f'{steps_per_second:,.0f} steps/s', timing)
            log.show_progress(run.step, note, rate)

            # Save, stop and evaluate.
            will_evaluate = is_evaluation_due(config, run.step)
            is_stopping = run.should_stop(recorded=True)
            if run.step % config.train.save_every == 0 or will_evaluate or is_stopping:
                snapshot = Snapshot(unwrap_keys(state), state.learner, env_steps.tolist())
                save_or_stop(run, checkpoints, log, snapshot, will_evaluate, is_stopping)
            if will_evaluate:
                splits = make_splits(environments, agent, state.learner, run, mesh)
                write_evaluations(splits, run, log, env_steps)


def make_splits(
    environments: Mapping[str, JaxEnvironment],
    agent: Agent,
    state: learner.LearnerState,
    run: run_dir.Run,
    mesh: jax.sharding.Mesh,
) -> dict[str, Evaluate]:
    """Return split → function that evaluates a state, [S, …], for `write_evaluations`."""
    params = averaging.get_seeds_eval_params(state.opt_state, state.params)
    evaluation_keys = make_evaluation_keys(run.config.seeds, run.step)
    return {
        split: functools.partial(
            evaluate_seeds,
            Simulation(environment, agent, mesh),
            params,
            evaluation_keys,
            run.config.eval,
        )
        for split, environment in environments.items()
    }


def _write_records(
    run: run_dir.Run,
    log: logger.RunLogger,
    spec: Spec,
    env_steps: np.ndarray,
    metrics: UpdateMetrics,
    statistics: popart.Statistics,
) -> str:
    """Write a record for each seed and return a summary of all seeds for the progress line."""
    for seed_index, seed in enumerate(run.config.seeds):
        learner_metrics, episodes, seed_statistics = jax.tree.map(
            operator.itemgetter(seed_index), (metrics.learner, metrics.episodes, statistics)
        )
        record: episode_metrics.Record = {'env_steps': int(env_steps[seed_index])}
        record |= {name: float(value) for name, value in learner_metrics.items()}
        record |= episode_metrics.summarize_episodes(episodes, spec.tasks, spec.has_success)
        record |= episode_metrics.summarize_statistics(seed_statistics, spec.tasks)
        log.write(run.step, seed, 'train', record)

    # The note is about all seeds.
    all_episodes = Episodes(*(a.sum(0) for a in metrics.episodes))
    summary = episode_metrics.summarize_episodes(all_episodes, spec.tasks, spec.has_success)
    return episode_metrics.make_note(summary)


def _check_counts(spec: Spec, counts: rollout.UnrollCounts) -> None:
    """Check that the environment agreed with its spec, before anything is logged.

    Raises:
      UserError: if an episode is too long, or if a reward or an observation is not finite.
    """
    auto_reset.check_length(spec, int(counts.longest_unfinished.max()))
    for name, is_finite in counts.are_finite.items():
        if not is_finite.all():
            raise finite.make_error(spec.name, f'{name} that is not finite')


def unwrap_keys(state: TrainState) -> TrainState:
    """Replace random keys in a state with their data, for checkpoints."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if _is_key(a) else a, state)


def _wrap_keys(state: TrainState, like: TrainState) -> TrainState:
    """Replace the data of random keys in a state with keys, to undo `unwrap_keys`."""
    return jax.tree.map(lambda a, b: jax.random.wrap_key_data(a) if _is_key(b) else a, state, like)


def _is_key(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
