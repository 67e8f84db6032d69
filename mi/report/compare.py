"""Comparison of two sweeps: what improved or got worse from one commit or config to another.

Arms are matched by label, their values by the seeds that both have. Two single runs are matched
whatever their names are. Both sweeps must have the same metric, split and direction.
"""

import dataclasses
import os
import pathlib
from typing import NamedTuple

from mi.config import UserError, flatten
from mi.report import analysis, files, runs, statistics, tables, terminal
from mi.report.analysis import Finals, Row
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate, SignFlipTest
from mi.report.tables import Cell, Column, Table, Terminal


@dataclasses.dataclass(frozen=True)
class Pair:
    """An arm of both sweeps, or of one of them.

    Attributes:
      label: label of the arm.
      baseline, candidate: rows of the arm in the two sweeps; None where a sweep has no such arm.
      difference: candidate − baseline, paired by seed.
      test: test of the difference, corrected for the number of arms that are not equal.
      verdict: better, worse, no difference seen; equal where every seed has the same bits; lost
        where only the baseline has values; None where there is nothing to compare.
    """

    label: str
    baseline: Row | None
    candidate: Row | None
    difference: Estimate | None = None
    test: SignFlipTest | None = None
    verdict: str | None = None


class Sweeps(NamedTuple):
    """The two compared sweeps."""

    baseline: Sweep
    candidate: Sweep


def compare_sweeps(
    baseline: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
) -> list[Pair]:
    """Compare two sweeps, print the differences and write compare.md.

    Args:
      baseline, candidate: sweep or run directories.
      out: the directory of compare.md; CANDIDATE/report by default.

    Raises:
      UserError: if they cannot be read, measure different things, or out is not writable.
    """
    # Read both sweeps and match their arms.
    sweeps = Sweeps(
        runs.read_sweep(pathlib.Path(baseline), 'baseline'),
        runs.read_sweep(pathlib.Path(candidate), 'candidate'),
    )
    for key in ('metric', 'split', 'lower_is_better'):
        expected, value = (getattr(sweep, key) for sweep in sweeps)
        if value != expected:
            raise UserError(
                f'--candidate={candidate}: {key} = {value!r}: expected {expected!r}, as in the '
                'baseline; compare sweeps that measure the same'
            )
    pairs = pair_arms(*sweeps)
    table = _make_table(sweeps.candidate, pairs)
    notes = _make_notes(sweeps, pairs)
    title = f'{sweeps.baseline.path} → {sweeps.candidate.path}'

    # Write compare.md.
    header, *body = [[str(cell) for cell in cells] for cells in (table.header, *table.body)]
    items = '\n'.join(f'- {tables.escape_markdown(note)}' for note in notes)
    text = f'{tables.format_markdown(header, body)}\n\n{items}'
    folder = sweeps.candidate.path / 'report' if out is None else pathlib.Path(out)
    file = folder / 'compare.md'
    with files.output_folder(folder):
        file.write_text(f'### {tables.escape_markdown(title)}\n\n{text}\n', encoding='utf-8')

    # Print the table and the notes.
    console = terminal.make_console()
    terminal.print_table(console, table, title, file.name)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    print(file)
    return pairs


def pair_arms(baseline: Sweep, candidate: Sweep) -> list[Pair]:
    """Return a pair for every arm of either sweep, in the order of the baseline."""
    old_rows, new_rows = (
        {row.arm.label: row for row in analysis.make_rows(sweep)} for sweep in (baseline, candidate)
    )
    if len(old_rows) == len(new_rows) == 1:
        old_rows = dict(zip(new_rows, old_rows.values(), strict=True))
    pairs = [
        _make_pair(candidate, label, old_rows.get(label), new_rows.get(label))
        for label in {**old_rows, **new_rows}
    ]
    tests = statistics.correct_holm([pair.test for pair in pairs])
    return [dataclasses.replace(pair, test=test) for pair, test in zip(pairs, tests, strict=True)]


def _make_pair(sweep: Sweep, label: str, baseline: Row | None, candidate: Row | None) -> Pair:
    has_baseline = baseline is not None and baseline.metric is not None
    has_candidate = candidate is not None and candidate.metric is not None
    if not (baseline and candidate and has_baseline and has_candidate):
        return Pair(label, baseline, candidate, verdict='lost' if has_baseline else None)
    difference, test = analysis.compare_finals(
        sweep, Finals(candidate.arm, candidate.final), Finals(baseline.arm, baseline.final)
    )
    verdict = statistics.judge(difference, sweep.lower_is_better)
    common = baseline.final.keys() & candidate.final.keys()
    if common and all(baseline.final[seed] == candidate.final[seed] for seed in common):
        verdict, test = 'equal', None
    return Pair(label, baseline, candidate, difference, test, verdict)


def is_worse(pair: Pair) -> bool:
    """Return whether the candidate is worse beyond the interval, or has lost its values."""
    return pair.verdict in ('worse', 'lost')


def explain_missing_verdict(pair: Pair) -> str:
    """Return why both sides have values but there is no verdict; '' in every other case."""
    if pair.verdict or not (pair.baseline and pair.candidate and pair.baseline.metric):
        return ''
    tasks, expected = pair.candidate.arm.tasks, pair.baseline.arm.tasks
    if set(tasks) != set(expected):
        return f'learned {analysis.describe_task_mismatch(tasks, expected)}'
    return 'no seed in common' if pair.difference is None else 'one seed in common'


def _make_table(sweep: Sweep, pairs: list[Pair]) -> Table:
    columns = _make_columns(sweep, pairs)
    return Table(columns, tables.make_body(columns, pairs), set())


def _make_columns(sweep: Sweep, pairs: list[Pair]) -> list[Column[Pair]]:
    metric = f'{tables.humanize(sweep.metric)} {"↓" if sweep.lower_is_better else "↑"}'
    num_tests = sum(pair.test is not None for pair in pairs)
    decimals = tables.count_decimals(
        [pair.baseline.metric for pair in pairs if pair.baseline is not None],
        [pair.candidate.metric for pair in pairs if pair.candidate is not None],
        [pair.difference for pair in pairs],
    )

    def format_metric(row: Row | None) -> Cell:
        return tables.format_interval(row.metric if row else None, decimals)

    # The priorities differ from the order: on a narrow terminal the verdict precedes the costs.
    return [
        Column(
            'arm', 'arm', '', lambda pair: Cell(pair.label),
            terminal=Terminal(priority=0, wraps=True),
        ),
        Column(
            'baseline', metric, 'baseline', lambda pair: format_metric(pair.baseline),
            terminal=Terminal(priority=1),
        ),
        Column(
            'candidate', metric, 'candidate', lambda pair: format_metric(pair.candidate),
            terminal=Terminal(priority=2),
        ),
        Column(
            'difference', 'difference', tables.INTERVAL,
            lambda pair: tables.format_interval(pair.difference, decimals, '+'),
            terminal=Terminal(priority=3),
        ),
        Column(
            'p', 'p', 'Holm' if num_tests > 1 else '', lambda pair: tables.format_test(pair.test),
            terminal=Terminal(priority=5),
        ),
        Column(
            'parameters', 'parameters', '×', lambda pair: _cost_cell(pair, 'parameters'),
            terminal=Terminal(priority=6),
        ),
        Column(
            'flops', f'FLOPs per {sweep.unit}', '×',
            lambda pair: _cost_cell(pair, f'flops_per_{sweep.unit}'),
            terminal=Terminal(priority=8),
        ),
        Column(
            'seconds', 'train seconds', '×', lambda pair: _cost_cell(pair, 'seconds'),
            terminal=Terminal(priority=7),
        ),
        Column(
            'verdict', 'verdict', '', _verdict_cell, terminal=Terminal(priority=4, wraps=True)
        ),
    ]  # fmt: skip


def _cost_cell(pair: Pair, quantity: str) -> Cell:
    """Return the ratio of the costs, candidate over baseline."""
    baseline, candidate = (_get_cost(row, quantity) for row in (pair.baseline, pair.candidate))
    if not baseline or candidate is None:
        return Cell(tables.NONE)
    return Cell(f'{candidate / baseline:.3g}')


def _get_cost(row: Row | None, quantity: str) -> float | None:
    if row is None:
        return None
    return row.seconds if quantity == 'seconds' else row.arm.get_cost(quantity, 'model')


def _verdict_cell(pair: Pair) -> Cell:
    if pair.difference:
        detail = f'(n = {pair.difference.n})'
    else:
        detail = explain_missing_verdict(pair) or _explain_missing_values(pair)
    return Cell(pair.verdict or tables.NONE, detail)


def _explain_missing_values(pair: Pair) -> str:
    for side, row in (('baseline', pair.baseline), ('candidate', pair.candidate)):
        if row is None:
            return f'not in the {side}'
        if row.metric is None:
            return f'{"not finite" if row.final else row.arm.state} in the {side}'
    return ''


def _make_notes(sweeps: Sweeps, pairs: list[Pair]) -> list[str]:
    # List the arms by verdict.
    verdicts: dict[str, list[str]] = {}
    for pair in pairs:
        verdicts.setdefault(pair.verdict or 'without a verdict', []).append(pair.label)
    listed = '; '.join(f'{verdict}: {", ".join(labels)}' for verdict, labels in verdicts.items())
    notes = [
        f'{listed}.',
        'Differences are candidate − baseline, paired by the seeds that both have; better and '
        'worse mean that their interval excludes zero, equal that every seed has the same bits. × '
        f'is candidate over baseline. {statistics.CAUTION}',
    ]
    if warning := statistics.warn_too_few_seeds([pair.test for pair in pairs]):
        notes.append(warning)

    # List what changed in the configs, and the arms where it did.
    changes: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.baseline and pair.candidate:
            for change in _list_changes(pair.baseline.arm, pair.candidate.arm):
                changes.setdefault(change, []).append(pair.label)
    num_common = sum(bool(pair.baseline and pair.candidate) for pair in pairs)
    for change, labels in changes.items():
        scope = 'all arms' if len(labels) == num_common > 1 else ', '.join(labels)
        notes.append(f'The configs differ: {change} ({scope}).')

    # List the machines if they differ.
    old_machines, new_machines = map(_list_machines, sweeps)
    if old_machines != new_machines:
        notes.append(f'Other machines: {"; ".join(old_machines)} → {"; ".join(new_machines)}.')
    return notes


def _list_changes(baseline: Arm, candidate: Arm) -> list[str]:
    old_config, new_config = flatten(baseline.config), flatten(candidate.config)
    if not old_config or not new_config:
        return []
    return [
        f'{key} = {old_config.get(key)!r} → {new_config.get(key)!r}'
        for key in sorted(old_config.keys() | new_config.keys())
        if old_config.get(key) != new_config.get(key)
    ]


def _list_machines(sweep: Sweep) -> list[str]:
    return sorted({str(arm.status['machine']) for arm in sweep.arms if 'machine' in arm.status})
