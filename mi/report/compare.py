"""Two sweeps side by side: what got better or worse from one commit or config to another.

Arms are matched by their labels, their values by the seeds that both have; two single runs are
matched whatever their names are. What is compared, and which way is better, has to be the same.
"""

import dataclasses
import os
import pathlib

from mi.config import UserError, flatten
from mi.report import (
    analysis,
    files,
    runs,
    statistics,
    tables,
    terminal,
)
from mi.report.analysis import Row
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate, Test
from mi.report.tables import Cell, Table


@dataclasses.dataclass(frozen=True)
class Pair:
    """An arm in both sweeps, or in one of them.

    Attributes:
      label: of both.
      before, after: the arm in the baseline's sweep and in the candidate's; None where it is not.
      difference: after − before, paired by seed.
      test: of the difference, corrected for the number of arms that are not equal.
      verdict: better, worse, no difference seen; equal where every seed has the same bits; lost
        where only the baseline has values; None where there is nothing to say.
    """

    label: str
    before: Row | None
    after: Row | None
    difference: Estimate | None = None
    test: Test | None = None
    verdict: str | None = None


def compare(
    baseline: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
) -> list[Pair]:
    """Prints what differs and writes compare.md.

    Args:
      baseline, candidate: sweep or run directories.
      out: where compare.md goes, candidate/report unless given.

    Raises:
      UserError: if they cannot be read, do not measure the same, or out cannot be written to.
    """
    before = runs.read(pathlib.Path(baseline), 'baseline')
    after = runs.read(pathlib.Path(candidate), 'candidate')
    for key in ('metric', 'split', 'lower_is_better'):
        one, other = getattr(before, key), getattr(after, key)
        if one != other:
            raise UserError(
                f'--candidate={candidate}: its {key} is {other!r} and that of the baseline '
                f'{one!r}; compare sweeps that measure the same'
            )
    found = pairs(before, after)
    table = _cells(after, found)
    said = _notes(before, after, found)
    folder = after.path / 'report' if out is None else pathlib.Path(out)
    title = f'{before.path} → {after.path}'
    lines = [[str(cell) for cell in line] for line in (table.header, *table.body)]
    text = '\n'.join(f'- {tables.escaped(note)}' for note in said)
    file = folder / 'compare.md'
    with files.written_to(folder):
        written = f'{tables.markdown(lines[0], lines[1:])}\n\n{text}'
        file.write_text(f'### {tables.escaped(title)}\n\n{written}\n', encoding='utf-8')
    console = terminal.console()
    terminal.show(console, table, title, file.name)
    for note in said:
        console.print(note, markup=False, highlight=False)
    print(file)
    return found


def pairs(before: Sweep, after: Sweep) -> list[Pair]:
    """Every arm of either sweep, in the order of the baseline's."""
    one, other = ({row.arm.label: row for row in analysis.rows(sweep)} for sweep in (before, after))
    if len(one) == len(other) == 1:
        label = next(iter(other))
        one = {label: next(iter(one.values()))}
    found = [_pair(after, label, one.get(label), other.get(label)) for label in {**one, **other}]
    corrected = statistics.holm([pair.test for pair in found])
    return [dataclasses.replace(p, test=t) for p, t in zip(found, corrected, strict=True)]


def _pair(sweep: Sweep, label: str, before: Row | None, after: Row | None) -> Pair:
    has_before, has_after = (row is not None and row.metric is not None for row in (before, after))
    if not (before and after and has_before and has_after):
        return Pair(label, before, after, verdict='lost' if has_before else None)
    gap, test = analysis.against(sweep, after.arm, after.final, before.final, before.arm)
    verdict = statistics.verdict(gap, sweep.lower_is_better)
    common = before.final.keys() & after.final.keys()
    if common and all(before.final[seed] == after.final[seed] for seed in common):
        verdict, test = 'equal', None
    return Pair(label, before, after, gap, test, verdict)


def is_worse(pair: Pair) -> bool:
    """Whether the candidate is worse beyond the interval, or has no values any more."""
    return pair.verdict in ('worse', 'lost')


def why_not(pair: Pair) -> str:
    """Why both sides have values and there is no verdict; '' where there is one, or no values."""
    if pair.verdict or not (pair.before and pair.after and pair.before.metric):
        return ''
    ours, theirs = pair.after.arm.tasks, pair.before.arm.tasks
    if set(ours) != set(theirs):
        return f'learnt {analysis.others(ours, theirs)}'
    return 'no seed in common' if pair.difference is None else 'one seed in common'


def _cells(sweep: Sweep, found: list[Pair]) -> Table:
    arrow = '↓' if sweep.lower_is_better else '↑'
    metric = f'{tables.words(sweep.metric)} {arrow}'
    header = [Cell('arm'), Cell(metric, 'baseline'), Cell(metric, 'candidate')]
    holm = sum(pair.test is not None for pair in found) > 1
    header += [Cell('difference', '[95 %]'), Cell('p', 'Holm' if holm else '')]
    header += [Cell('parameters', '×'), Cell(f'FLOPs per {sweep.unit}', '×')]
    header += [Cell('train seconds', '×'), Cell('verdict')]
    columns = ['arm', 'baseline', 'candidate', 'difference', 'p', 'parameters', 'flops', 'seconds']
    estimates = [
        [row.metric for pair in found if (row := getattr(pair, side)) is not None]
        for side in ('before', 'after')
    ]
    places = tables.digits(*estimates, [pair.difference for pair in found])
    body = []
    for pair in found:
        line = [Cell(pair.label)]
        line += [
            tables.interval(row.metric if row else None, places)
            for row in (pair.before, pair.after)
        ]
        line += [tables.interval(pair.difference, places, '+'), tables.tested(pair.test)]
        for what in ('parameters', f'flops_per_{sweep.unit}', 'seconds'):
            line.append(_ratio(*(_cost(row, what) for row in (pair.before, pair.after))))
        n = f'(n = {pair.difference.n})' if pair.difference else why_not(pair) or _why(pair)
        line.append(Cell(pair.verdict or tables.NONE, n))
        body.append(line)
    return Table([*columns, 'verdict'], header, body, set())


def _cost(row: Row | None, what: str) -> float | None:
    if row is None:
        return None
    return row.seconds if what == 'seconds' else row.arm.counted(what, 'model')


def _ratio(before: float | None, after: float | None) -> Cell:
    return Cell(f'{after / before:.3g}') if before and after is not None else Cell(tables.NONE)


def _why(pair: Pair) -> str:
    for side, row in (('baseline', pair.before), ('candidate', pair.after)):
        if row is None:
            return f'not in the {side}'
        if row.metric is None:
            return f'{"not finite" if row.final else row.arm.state} in the {side}'
    return ''


def _notes(before: Sweep, after: Sweep, found: list[Pair]) -> list[str]:
    by_verdict: dict[str, list[str]] = {}
    for pair in found:
        by_verdict.setdefault(pair.verdict or 'without a verdict', []).append(pair.label)
    said = ['; '.join(f'{verdict}: {", ".join(labels)}' for verdict, labels in by_verdict.items())]
    said[0] += '.'
    said.append(
        'Differences are candidate − baseline, paired by the seeds that both have; better and '
        'worse say that their interval excludes zero, equal that every seed has the same bits. × '
        f'is candidate over baseline. {statistics.CAUTION}'
    )
    if warning := statistics.too_few([pair.test for pair in found]):
        said.append(warning)
    changes: dict[str, list[str]] = {}
    for pair in found:
        if pair.before and pair.after:
            for change in _changes(pair.before.arm, pair.after.arm):
                changes.setdefault(change, []).append(pair.label)
    both = sum(bool(pair.before and pair.after) for pair in found)
    for change, labels in changes.items():
        where = 'all arms' if len(labels) == both > 1 else ', '.join(labels)
        said.append(f'The configs differ: {change} ({where}).')
    machines = [
        sorted({str(arm.status['machine']) for arm in sweep.arms if 'machine' in arm.status})
        for sweep in (before, after)
    ]
    if machines[0] != machines[1]:
        said.append(f'Other machines: {"; ".join(machines[0])} → {"; ".join(machines[1])}.')
    return said


def _changes(before: Arm, after: Arm) -> list[str]:
    one, other = flatten(before.config), flatten(after.config)
    return [
        f'{key} = {one.get(key)!r} → {other.get(key)!r}'
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and one and other
    ]
