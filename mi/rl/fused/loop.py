"""Topology 'fused': acting and learning are one program, deterministic, for all seeds of a run.

Arrays with a leading axis of seeds are marked [S, …]. Several devices divide the seeds and the
environments, see `mi.training.sharding`; the program is the same.
"""

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

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
from mi.rl import (
    trajectory as rl_trajectory,
)
from mi.rl.agent import Agent
from mi.rl.envs import auto_reset, finite
from mi.rl.envs.spec import JaxEnvironment, Spec
from mi.rl.evaluate import episodes, evaluation_keys, summary
from mi.rl.fused import rollout
from mi.rows import max_over_rows, mean_over_rows, sum_over_rows
from mi.training import (
    checkpoint,
    logger,
    optim,
    progress,
    run_dir,
    sharding,
)


class State(NamedTuple):
    """What an update changes; in a run every array has a leading axis of seeds."""

    learner: learner.LearnerState
    actor: rollout.ActorState


class Measured(NamedTuple):
    """What one update measures, or several.

    Attributes:
      learner: name → mean over the updates.
      episodes: that ended in them.
      counts: of them.
    """

    learner: dict[str, Array]
    episodes: rl_trajectory.Episodes
    counts: rollout.UnrollCounts


def init(
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    batch: int,
    seed: Array,
) -> State:
    """The state before the first update of one seed."""
    of_params, of_actor = jax.random.split(jax.random.key(seed))
    params = factory.init_params(agent, of_params)
    tasks = len(environment.spec.tasks)
    acting = rollout.init_actor_state(environment, agent, batch, of_actor)
    return State(learner.init_learner_state(params, optimiser, tasks), acting)


def update(
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    hyperparameters: loss.Hyperparameters,
    length: int,
    state: State,
) -> tuple[State, Measured]:
    """One unroll and one update of one seed; a pure function."""
    acting, trajectory, ended, counts = rollout.unroll(
        environment, agent, length, state.learner.params, state.actor
    )
    learning, measured = learner.update(
        agent, optimiser, hyperparameters, state.learner, trajectory
    )
    return State(learning, acting), Measured(measured, ended, counts)


def compile_updates(
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    state: State,
    count: int,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Compiled:
    """`count` updates of all seeds, state → state and `Measured`, [S, …].

    Each device steps its environments and computes the gradient on their rows. In an update the
    devices exchange the gradient and the sums of PopArt; once for all updates, what was measured.

    Compiled ahead; the state is donated.
    """
    one = functools.partial(
        update,
        environment,
        agent,
        optimiser,
        factory.get_hyperparameters(config),
        config.train.length,
    )

    def several(state: State) -> tuple[State, Measured]:
        state, measured = jax.lax.scan(lambda state, _: one(state), state, None, count)
        counts = measured.counts
        wrong = jax.tree.map(lambda a: (~a).any(0).astype(jnp.int32), counts.are_finite)
        longest, wrong = max_over_rows((counts.longest_unfinished.max(0), wrong))
        return state, Measured(
            mean_over_rows(jax.tree.map(lambda a: a.mean(0), measured.learner)),
            sum_over_rows(jax.tree.map(lambda a: a.sum(0), measured.episodes)),
            rollout.UnrollCounts(
                sum_over_rows(counts.transitions.sum(0)),
                longest,
                jax.tree.map(lambda a: a == 0, wrong),
            ),
        )

    partition, by_seed = sharding.partition_specs(state), sharding.seed_sharding(mesh).spec
    all_seeds = jax.shard_map(
        sharding.map_seeds(several, mesh),
        mesh=mesh,
        in_specs=(partition,),
        out_specs=(partition, by_seed),
        check_vma=False,
    )
    shardings = jax.tree.map(lambda a: a.sharding, state), sharding.metrics_sharding(mesh)
    return jax.jit(all_seeds, donate_argnums=0, out_shardings=shardings).lower(state).compile()


def start(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> State:
    """The state of all seeds, [S, …], its seeds and rows of environments split over the devices."""
    fresh = functools.partial(init, environment, agent, optimiser, config.train.batch)
    like = shapes(config, environment, agent, optimiser, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, like)
    seeds = np.asarray(config.seeds, np.int32)
    return sharding.jit_once(jax.vmap(fresh), seeds, out_shardings=shardings)


def shapes(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> State:
    """What `start` makes, as `jax.ShapeDtypeStruct`s with their shardings."""
    fresh = functools.partial(init, environment, agent, optimiser, config.train.batch)
    state: State = jax.eval_shape(jax.vmap(fresh), np.asarray(config.seeds, np.int32))
    by_seed, rows = sharding.seed_sharding(mesh), sharding.batch_sharding(mesh, 1, has_seeds=True)
    split = jax.tree.map(lambda _: rows, state.actor)._replace(key=by_seed)
    shardings: Any = State(jax.tree.map(lambda _: by_seed, state.learner), split)
    return sharding.with_shardings(state, shardings)


def mesh_of(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Return the mesh of a run of the config, on the devices that are here if none are given."""
    shape = config.train.mesh
    return sharding.make_mesh(len(config.seeds), config.train.batch, shape=shape, devices=devices)


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one."""
    environment = envs.make(*factory.get_environment_args(config))
    agent = factory.build_agent(config, environment.spec)
    evaluations = {'eval': environment}
    if config.eval.held_out:
        key = 'eval.held_out'
        evaluations['held_out'] = envs.make(*factory.get_environment_args(config, key), key)
        factory.check_held_out(config, environment.spec, evaluations['held_out'].spec)
    with run_dir.open_run(workdir, config, profile) as run:
        _train(config, evaluations, agent, run)


def _train(
    config: ml_collections.ConfigDict,
    evaluations: dict[str, JaxEnvironment],
    agent: Agent,
    run: run_dir.Run,
) -> None:
    total, B, T = rl_config.count_updates(config), config.train.batch, config.train.length
    environment = evaluations['eval']
    tasks, has_success = environment.spec.tasks, environment.spec.has_success
    optimiser = optim.make_optimizer(config.optim, total)
    run.write('cost.json', {'steps': total, **factory.compute_costs(agent, B, T)})
    with progress.Work('drawing the initial parameters and episodes'):
        mesh = mesh_of(config)
        state = start(config, environment, agent, optimiser, mesh)
    saved = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored = saved.restore(_plain(state))
    meta: dict[str, Any] = {'step': 0, 'metrics': 0, 'env_steps': [0] * len(config.seeds)}
    if restored is not None:
        state, meta = _keyed(restored[0], state), restored[1]
    run.step = meta['step']
    env_steps = np.asarray(meta['env_steps'], np.int64)  # of each seed

    # A run that ended between a checkpoint and the evaluation of its step has that to do still.
    policies = 1 + config.eval.greedy
    pending = len(evaluations) * policies * len(config.seeds)
    if meta.get('is_evaluated') is not False:
        pending = 0
    position = logger.find_records_end(run.path, meta['metrics'], run.step, pending)

    compiled: dict[int, jax.stages.Compiled] = {}
    with run.open_logger(total, position or meta['metrics']) as log:
        if position is None:
            _evaluate(evaluations, agent, state, run, log, env_steps, mesh)
        while run.step < total:
            count = min(config.train.log_every, total - run.step)
            if count not in compiled:
                with progress.Work(f'compiling {count:,} updates'):
                    compiled[count] = compile_updates(
                        environment, agent, optimiser, config, state, count, mesh
                    )
            began = time.perf_counter()
            with progress.Work(f'updates {run.step + 1:,} to {run.step + count:,}'):
                state, measured = run.call_traced(count, compiled[count], state)
                measured, statistics = sharding.to_host((measured, state.learner.statistics))
            seconds = time.perf_counter() - began
            learner_values, ended, counts = measured
            _check_counts(environment.spec, counts)
            run.step += count
            step, rate = run.step, counts.transitions.sum() / seconds
            env_steps += counts.transitions
            logger.refuse_non_finite(config.seeds, step, learner_values)
            for i, seed in enumerate(config.seeds):
                of_seed = jax.tree.map(lambda a, i=i: a[i], (learner_values, ended, statistics))
                values: episode_metrics.Record = {
                    n: float(value) for n, value in of_seed[0].items()
                }
                values |= episode_metrics.of_episodes(of_seed[1], tasks, has_success)
                values |= episode_metrics.of_statistics(of_seed[2], tasks)
                log.write(step, seed, 'train', {'env_steps': int(env_steps[i]), **values})
            log.write_timing(step, {'seconds': seconds, 'steps_per_second': rate})
            all_seeds = rl_trajectory.Episodes(*(a.sum(0) for a in ended))
            note = episode_metrics.note(episode_metrics.of_episodes(all_seeds, tasks, has_success))
            log.show_progress(step, note, f'{rate:,.0f} steps/s')
            evaluates = step % config.train.eval_every == 0 or step == total
            stops = run.should_stop(recorded=True)
            # The checkpoint comes before the evaluation, which may take long and be cut short.
            if step % config.train.save_every == 0 or evaluates or stops:
                logger.refuse_broken_state(config.seeds, step, learner.name_parts(state.learner))
                meta = {'metrics': log.position(), 'env_steps': env_steps.tolist()}
                saved.save(step, _plain(state), meta | {'is_evaluated': not evaluates})
                if stops and (step < total or evaluates):
                    run.exit_preempted()
            if evaluates:
                _evaluate(evaluations, agent, state, run, log, env_steps, mesh)


def _check_counts(spec: Spec, counts: rollout.UnrollCounts) -> None:
    """Refuse an environment that is not what its spec says, before anything of it is recorded.

    Raises:
      UserError: if an episode is too long, or if a reward or an observation is not finite.
    """
    auto_reset.check_length(spec, int(counts.longest_unfinished.max()))
    for name, is_finite in counts.are_finite.items():
        if not is_finite.all():
            raise finite.error(spec.name, f'{name} that is not finite')


def _evaluate(
    evaluations: dict[str, JaxEnvironment],
    agent: Agent,
    state: State,
    run: run_dir.Run,
    log: logger.RunLogger,
    env_steps: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> None:
    """Write a record for each environment, seed and policy; or end the run, if it is asked to."""
    config, step = run.config, run.step
    policies = ('', '_greedy') if config.eval.greedy else ('',)
    for split, environment in evaluations.items():
        played = {}
        for policy in policies:
            if run.should_stop(recorded=False):
                run.exit_preempted()
            with progress.Work(f'evaluating {split}'):
                played[policy] = episodes(
                    environment,
                    agent,
                    state.learner.params,
                    evaluation_keys(config.seeds, step),
                    config.eval.episodes,
                    policy == '_greedy',
                    mesh,
                )
        for (i, seed), policy in itertools.product(enumerate(config.seeds), policies):
            scores = summary(environment.spec, *played[policy][i])
            log.write(step, seed, split + policy, {'env_steps': int(env_steps[i]), **scores})


def _plain(state: State) -> State:
    """The state with random keys as the numbers that they are, for the checkpoint."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if _is_key(a) else a, state)


def _keyed(plain: State, like: State) -> State:
    return jax.tree.map(lambda a, b: jax.random.wrap_key_data(a) if _is_key(b) else a, plain, like)


def _is_key(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
