"""What a sweep would run, and what that costs, before anything is run."""

import pathlib
import shlex
from collections.abc import Sequence

import ml_collections
import rich.console
import rich.markup
import rich.table

from launch import metric_names, state, sweep
from mi.config import flatten
from mi.estimate import costs
from mi.fit import factory as fit
from mi.lm import config as lm
from mi.rl import config as rl
from mi.training import progress


def show(
    members: Sequence[sweep.Member], workdir: pathlib.Path, pace: float | None = None
) -> list[float]:
    """Print what would run, and what it costs; return the FLOPs of a step of each member.

    Args:
      members: of the sweep.
      workdir: where it has run, or would.
      pace: FLOP/s of one member; None for those of the members that have run.
    """
    told = count_costs([sweep.parsed(m.command) for m in members])
    totals = [c['steps'] * c['seeds'] * c['flops'] if 'flops' in c else None for c in told]
    pace = pace or measured(members, told, workdir)
    table = rich.table.Table(box=None, title=f'{len(members)} members')
    for heading in ('member', 'state', 'parameters', 'FLOPs/step', 'steps', 'seeds', 'FLOPs', 'h'):
        table.add_column(heading, justify='left' if heading in ('member', 'state') else 'right')
    for member, cost, total in zip(members, told, totals, strict=True):
        table.add_row(
            rich.markup.escape(member.name),
            state.read(workdir / member.name).word,
            f'{cost["parameters"]["model"]:,}' if 'parameters' in cost else '',
            f'{cost["flops"]:.3g}' if 'flops' in cost else '',
            f'{cost["steps"]:,}',
            f'{cost["seeds"]}',
            '' if total is None else f'{total:.3g}',
            '' if total is None or not pace else f'{total / pace / 3600:.2g}',
        )
    known = [total for total in totals if total is not None]
    hours = f', {sum(known) / pace / 3600:.2g} h at {pace:.3g} FLOP/s' if pace else ''
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    for member in members:
        print(f'{member.name}: {shlex.join(member.command)}')
    print(f'all of it: {sum(known):.3g} FLOPs in products, training alone{hours}')
    return [c.get('flops', 0.0) * c['seeds'] for c in told]


def count_costs(configs: Sequence[ml_collections.ConfigDict]) -> list[costs.Costs]:
    """What a run of each config costs; those that differ in rates and seeds alone are traced once.

    Raises:
      UserError: on a config that cannot work.
    """
    traced: dict[str, costs.Costs] = {}
    found = []
    for config in progress.track(configs, 'counting FLOPs', len(configs), 'members'):
        validate(config)
        key = _shapes(config)
        if key not in traced:
            traced[key] = costs.estimate_costs(config)
        own = {'steps': metric_names.steps(config), 'seeds': len(config.seeds)}
        found.append(traced[key] | own)
    return found


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot work, without tracing anything."""
    if config.task in VALIDATE:
        VALIDATE[config.task](config)


VALIDATE = {'lm': lm.validate, 'rl': rl.validate, 'fit': fit.validate, 'search': fit.validate}
# Sections whose numbers with a decimal point have no part in shapes, but in whether they are 0.
RATES = ('optim', 'loss', 'dropout', 'dynamic', 'sample')
WHEN = ('steps', 'log_every', 'eval_every', 'save_every', 'keep')  # of the section train


def _shapes(config: ml_collections.ConfigDict) -> str:
    """What the FLOPs of a step depend on, in words."""
    values = {}
    for key, value in flatten(config.to_dict()).items():
        section, _, name = key.partition('.')
        if key in ('seeds', 'tracker') or (section == 'train' and name in WHEN):
            continue
        is_rate = section in RATES and isinstance(value, float)
        values[key] = bool(value) if is_rate or key == 'optim.warmup_steps' else value
    return repr(sorted(values.items()))


def measured(
    members: Sequence[sweep.Member], told: Sequence[costs.Costs], workdir: pathlib.Path
) -> float:
    """FLOP/s of those members that have run, by their own clocks; 0 if there are none."""
    flops = seconds = 0.0
    for member, cost in zip(members, told, strict=True):
        timing = state.records(workdir / member.name / 'timing.jsonl', state.TIMING)
        if len(timing) < 2 or 'flops' not in cost:
            continue
        steps = timing[-1]['step'] - timing[0]['step']  # the first may have compiled
        flops += steps * cost['seeds'] * cost['flops']
        seconds += sum(record['seconds'] for record in timing[1:])
    return flops / seconds if seconds else 0.0
