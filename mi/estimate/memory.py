"""What a run of a config takes in memory: the state of all seeds, and what compiles its programs.

Nothing is allocated and nothing is run: states are shapes, and programs are compiled for the
devices that are here, or for ones that `mi.estimate.topologies` describes. What the compiler says
of a training step is the estimate; data, other programs and the device's own needs come on top.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from mi.training import optim, placement, sharding

Devices = Sequence[jax.Device] | None  # those that are here if None


class RunPrograms(NamedTuple):
    """The state of all seeds as shapes, by what it holds, and what compiles the programs of a run.

    Attributes:
      state: 'parameters', 'optimiser' and 'other' → trees; a checkpoint holds all of them.
      mesh: of the devices that the programs are for.
      updates: that one call of `compile()` does.
      compile: () → the program that the trainer calls for a step, or for those of one record.
      compile_evaluation: () → the program that it calls to evaluate, None if it has no such.
    """

    state: dict[str, Any]
    mesh: jax.sharding.Mesh
    updates: int
    compile: Callable[[], jax.stages.Compiled]
    compile_evaluation: Callable[[], jax.stages.Compiled] | None = None


def estimate_memory(config: ml_collections.ConfigDict, compiles: bool = True) -> dict[str, Any]:
    """Bytes that a run of a config takes.

    - 'parameters', 'optimiser', 'other': of the state of all seeds;
    - 'checkpoint': their sum, before it is compressed;
    - 'step': {'arguments', 'outputs', 'in_place', 'temporaries', 'peak'} of the compiled step, on
      each device; arguments that outputs overwrite are in place. peak = arguments + outputs −
      in_place + temporaries. Only if `compiles`.

    Raises:
      UserError: on a config that cannot work, or a search, whose models are not known before.
    """
    training = make_programs(config)
    told: dict[str, Any] = {name: count_bytes(tree) for name, tree in training.state.items()}
    told['checkpoint'] = sum(told.values())
    if compiles and (step := measure(training.compile())) is not None:
        told['step'] = step
    return told


def make_programs(config: ml_collections.ConfigDict, devices: Devices = None) -> RunPrograms:
    """Return the state and the programs of a config's run.

    Args:
      config: of any task but 'search'.
      devices: that share the work, present or described.

    Raises:
      UserError: on a config that cannot work, or a search, whose models are not known before.
    """
    if config.task not in PROGRAMS:
        raise UserError(
            f'config.task = {config.task!r}: its models are found by the run; ask for one of '
            f'{", ".join(PROGRAMS)}'
        )
    training = PROGRAMS[config.task](config, devices)
    # Compiled with the precision of products that the run has.
    precise = precision.use_config(config)
    evaluation = training.compile_evaluation
    return training._replace(
        compile=precise(training.compile),
        compile_evaluation=None if evaluation is None else precise(evaluation),
    )


def measure(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Return the bytes of a program per device, as in `estimate_memory`; None if unknown."""
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


def count_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _lm(config: ml_collections.ConfigDict, devices: Devices) -> RunPrograms:
    config, trainer, _, domains = costs.lm_setup(config)
    B, seeds = config.train.batch, np.asarray(config.seeds, np.int32)
    mesh = sharding.make_mesh(len(seeds), B, config.train.fsdp, config.train.mesh, devices)
    state = trainer.shapes(seeds, mesh)
    batch = trainer.batch_shapes(seeds, config.train.length, mesh)
    return RunPrograms(
        {'parameters': state.params, 'optimiser': state.opt_state, 'other': state.carry},
        mesh,
        1,
        functools.partial(trainer.compile, state, batch, mesh),
        functools.partial(
            evaluate_lm.compile_segment,
            trainer.model,
            state.params,
            lm.get_reading(config),
            domains > 0,
            mesh,
        ),
    )


def _rl(config: ml_collections.ConfigDict, devices: Devices) -> RunPrograms:
    environment, agent, optimiser, of_learner, trajectory = costs.rl_setup(config)
    if config.train.topology == 'fused':
        assert environment is not None  # or validation had refused it
        mesh = fused.mesh_of(config, devices)
        state = fused.shapes(config, environment, agent, optimiser, mesh)
        count = min(config.train.log_every, rl_config.count_updates(config))
        program = environment, agent, optimiser, config, state, count, mesh
        return RunPrograms(
            {
                'parameters': state.learner.params,
                'optimiser': state.learner.opt_state,
                'other': (state.learner.statistics, state.actor),
            },
            mesh,
            count,
            functools.partial(fused.compile_updates, *program),
            functools.partial(
                evaluate_rl.compile_episodes,
                environment,
                agent,
                state.learner.params,
                config.eval.episodes,
                mesh,
            ),
        )
    mesh = sharding.make_mesh(1, config.train.batch, shape=config.train.mesh, devices=devices)
    update = actors_loop.learner_update(agent, optimiser, rl.get_hyperparameters(config), mesh)
    return RunPrograms(
        {
            'parameters': of_learner.params,
            'optimiser': of_learner.opt_state,
            'other': of_learner.statistics,
        },
        mesh,
        1,
        lambda: actors_loop.lower_update(update, of_learner, trajectory, mesh).compile(),
    )


def _fit(config: ml_collections.ConfigDict, devices: Devices) -> RunPrograms:
    problem = fit.make_problem(config)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    mesh = placement.seed_mesh(len(config.seeds), devices)
    state, seeds = train_fit.shapes(problem, optimizer, len(config.seeds), mesh)
    count = min(config.train.log_every, config.train.steps)
    program = problem, optimizer, count, state, seeds, mesh
    saved = placement.gathered_shapes(state, len(config.seeds))
    evaluate = placement.shard_map_seeds(functools.partial(train_fit.evaluate, problem), mesh)
    return RunPrograms(
        {'parameters': saved.params, 'optimiser': saved.opt_state, 'other': saved.step},
        mesh,
        count,
        functools.partial(train_fit.compile_steps, *program),
        lambda: jax.jit(evaluate).lower(state.params, seeds).compile(),
    )


PROGRAMS: dict[str, Callable[[ml_collections.ConfigDict, Devices], RunPrograms]] = {
    'lm': _lm,
    'rl': _rl,
    'fit': _fit,
}
