"""What a sweep would run, and what that costs, before anything is run."""

import pathlib
import shlex
from collections.abc import Sequence

import rich.console
import rich.markup
import rich.table

from launch import state, sweep
from mi import costs


def show(members: Sequence[sweep.Member], workdir: pathlib.Path, pace: float | None = None) -> None:
    """Prints what would run, and what it costs.

    Args:
      members: of the sweep.
      workdir: where it has run, or would.
      pace: FLOP/s of one member; None for those of the members that have run.
    """
    told = [costs.of_config(sweep.parsed(m.command)) for m in members]
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
