"""Estimates of a run's memory: the state of all seeds, and the compiled programs.

Nothing is allocated or run: states are shapes, and programs are compiled for the present devices or
for those that `mi.estimate.topologies` describes. The estimate for a training step is the
compiler's own report. Data, other programs and the device's runtime need additional memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import ml_collections
import numpy as np

from mi import precision
from mi.config import UserError
from mi.estimate import costs
from mi.fit import factory as fit
from mi.fit import train as train_fit
from mi.lm import config as lm
from mi.lm import evaluate as evaluate_lm
from mi.rl import config as rl_config
from mi.rl import evaluate as evaluate_rl
from mi.rl import factory as rl
from mi.rl.actors import loop as actors_loop
from mi.rl.fused import loop as fused
from mi.training import optim, placement, run_mesh

Devices = Sequence[jax.Device] | None  # None for the devices that are present


class RunPrograms(NamedTuple):
    """The state of a run as shapes, and functions that compile its programs.

    Attributes:
      state: the trees 'parameters', 'optimizer' and 'other' of all seeds, which a checkpoint holds.
      mesh: the devices of the programs.
      updates: number of updates per call of the compiled training program.
      compile: function that compiles the training program: one step, or all steps of one record.
      compile_evaluation: function that compiles the evaluation program, or None if there is none.
    """

    state: dict[str, chex.ArrayTree]
    mesh: jax.sharding.Mesh
    updates: int
    compile: Callable[[], jax.stages.Compiled]
    compile_evaluation: Callable[[], jax.stages.Compiled] | None = None


def estimate_memory(config: ml_collections.ConfigDict, compiles: bool = True) -> costs.Costs:
    """Return the memory of a config's run, in bytes.

    - 'parameters', 'optimizer', 'other': the state of all seeds.
    - 'checkpoint': their sum, before compression.
    - 'step': {'arguments', 'outputs', 'in_place', 'temporaries', 'peak'} per device of the compiled
      step, if `compiles` is True. 'in_place' are the arguments that are overwritten by outputs, and
      peak = arguments + outputs − in_place + temporaries.

    Raises:
      UserError: if the config is invalid, or is a search, which chooses its models during the run.
    """
    training = make_programs(config)
    estimate: costs.Costs = {name: count_bytes(tree) for name, tree in training.state.items()}
    # A checkpoint holds the state, so its size is the sum so far.
    estimate['checkpoint'] = sum(estimate.values())
    if compiles and (step := measure(training.compile())) is not None:
        estimate['step'] = step
    return estimate


def make_programs(config: ml_collections.ConfigDict, devices: Devices = None) -> RunPrograms:
    """Return the state and the programs of a config's run.

    Args:
      config: a config of any task but 'search'.
      devices: the devices that share the work, which need not be present. Defaults to all present
        devices.

    Raises:
      UserError: if the config is invalid, or is a search, which chooses its models during the run.
    """
    if config.task not in PROGRAMS:
        raise UserError(
            f'config.task = {config.task!r}: expected one of {", ".join(PROGRAMS)}, because '
            'a search chooses its models during the run'
        )
    training = PROGRAMS[config.task](config, devices)
    # Compile with the run's precision of matrix products.
    with_precision = precision.use_config(config)
    programs = training._replace(compile=with_precision(training.compile))
    if training.compile_evaluation is not None:
        evaluation = with_precision(training.compile_evaluation)
        programs = programs._replace(compile_evaluation=evaluation)
    return programs


def measure(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Return a program's memory per device, as in `estimate_memory`, or None if unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    program = {
        'arguments': analysis.argument_size_in_bytes,
        'outputs': analysis.output_size_in_bytes,
        'in_place': analysis.alias_size_in_bytes,
        'temporaries': analysis.temp_size_in_bytes,
    }
    return program | {'peak': sum(program.values()) - 2 * program['in_place']}


def count_bytes(tree: chex.ArrayTree) -> int:
    """Count the bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _lm(config: ml_collections.ConfigDict, devices: Devices) -> RunPrograms:
    config, trainer, _, num_domains = costs.make_lm_setup(config)
    seeds = np.asarray(config.seeds, np.int32)
    mesh = run_mesh.make_run_mesh(config, devices)
    state_shapes = trainer.shapes(seeds, mesh)
    batch_shapes = trainer.batch_shapes(seeds, config.train.length, mesh)
    return RunPrograms(
        {
            'parameters': state_shapes.params,
            'optimizer': state_shapes.opt_state,
            'other': state_shapes.carry,
        },
        mesh,
        1,
        functools.partial(trainer.compile, state_shapes, batch_shapes, mesh),
        functools.partial(
            evaluate_lm.compile_segment,
            trainer.model,
            state_shapes.params,
            lm.get_reading(config),
            num_domains > 0,
            mesh,
        ),
    )


def _rl(config: ml_collections.ConfigDict, devices: Devices) -> RunPrograms:
    environment, agent, optimizer, learner_state, trajectory = costs.make_rl_setup(config)
    # Fused: the environment is part of the compiled program.
    if config.train.topology == 'fused':
        assert environment is not None  # validation refuses other environments
        mesh = run_mesh.make_run_mesh(config, devices)
        state_shapes = fused.get_state_shapes(config, environment, agent, optimizer, mesh)
        num_updates = min(config.train.log_every, rl_config.count_updates(config))
        update_once = fused.make_update(config, environment, agent, optimizer)
        return RunPrograms(
            {
                'parameters': state_shapes.learner.params,
                'optimizer': state_shapes.learner.opt_state,
                'other': (state_shapes.learner.statistics, state_shapes.actor),
            },
            mesh,
            num_updates,
            functools.partial(fused.compile_updates, update_once, state_shapes, num_updates, mesh),
            functools.partial(
                evaluate_rl.compile_episodes,
                evaluate_rl.Simulation(environment, agent, mesh),
                state_shapes.learner.params,
                config.eval.episodes,
            ),
        )

    # Actors: the compiled program is the update; the environments run on hosts.
    mesh = run_mesh.make_run_mesh(config, devices)
    update = actors_loop.jit_update(agent, optimizer, rl.get_hyperparameters(config), mesh)
    return RunPrograms(
        {
            'parameters': learner_state.params,
            'optimizer': learner_state.opt_state,
            'other': learner_state.statistics,
        },
        mesh,
        1,
        lambda: actors_loop.lower_update(update, learner_state, trajectory, mesh).compile(),
    )


def _fit(config: ml_collections.ConfigDict, devices: Devices) -> RunPrograms:
    problem = fit.make_problem(config)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    mesh = placement.seed_mesh(len(config.seeds), devices)
    state_shapes, seeds = train_fit.shapes(problem, optimizer, len(config.seeds), mesh)
    num_steps = min(config.train.log_every, config.train.steps)
    program_args = problem, optimizer, num_steps, mesh, state_shapes, seeds
    saved_shapes = placement.gathered_shapes(state_shapes, len(config.seeds))
    evaluate = placement.shard_map_seeds(functools.partial(train_fit.evaluate, problem), mesh)
    return RunPrograms(
        {
            'parameters': saved_shapes.params,
            'optimizer': saved_shapes.opt_state,
            'other': saved_shapes.step,
        },
        mesh,
        num_steps,
        functools.partial(train_fit.compile_steps, *program_args),
        lambda: jax.jit(evaluate).lower(state_shapes.params, seeds).compile(),
    )


PROGRAMS: dict[str, Callable[[ml_collections.ConfigDict, Devices], RunPrograms]] = {
    'lm': _lm,
    'rl': _rl,
    'fit': _fit,
}
