"""The deterministic training loop for a problem, which runs all seeds in one program.

Seeds are distributed over the devices, and each device maps over its own seeds by vmap. Devices do
not communicate. A checkpoint only holds the seeds, so it can be restored on any number of devices.
Arrays with a leading axis of seeds are marked [S, …].
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from mi.fit import factory
from mi.fit.problem import Metrics, Params, Problem
from mi.training import (
    averaging,
    checkpoint,
    logger,
    optim,
    placement,
    progress,
    run_dir,
    sharding,
)


class TrainState(NamedTuple):
    """The training state of one seed. In a run, every array has a leading axis of seeds."""

    params: Params
    opt_state: optax.OptState
    step: Array


def split_keys(seed: Array) -> tuple[Array, Array, Array, Array]:
    """Return the keys for the world, the initial parameters, the batches and the evaluations."""
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
    num_steps: int,
    train_state: TrainState,
    seed: Array,
    update_scale: Array | float = 1.0,
) -> tuple[TrainState, Metrics]:
    """Take training steps for one seed, scaling updates by `update_scale`, and average metrics."""
    world_key, _, batch_key, _ = split_keys(seed)
    world = problem.draw_world(world_key)

    def step(train_state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(batch_key, train_state.step)
        (loss, metrics), gradients = jax.value_and_grad(problem.loss, has_aux=True)(
            train_state.params, world, step_key
        )
        updates, opt_state = optimizer.update(gradients, train_state.opt_state, train_state.params)
        updates = jax.tree.map(lambda u: update_scale * u, updates)
        params = optax.apply_updates(train_state.params, updates)
        return TrainState(params, opt_state, train_state.step + 1), {'loss': loss, **metrics}

    train_state, metrics = jax.lax.scan(step, train_state, None, num_steps)
    return train_state, {name: values.mean() for name, values in metrics.items()}


def evaluate(problem: Problem, params: Params, seed: Array) -> dict[str, Metrics]:
    """Return the metrics of one seed, by split."""
    world_key, _, _, eval_key = split_keys(seed)
    world = problem.draw_world(world_key)
    return problem.evaluate(params, world, eval_key)


def shapes(
    problem: Problem, optimizer: optax.GradientTransformation, num_seeds: int, mesh: Mesh
) -> tuple[TrainState, Array]:
    """Return the shapes of the states and the seeds, [S, …], with their placement on a mesh.

    Args:
      problem, optimizer: the problem to train on, and its optimizer.
      num_seeds: S, the number of seeds.
      mesh: mesh from `placement.seed_mesh`.
    """
    seed_shapes = jax.ShapeDtypeStruct(placement.padded_indices(num_seeds, mesh).shape, jnp.int32)
    init_seed = functools.partial(init_train_state, problem, optimizer)
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.seed_sharding(mesh)),
        (jax.eval_shape(jax.vmap(init_seed), seed_shapes), seed_shapes),
    )


def compile_steps(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    mesh: Mesh,
    *inputs: chex.ArrayTree,
) -> jax.stages.Compiled:
    """Compile `num_steps` steps of all seeds: inputs → (state, metrics), [S, …] each.

    Args:
      problem, optimizer: the problem to train on, and its optimizer.
      num_steps: number of steps per call.
      mesh: mesh from `placement.seed_mesh`.
      *inputs: state and seeds, placed on the mesh, or their `shapes`. The third one, if given, is
        the learning rate of each step of the run, f32 [steps], which replaces the schedule of the
        optimizer. Runs that differ only in their learning rates then have the same program.
    """

    def run_steps(
        train_state: TrainState, seeds: Array, *learning_rates: Array
    ) -> tuple[TrainState, Metrics]:
        with_rates = functools.partial(optim.with_learning_rates, optimizer)
        run_optimizer = with_rates(*learning_rates) if learning_rates else optimizer
        run_seed = functools.partial(train_steps, problem, run_optimizer, num_steps)
        return placement.shard_map_seeds(run_seed, mesh)(train_state, seeds)

    return jax.jit(run_steps, donate_argnums=0).lower(*inputs).compile()


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Train and evaluate all seeds in a run directory, resuming the run if it exists."""
    problem = factory.make_problem(config)
    with run_dir.open_run(workdir, config, profile) as run:
        _train(config, problem, run)


def _train(config: ml_collections.ConfigDict, problem: Problem, run: run_dir.Run) -> None:
    num_steps, num_seeds = config.train.steps, len(config.seeds)
    optimizer = optim.make_optimizer(config.optim, num_steps)
    run.write('cost.json', {'steps': num_steps, **problem.costs()})

    # Place the seeds over the devices, and restore or draw their state.
    mesh = placement.seed_mesh(num_seeds)
    seeds = placement.shard_seeds(np.asarray(config.seeds, np.int32), mesh)
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    train_state, meta = _restore_or_init(problem, optimizer, checkpoints, seeds, num_seeds, mesh)
    run.step = meta['step']

    # An argument of the program, which runs that differ only in the learning rate then share.
    learning_rates = sharding.shard_array(
        np.asarray(optim.compute_learning_rates(config.optim, num_steps)), sharding.replicated(mesh)
    )
    evaluate_seeds = jax.jit(placement.shard_map_seeds(functools.partial(evaluate, problem), mesh))
    compiled_steps: dict[int, jax.stages.Compiled] = {}
    with run.open_logger(num_steps, meta['metrics']) as log:
        while run.step < num_steps:
            record_steps = min(config.train.log_every, num_steps - run.step)
            if record_steps not in compiled_steps:
                with progress.Work(f'compiling {record_steps:,} training steps'):
                    compiled_steps[record_steps] = compile_steps(
                        problem,
                        optimizer,
                        record_steps,
                        mesh,
                        train_state,
                        seeds,
                        learning_rates,
                    )

            # The steps of one record, and the record.
            start_time = time.perf_counter()
            with progress.Work(f'training steps {run.step + 1:,} to {run.step + record_steps:,}'):
                update = compiled_steps[record_steps]
                train_state, metrics = run.call_traced(
                    record_steps, update, train_state, seeds, learning_rates
                )
                metrics = placement.gather_seeds(metrics, num_seeds)
            seconds = time.perf_counter() - start_time
            run.step += record_steps
            step = run.step
            logger.refuse_non_finite(config.seeds, step, metrics)
            write_records(log, step, config.seeds, {'train': metrics})
            speed = record_steps * problem.examples * num_seeds / seconds
            log.write_timing(step, {'seconds': seconds, 'examples_per_second': speed})
            mean_loss = metrics['loss'].mean()
            log.show_progress(step, f'loss {mean_loss:.4g}', f'{speed:,.0f} examples/s')

            # What is due at this step: evaluation, artefacts, checkpoint.
            if step % config.train.eval_every == 0 or step == num_steps:
                with progress.Work('evaluating'):
                    eval_metrics = evaluate_seeds(_get_eval_params(train_state), seeds)
                    eval_metrics = placement.gather_seeds(eval_metrics, num_seeds)
                write_records(log, step, config.seeds, eval_metrics)
            if step == num_steps:
                _write_artifacts(problem, run, train_state, seeds, mesh)
            should_stop = run.should_stop(recorded=True)
            if step % config.train.save_every == 0 or step == num_steps or should_stop:
                state_parts = {
                    'parameters': train_state.params,
                    'moments of the optimizer': train_state.opt_state,
                }
                logger.refuse_broken_state(config.seeds, step, state_parts)
                host_state = placement.gather_seeds(train_state, num_seeds)
                checkpoints.save(step, host_state, {'metrics': log.position()})
                if should_stop and step < num_steps:
                    run.exit_preempted()


def _get_eval_params(train_state: TrainState) -> Params:
    return averaging.get_seeds_eval_params(train_state.opt_state, train_state.params)


def _restore_or_init(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    checkpoints: checkpoint.Checkpoints,
    seeds: Array,
    num_seeds: int,
    mesh: Mesh,
) -> tuple[TrainState, checkpoint.Meta]:
    """Return the state of all seeds and its metadata, from a checkpoint or newly initialized."""
    state_shapes, _ = shapes(problem, optimizer, num_seeds, mesh)
    restored = checkpoints.restore(placement.gathered_shapes(state_shapes, num_seeds))
    if restored is not None:
        host_state, meta = restored
        return placement.shard_seeds(host_state, mesh), meta
    with progress.Work('drawing the initial parameters'):
        init_seed = functools.partial(init_train_state, problem, optimizer)
        train_state = sharding.jit_once(placement.shard_map_seeds(init_seed, mesh), seeds)
    return train_state, {'step': 0, 'metrics': 0}


def write_records(
    log: logger.RunLogger,
    step: int,
    seeds: Sequence[int],
    metrics: dict[str, dict[str, np.ndarray]],
) -> None:
    """Write a record of the metrics [S] for each seed and split, with None if not finite."""
    for split, split_metrics in metrics.items():
        for seed_index, seed in enumerate(seeds):
            seed_metrics = {name: float(array[seed_index]) for name, array in split_metrics.items()}
            finite_metrics = {
                name: metric if math.isfinite(metric) else None
                for name, metric in seed_metrics.items()
            }
            log.write(step, seed, split, finite_metrics)


def _write_artifacts(
    problem: Problem, run: run_dir.Run, train_state: TrainState, seeds: Array, mesh: Mesh
) -> None:
    """Write the problem's artifacts, [S, …] each, to artefacts.npz."""

    def draw_one(params: Params, seed: Array) -> Metrics:
        world_key, _, _, eval_key = split_keys(seed)
        return problem.artifacts(params, problem.draw_world(world_key), eval_key)

    draw_seeds = jax.jit(placement.shard_map_seeds(draw_one, mesh))
    arrays = draw_seeds(_get_eval_params(train_state), seeds)
    if arrays:
        run.write_arrays('artefacts.npz', placement.gather_seeds(arrays, len(run.config.seeds)))
