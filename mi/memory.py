"""What a run of a config takes in memory, and the command that prints all that it costs.

    python -m mi.cost --config=configs/lm.py:quickstart --config.model.hidden=1024
    python -m mi.cost --config=configs/rl.py --nocompile

Nothing is allocated and nothing is run: states are shapes, and the program of a training step is
compiled for the devices that are here. What the compiler says of it is the estimate; data,
evaluation, other programs and the device's own needs come on top.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from mi import costs, optim, overrides, parallel, placement, progress
from mi.config import UserError
from mi.fit import setup as fit
from mi.fit import train as train_fit
from mi.lm import train as train_lm
from mi.rl import fused, queued
from mi.rl import setup as rl

PREFIXES = {12: 'T', 9: 'G', 6: 'M', 3: 'k'}


class Training(NamedTuple):
    """The state of all seeds as shapes, by what it holds, and what compiles a step of it.

    Attributes:
      state: 'parameters', 'optimiser' and 'other' → trees; a checkpoint holds all of them.
      compile: () → the program that the trainer calls for a step, or for those of one record.
    """

    state: dict[str, Any]
    compile: Callable[[], jax.stages.Compiled]


def of_config(config: ml_collections.ConfigDict, compiles: bool = True) -> dict[str, Any]:
    """Bytes that a run of a config takes.

    - 'parameters', 'optimiser', 'other': of the state of all seeds;
    - 'checkpoint': their sum, before it is compressed;
    - 'step': {'arguments', 'outputs', 'in_place', 'temporaries', 'peak'} of the compiled step, on
      each device; arguments that outputs overwrite are in place. peak = arguments + outputs −
      in_place + temporaries. Only if `compiles`.

    Raises:
      UserError: on a config that cannot work, or a search, whose models are not known before.
    """
    if config.task not in TRAININGS:
        raise UserError(
            f'config.task = {config.task!r}: its models are found by the run; ask for one of '
            f'{", ".join(TRAININGS)}'
        )
    training = TRAININGS[config.task](config)
    told: dict[str, Any] = {name: size(tree) for name, tree in training.state.items()}
    told['checkpoint'] = sum(told.values())
    if compiles and (found := training.compile().memory_analysis()) is not None:
        step = {
            'arguments': found.argument_size_in_bytes,
            'outputs': found.output_size_in_bytes,
            'in_place': found.alias_size_in_bytes,
            'temporaries': found.temp_size_in_bytes,
        }
        peak = sum(step.values()) - 2 * step['in_place']
        told['step'] = step | {'peak': peak}
    return told


def size(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _lm(config: ml_collections.ConfigDict) -> Training:
    config, model, optimiser, _, domains = costs.text(config)
    B, T, seeds = config.train.batch, config.train.length, np.asarray(config.seeds, np.int32)
    mesh = parallel.mesh(len(seeds), B, config.train.fsdp, config.train.mesh)
    state = train_lm.shapes(model, optimiser, seeds, B, mesh)
    rows = jax.ShapeDtypeStruct(
        (len(seeds), T + 1, B), jnp.int32, sharding=parallel.by_rows(mesh, 2, has_seeds=True)
    )
    told = rows if domains else None
    step = model, optimiser, config.train.accumulate, state, seeds, rows, told, mesh
    return Training(
        {'parameters': state.params, 'optimiser': state.opt_state, 'other': state.carry},
        functools.partial(train_lm.compile_step, *step),  # type: ignore[arg-type]
    )


def _rl(config: ml_collections.ConfigDict) -> Training:
    environment, agent, optimiser, of_learner, trajectory = costs.acting(config)
    if config.train.topology == 'fused':
        assert environment is not None  # or validation had refused it
        mesh = fused.mesh_of(config)
        state = fused.shapes(config, environment, agent, optimiser, mesh)
        count = min(config.train.log_every, rl.updates(config))
        program = environment, agent, optimiser, config, state, count, mesh
        return Training(
            {
                'parameters': state.learner.params,
                'optimiser': state.learner.opt_state,
                'other': (state.learner.statistics, state.actor),
            },
            functools.partial(fused.compile_updates, *program),
        )
    mesh = parallel.mesh(1, config.train.batch, shape=config.train.mesh)
    update = queued.learner_update(agent, optimiser, rl.hyperparameters(config), mesh)
    return Training(
        {
            'parameters': of_learner.params,
            'optimiser': of_learner.opt_state,
            'other': of_learner.statistics,
        },
        lambda: queued.lower_update(update, of_learner, trajectory, mesh).compile(),
    )


def _fit(config: ml_collections.ConfigDict) -> Training:
    problem = fit.problem(config)
    optimizer = optim.optimiser(config.optim, config.train.steps)
    mesh = placement.seed_mesh(len(config.seeds))
    state, seeds = train_fit.shapes(problem, optimizer, len(config.seeds), mesh)
    count = min(config.train.log_every, config.train.steps)
    program = problem, optimizer, count, state, seeds, mesh
    saved = placement.gathered_shapes(state, len(config.seeds))
    return Training(
        {'parameters': saved.params, 'optimiser': saved.optimiser, 'other': saved.step},
        functools.partial(train_fit.compile_steps, *program),
    )


TRAININGS: dict[str, Callable[[ml_collections.ConfigDict], Training]] = {
    'lm': _lm,
    'rl': _rl,
    'fit': _fit,
}


def lines(told: dict[str, Any]) -> list[str]:
    """The costs of a run, one a line, for people."""
    unit = next(name for name in ('token', 'step', 'example') if f'flops_per_{name}' in told)
    what = {'token': 'tokens', 'step': 'steps of environments', 'example': 'examples'}[unit]
    parameters, forward = told['parameters'], told[f'flops_per_{unit}']
    seeds = told['seeds']
    whole = told['flops'] * told['steps'] * seeds
    rows = [
        ('parameters', f'{parameters["model"]:,}', f'of them the fusion {parameters["fusion"]:,}'),
        ('training steps', f'{told["steps"]:,}', f'of {told["units"]:,} {what} each'),
        ('seeds', f'{seeds}', 'trained at once'),
        (
            f'FLOPs per {unit}',
            scaled(forward['model']),
            f'forward; of them the fusion {scaled(forward["fusion"])}',
        ),
        ('FLOPs per training step', scaled(told['flops']), 'of one seed, forward and backward'),
        ('FLOPs of the run', scaled(whole), 'all steps and seeds, without evaluations'),
    ]
    memory = told['memory']
    for name in ('parameters', 'optimiser', 'other'):
        rows.append((f'{name}, bytes', scaled(memory[name]) + 'B', 'all seeds'))
    rows.append(('checkpoint, bytes', scaled(memory['checkpoint']) + 'B', 'before compression'))
    if step := memory.get('step'):
        said = f'arguments {scaled(step["arguments"])}B, temporaries {scaled(step["temporaries"])}B'
        rows.append(('memory of a step', scaled(step['peak']) + 'B', f'on each device; {said}'))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f'{a:<{widths[0]}}  {b:>{widths[1]}}  {c}'.rstrip() for a, b, c in rows]


def scaled(value: float) -> str:
    """Three digits and a prefix of powers of ten: 2400000 → '2.4 M'."""
    power = next((p for p in PREFIXES if abs(value) >= 10**p), 0)
    return f'{value / 10**power:.3g} {PREFIXES.get(power, "")}'


def main(argv: Sequence[str]) -> None:
    """Prints the costs of --config; --json for machines, --nocompile without the step's memory."""
    values = flags.FlagValues()
    file = flags.DEFINE_string('config', None, 'Config file.', flag_values=values)
    compiles = flags.DEFINE_bool('compile', True, 'Memory of a step too.', flag_values=values)
    as_json = flags.DEFINE_bool('json', False, 'Every number as JSON.', flag_values=values)
    try:
        arguments, changes = overrides.split(argv)
        rest = values(arguments)
        if not file.value or len(rest) > 1:
            raise UserError('--config=FILE is needed; with it go --config.KEY=VALUE, --json and '
                            '--nocompile')  # fmt: skip
        config = overrides.load(file.value, changes)
        first = 'compiling' if compiles.value else 'sizing'
        with progress.Work(f'{first} the training step'):
            memory = of_config(config, compiles.value)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from error
    with progress.Work('counting the FLOPs of a training step'):
        told = costs.of_config(config) | {'memory': memory}
    print(json.dumps(told, indent=2) if as_json.value else '\n'.join(lines(told)))


if __name__ == '__main__':
    try:
        main(sys.argv)
    except UserError as error:
        sys.exit(f'error: {error}')
