"""The plan of a sweep, which shows what would run and what it would cost."""

import pathlib
import shlex
from collections.abc import Sequence

import ml_collections
import rich.console
import rich.markup
import rich.table

from launch import metric_names, records, state
from launch.members import Member
from mi.config import flatten
from mi.estimate import costs
from mi.fit import factory as fit
from mi.lm import config as lm
from mi.rl import config as rl
from mi.training import progress

VALIDATE = {'lm': lm.validate, 'rl': rl.validate, 'fit': fit.validate, 'search': fit.validate}
# Sections whose floats do not change shapes, except by being 0.
RATE_SECTIONS = ('optim', 'loss', 'dropout', 'dynamic', 'sample')
# Keys of the section train that do not change the FLOPs of a step.
SCHEDULE_KEYS = ('steps', 'log_every', 'eval_every', 'save_every', 'keep')


def show(
    members: Sequence[Member], workdir: pathlib.Path, speed: float | None = None
) -> list[float]:
    """Print what would run and what it would cost, and return the FLOPs per step of each member.

    Args:
      members: the members of the sweep.
      workdir: directory of the sweep, which need not exist.
      speed: FLOP/s of one member. If None, it is measured on members that have run.
    """
    # Count the FLOPs of each member in all of its training.
    member_costs = count_costs([member.config for member in members])
    totals = [
        cost['steps'] * cost['seeds'] * cost['flops'] if 'flops' in cost else None
        for cost in member_costs
    ]
    speed = speed or measure_speed(members, member_costs, workdir)

    # Print a table with a row for each member.
    table = rich.table.Table(box=None, title=f'{len(members)} members')
    for heading in ('member', 'state', 'parameters', 'FLOPs/step', 'steps', 'seeds', 'FLOPs', 'h'):
        table.add_column(heading, justify='left' if heading in ('member', 'state') else 'right')
    for member, cost, total in zip(members, member_costs, totals, strict=True):
        table.add_row(
            rich.markup.escape(member.name),
            state.read_member_state(workdir / member.name).phase,
            f'{cost["parameters"]["model"]:,}' if 'parameters' in cost else '',
            f'{cost["flops"]:.3g}' if 'flops' in cost else '',
            f'{cost["steps"]:,}',
            f'{cost["seeds"]}',
            '' if total is None else f'{total:.3g}',
            '' if total is None or not speed else f'{total / speed / 3600:.2g}',
        )
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)

    # Print the commands, and the cost of the whole sweep.
    for member in members:
        print(f'{member.name}: {shlex.join(member.command)}')
    known_total = sum(total for total in totals if total is not None)
    hours = f', {known_total / speed / 3600:.2g} h at {speed:.3g} FLOP/s' if speed else ''
    print(f'all of it: {known_total:.3g} FLOPs in products, training alone{hours}')
    return [cost.get('flops', 0.0) * cost['seeds'] for cost in member_costs]


def count_costs(configs: Sequence[ml_collections.ConfigDict]) -> list[costs.Costs]:
    """Return the cost of a run with each config. Configs with equal shapes are traced once.

    Raises:
      UserError: if a config is invalid.
    """
    traced: dict[str, costs.Costs] = {}
    config_costs = []
    for config in progress.track(configs, 'counting FLOPs', len(configs), 'members'):
        validate(config)
        key = _shape_key(config)
        if key not in traced:
            traced[key] = costs.estimate_costs(config)
        size = {'steps': metric_names.count_steps(config), 'seeds': len(config.seeds)}
        config_costs.append(traced[key] | size)
    return config_costs


def validate(config: ml_collections.ConfigDict) -> None:
    """Check that a config is valid, without tracing anything."""
    if config.task in VALIDATE:
        VALIDATE[config.task](config)


def _shape_key(config: ml_collections.ConfigDict) -> str:
    """Return a string that identifies everything that determines the FLOPs of a step."""
    values = {}
    for key, value in flatten(config.to_dict()).items():
        section, _, name = key.partition('.')
        if key in ('seeds', 'tracker') or (section == 'train' and name in SCHEDULE_KEYS):
            continue
        is_rate = section in RATE_SECTIONS and isinstance(value, float)
        values[key] = bool(value) if is_rate or key == 'optim.warmup_steps' else value
    return repr(sorted(values.items()))


def measure_speed(
    members: Sequence[Member], member_costs: Sequence[costs.Costs], workdir: pathlib.Path
) -> float:
    """Return the FLOP/s of the members that have run, from timing.jsonl, or 0 if there are none."""
    flops = seconds = 0.0
    for member, cost in zip(members, member_costs, strict=True):
        timing = records.read_records(workdir / member.name / 'timing.jsonl', records.TIMING)
        if len(timing) < 2 or 'flops' not in cost:
            continue
        steps = timing[-1]['step'] - timing[0]['step']  # the first record includes compilation
        flops += steps * cost['seeds'] * cost['flops']
        seconds += sum(record['seconds'] for record in timing[1:])
    return flops / seconds if seconds else 0.0
