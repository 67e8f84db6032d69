"""Topology 'fused': acting and learning are one program, deterministic, for all seeds of a run.

Arrays with a leading axis of seeds are marked [S, …]. On several devices the environments are
split over them and everything else is on each; the program is the same.
"""

import functools
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

from mi import checkpoint, metrics, optim, parallel, progress, run
from mi.rl import actor, envs, learner, records, setup
from mi.rl.envs import auto_reset, finite
from mi.rl.envs.spec import JaxEnvironment, Spec
from mi.rl.evaluate import episodes, summary
from mi.rl.networks import Agent


class State(NamedTuple):
    """What an update changes; in a run every array has a leading axis of seeds."""

    learner: learner.State
    actor: actor.State


class Measured(NamedTuple):
    """What one update measures, or several.

    Attributes:
      learner: name → mean over the updates.
      episodes: that ended in them.
      counts: of them.
    """

    learner: dict[str, Array]
    episodes: actor.Episodes
    counts: actor.Counts


def init(
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    batch: int,
    seed: Array,
) -> State:
    """The state before the first update of one seed."""
    of_params, of_actor = jax.random.split(jax.random.key(seed))
    params = setup.init_params(agent, of_params)
    tasks = len(environment.spec.tasks)
    acting = actor.start(environment, agent, batch, of_actor)
    return State(learner.start(params, optimiser, tasks), acting)


def update(
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
    hyperparameters: learner.Hyperparameters,
    length: int,
    state: State,
) -> tuple[State, Measured]:
    """One unroll and one update of one seed; a pure function."""
    acting, trajectory, ended, counts = actor.unroll(
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
) -> jax.stages.Compiled:
    """`count` updates of all seeds, state → state and `Measured`, [S, …].

    Compiled ahead; the state is donated.
    """
    one = functools.partial(
        update,
        environment,
        agent,
        optimiser,
        setup.hyperparameters(config),
        config.train.length,
    )

    def several(state: State) -> tuple[State, Measured]:
        state, measured = jax.lax.scan(lambda state, _: one(state), state, None, count)
        counts = measured.counts
        return state, Measured(
            jax.tree.map(lambda a: a.mean(0), measured.learner),
            jax.tree.map(lambda a: a.sum(0), measured.episodes),
            actor.Counts(
                counts.transitions.sum(0),
                counts.longest_unfinished.max(0),
                jax.tree.map(lambda a: a.all(0), counts.are_finite),
            ),
        )

    def all_seeds(state: State) -> Any:
        # On few cores the products of one seed fill them, and batched ones are 1.2 to 1.3 × slower.
        if jax.default_backend() == 'cpu':
            return jax.lax.map(several, state)
        return jax.vmap(several)(state)

    shardings = jax.tree.map(lambda a: a.sharding, state)
    whole = state.learner.statistics.mu.sharding
    compiled = jax.jit(all_seeds, donate_argnums=0, out_shardings=(shardings, whole))
    return compiled.lower(state).compile()


def start(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
) -> State:
    """The state of all seeds, [S, …], its rows of environments split over the devices."""
    fresh = functools.partial(init, environment, agent, optimiser, config.train.batch)
    like = shapes(config, environment, agent, optimiser)
    shardings = jax.tree.map(lambda a: a.sharding, like)
    seeds = np.asarray(config.seeds, np.int32)
    return parallel.once(jax.vmap(fresh), seeds, out_shardings=shardings)


def shapes(
    config: ml_collections.ConfigDict,
    environment: JaxEnvironment,
    agent: Agent,
    optimiser: optax.GradientTransformation,
) -> State:
    """What `start` makes, as `jax.ShapeDtypeStruct`s with their shardings."""
    fresh = functools.partial(init, environment, agent, optimiser, config.train.batch)
    state: State = jax.eval_shape(jax.vmap(fresh), np.asarray(config.seeds, np.int32))
    mesh = parallel.mesh(config.train.batch)
    whole, rows = parallel.whole(mesh), parallel.by_rows(mesh, axis=1)
    split = jax.tree.map(lambda _: rows, state.actor)._replace(key=whole)
    shardings: Any = State(jax.tree.map(lambda _: whole, state.learner), split)
    return parallel.placed(state, shardings)


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one."""
    environment = envs.make(*setup.environment(config))
    agent = setup.agent(config, environment.spec)
    evaluations = {'eval': environment}
    if config.eval.held_out:
        key = 'eval.held_out'
        evaluations['held_out'] = envs.make(*setup.environment(config, key), key)
        setup.fits(config, environment.spec, evaluations['held_out'].spec)
    with run.start(workdir, config, profile) as this:
        _train(config, evaluations, agent, this)


def _train(
    config: ml_collections.ConfigDict,
    evaluations: dict[str, JaxEnvironment],
    agent: Agent,
    this: run.Run,
) -> None:
    total, B, T = setup.updates(config), config.train.batch, config.train.length
    environment = evaluations['eval']
    tasks, has_success = environment.spec.tasks, environment.spec.has_success
    optimiser = optim.optimiser(config.optim, total)
    this.write('cost.json', {'steps': total, **setup.costs(agent, B, T)})
    with progress.Work('drawing the initial parameters and episodes'):
        state = start(config, environment, agent, optimiser)
    saved = checkpoint.Checkpoints(this.path / 'checkpoints', config.train.keep)
    restored = saved.restore(_plain(state))
    meta: dict[str, Any] = {'step': 0, 'metrics': 0, 'env_steps': [0] * len(config.seeds)}
    if restored is not None:
        state, meta = _keyed(restored[0], state), restored[1]
    this.step = meta['step']
    env_steps = np.asarray(meta['env_steps'], np.int64)  # of each seed

    # A run that ended between a checkpoint and the evaluation of its step has that to do still.
    policies = 1 + config.eval.greedy
    pending = len(evaluations) * policies * len(config.seeds)
    if meta.get('is_evaluated') is not False:
        pending = 0
    position = metrics.end_of_records(this.path, meta['metrics'], this.step, pending)

    compiled: dict[int, jax.stages.Compiled] = {}
    with this.log(total, position or meta['metrics']) as log:
        if position is None:
            _evaluate(evaluations, agent, state, this, log, env_steps)
        while this.step < total:
            count = min(config.train.log_every, total - this.step)
            if count not in compiled:
                with progress.Work(f'compiling {count:,} updates'):
                    compiled[count] = compile_updates(
                        environment, agent, optimiser, config, state, count
                    )
            began = time.perf_counter()
            with progress.Work(f'updates {this.step + 1:,} to {this.step + count:,}'):
                state, measured = this.traced(count, compiled[count], state)
                measured, statistics = jax.device_get((measured, state.learner.statistics))
            seconds = time.perf_counter() - began
            learner_values, ended, counts = measured
            _check_counts(environment.spec, counts)
            this.step += count
            step, rate = this.step, counts.transitions.sum() / seconds
            env_steps += counts.transitions
            metrics.refuse_non_finite(config.seeds, step, learner_values)
            for i, seed in enumerate(config.seeds):
                of_seed = jax.tree.map(lambda a, i=i: a[i], (learner_values, ended, statistics))
                values: records.Record = {n: float(value) for n, value in of_seed[0].items()}
                values |= records.of_episodes(of_seed[1], tasks, has_success)
                values |= records.of_statistics(of_seed[2], tasks)
                log.write(step, seed, 'train', {'env_steps': int(env_steps[i]), **values})
            log.timing(step, {'seconds': seconds, 'steps_per_second': rate})
            all_seeds = actor.Episodes(*(a.sum(0) for a in ended))
            note = records.note(records.of_episodes(all_seeds, tasks, has_success))
            log.progress(step, note, f'{rate:,.0f} steps/s')
            evaluates = step % config.train.eval_every == 0 or step == total
            stops = this.stops(recorded=True)
            # The checkpoint comes before the evaluation, which may take long and be cut short.
            if step % config.train.save_every == 0 or evaluates or stops:
                metrics.refuse_broken(config.seeds, step, learner.parts(state.learner))
                meta = {'metrics': log.position(), 'env_steps': env_steps.tolist()}
                saved.save(step, _plain(state), meta | {'is_evaluated': not evaluates})
                if stops and (step < total or evaluates):
                    this.preempted()
            if evaluates:
                _evaluate(evaluations, agent, state, this, log, env_steps)


def _check_counts(spec: Spec, counts: actor.Counts) -> None:
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
    this: run.Run,
    log: metrics.Log,
    env_steps: np.ndarray,
) -> None:
    """Write a record for each environment, seed and policy; or end the run, if it is asked to."""
    if not parallel.first():
        return
    config, step = this.config, this.step
    each = config.eval.episodes
    policies = (False, True) if config.eval.greedy else (False,)
    runs = itertools.product(evaluations.items(), enumerate(config.seeds), policies)
    for (split, environment), (i, seed), greedy in runs:
        if this.stops(recorded=False):
            this.preempted()
        params = jax.tree.map(lambda a, i=i: a[i], parallel.here(state.learner.params))
        key = jax.random.fold_in(jax.random.key(seed), step)
        with progress.Work(f'evaluating {split}'):
            played = episodes(environment, agent, params, key, each, greedy)
        values = {'env_steps': int(env_steps[i]), **summary(environment.spec, *played)}
        log.write(step, seed, f'{split}_greedy' if greedy else split, values)


def _plain(state: State) -> State:
    """The state with random keys as the numbers that they are, for the checkpoint."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if _is_key(a) else a, state)


def _keyed(plain: State, like: State) -> State:
    return jax.tree.map(lambda a, b: jax.random.wrap_key_data(a) if _is_key(b) else a, plain, like)


def _is_key(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
