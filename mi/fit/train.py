"""The loop that fits a problem: all seeds of a run in one program; deterministic.

Seeds are placed over the devices, and each device maps over its own by vmap. Nothing is
communicated, and a checkpoint holds the seeds alone, so that it moves between numbers of devices.
Arrays with a leading axis of seeds are marked [S, …].
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from mi.fit import factory
from mi.fit.problem import Metrics, Problem
from mi.training import (
    checkpoint,
    logger,
    optim,
    placement,
    progress,
    run_dir,
    sharding,
)


class TrainState(NamedTuple):
    """The state of one seed; in a run every array has a leading axis of seeds."""

    params: Any
    opt_state: optax.OptState
    step: Array


def split_keys(seed: Array) -> tuple[Array, Array, Array, Array]:
    """Return the keys of the world, the initial parameters, the batches and the evaluations."""
    world_key, init_key, batch_key, eval_key = jax.random.split(jax.random.key(seed), 4)
    return world_key, init_key, batch_key, eval_key


def init_train_state(
    problem: Problem, optimizer: optax.GradientTransformation, seed: Array
) -> TrainState:
    """Return the state of one seed before its first step."""
    world_key, init_key, _, _ = split_keys(seed)
    params = problem.init_params(init_key, problem.draw_world(world_key))
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def train_steps(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    count: int,
    state: TrainState,
    seed: Array,
    rate: Array | float = 1.0,
) -> tuple[TrainState, Metrics]:
    """Take `count` steps of one seed and average their metrics; `rate` scales the updates."""
    world_key, _, batch_key, _ = split_keys(seed)
    world = problem.draw_world(world_key)

    def step(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(batch_key, state.step)
        (loss, metrics), gradients = jax.value_and_grad(problem.loss, has_aux=True)(
            state.params, world, key
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: rate * u, updates)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), {'loss': loss, **metrics}

    state, metrics = jax.lax.scan(step, state, None, count)
    return state, {name: values.mean() for name, values in metrics.items()}


def evaluate(problem: Problem, params: Any, seed: Array) -> dict[str, Metrics]:
    """Return the metrics of one seed, by split."""
    world_key, _, _, key = split_keys(seed)
    world = problem.draw_world(world_key)
    return problem.evaluate(params, world, key)


def shapes(
    problem: Problem, optimizer: optax.GradientTransformation, count: int, mesh: Mesh
) -> tuple[TrainState, Array]:
    """Return the shapes of the state and the numbers of `count` seeds, placed on a mesh.

    Args:
      problem, optimizer: the problem to train on, and its optimizer.
      count: S.
      mesh: mesh from `placement.seed_mesh`.
    """
    seeds = jax.ShapeDtypeStruct(placement.padded_indices(count, mesh).shape, jnp.int32)
    init = functools.partial(init_train_state, problem, optimizer)
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.seed_sharding(mesh)),
        (jax.eval_shape(jax.vmap(init), seeds), seeds),
    )


def compile_steps(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    count: int,
    state: TrainState,
    seeds: Array,
    mesh: Mesh,
) -> jax.stages.Compiled:
    """Compile `count` steps of all seeds: (state, seeds) → (state, metrics), [S, …] each.

    Args:
      problem, optimizer: the problem to train on, and its optimizer.
      count: steps.
      state, seeds: placed on the mesh, or their `shapes`.
      mesh: mesh from `placement.seed_mesh`.
    """
    program = placement.shard_map_seeds(
        functools.partial(train_steps, problem, optimizer, count), mesh
    )
    return jax.jit(program, donate_argnums=0).lower(state, seeds).compile()


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Train and evaluate all seeds, and write a run directory; resume it if there is one."""
    problem = factory.make_problem(config)
    with run_dir.open_run(workdir, config, profile) as run:
        _train(config, problem, run)


def _train(config: ml_collections.ConfigDict, problem: Problem, run: run_dir.Run) -> None:
    total, count_seeds = config.train.steps, len(config.seeds)
    optimizer = optim.make_optimizer(config.optim, total)
    run.write('cost.json', {'steps': total, **problem.costs()})

    # The state of all seeds: that of a checkpoint, or drawn where the seeds are placed.
    mesh = placement.seed_mesh(count_seeds)
    seeds = placement.shard_seeds(np.asarray(config.seeds, np.int32), mesh)
    shape_tree, _ = shapes(problem, optimizer, count_seeds, mesh)
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored = checkpoints.restore(placement.gathered_shapes(shape_tree, count_seeds))
    meta: dict[str, Any] = {'step': 0, 'metrics': 0}
    if restored is not None:
        host_state, meta = restored
        state = placement.shard_seeds(host_state, mesh)
    else:
        with progress.Work('drawing the initial parameters'):
            init = functools.partial(init_train_state, problem, optimizer)
            state = sharding.jit_once(placement.shard_map_seeds(init, mesh), seeds)
    run.step = meta['step']

    measure = jax.jit(placement.shard_map_seeds(functools.partial(evaluate, problem), mesh))
    compiled: dict[int, jax.stages.Compiled] = {}
    with run.open_logger(total, meta['metrics']) as log:
        while run.step < total:
            count = min(config.train.log_every, total - run.step)
            if count not in compiled:
                with progress.Work(f'compiling {count:,} training steps'):
                    compiled[count] = compile_steps(problem, optimizer, count, state, seeds, mesh)

            # The steps of one record, and the record.
            start_time = time.perf_counter()
            with progress.Work(f'training steps {run.step + 1:,} to {run.step + count:,}'):
                state, metrics = run.call_traced(count, compiled[count], state, seeds)
                metrics = placement.gather_seeds(metrics, count_seeds)
            seconds = time.perf_counter() - start_time
            run.step += count
            step = run.step
            logger.refuse_non_finite(config.seeds, step, metrics)
            write_records(log, step, config.seeds, {'train': metrics})
            rate = count * problem.examples * count_seeds / seconds
            log.write_timing(step, {'seconds': seconds, 'examples_per_second': rate})
            log.show_progress(step, f'loss {metrics["loss"].mean():.4g}', f'{rate:,.0f} examples/s')

            # What is due at this step: evaluation, artefacts, checkpoint.
            if step % config.train.eval_every == 0 or step == total:
                with progress.Work('evaluating'):
                    scores = placement.gather_seeds(measure(state.params, seeds), count_seeds)
                write_records(log, step, config.seeds, scores)
            if step == total:
                _write_artifacts(problem, run, state, seeds, mesh)
            stops = run.should_stop(recorded=True)
            if step % config.train.save_every == 0 or step == total or stops:
                parts = {'parameters': state.params, 'moments of the optimizer': state.opt_state}
                logger.refuse_broken_state(config.seeds, step, parts)
                host_state = placement.gather_seeds(state, count_seeds)
                checkpoints.save(step, host_state, {'metrics': log.position()})
                if stops and step < total:
                    run.exit_preempted()


def write_records(
    log: logger.RunLogger,
    step: int,
    seeds: Sequence[int],
    metrics: dict[str, dict[str, np.ndarray]],
) -> None:
    """Write a record for each seed and split, of metrics [S]; None for what is not finite."""
    for split, split_metrics in metrics.items():
        for i, seed in enumerate(seeds):
            values = {name: float(value[i]) for name, value in split_metrics.items()}
            finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
            log.write(step, seed, split, finite)


def _write_artifacts(
    problem: Problem, run: run_dir.Run, state: TrainState, seeds: Array, mesh: Mesh
) -> None:
    """Write the problem's artefacts, [S, …] each, to artefacts.npz."""

    def draw_one(params: Any, seed: Array) -> Metrics:
        world_key, _, _, key = split_keys(seed)
        return problem.artifacts(params, problem.draw_world(world_key), key)

    arrays = jax.jit(placement.shard_map_seeds(draw_one, mesh))(state.params, seeds)
    if arrays:
        run.write_arrays('artefacts.npz', placement.gather_seeds(arrays, len(run.config.seeds)))
