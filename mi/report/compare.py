"""Comparison of two sweeps, which shows the effect of a new commit or config.

Arms are matched by label, and their values by the seeds that both sweeps have. Two single runs are
matched regardless of their names. Both sweeps must have the same metric, split and direction.
"""

import dataclasses
import os
import pathlib
from typing import NamedTuple

from mi.config import UserError, flatten
from mi.report import analysis, files, provenance, runs, statistics, tables, terminal
from mi.report.analysis import ArmResult, Finals
from mi.report.arms import Arm, Sweep
from mi.report.statistics import Estimate, SignFlipTest
from mi.report.tables import Cell, Column, Table, Terminal


@dataclasses.dataclass(frozen=True)
class ArmComparison:
    """Comparison of an arm in two sweeps, or an arm that only one of them has.

    Attributes:
      label: label of the arm.
      baseline, candidate: results of the arm in the two sweeps, or None if a sweep lacks the arm.
      difference: candidate − baseline, paired by seed.
      test: test of the difference, corrected for the number of arms that are not equal.
      verdict: 'better', 'worse' or 'no difference seen', 'equal' if every seed has the same bits
        in the metric and in each task, 'lost' if only the baseline has values, or None if there is
        nothing to compare.
    """

    label: str
    baseline: ArmResult | None
    candidate: ArmResult | None
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
) -> list[ArmComparison]:
    """Compare two sweeps, print the differences, and write compare.md.

    Args:
      baseline, candidate: sweep or run directories.
      out: directory of compare.md. Defaults to CANDIDATE/report.

    Raises:
      UserError: if a sweep cannot be read, if the sweeps measure different things, or if `out` is
        not writable.
    """
    # Read both sweeps and match their arms.
    sweeps = Sweeps(
        runs.read_sweep(pathlib.Path(baseline), 'baseline'),
        runs.read_sweep(pathlib.Path(candidate), 'candidate'),
    )
    for field_name in ('metric', 'split', 'lower_is_better'):
        expected, actual = (getattr(sweep, field_name) for sweep in sweeps)
        if actual != expected:
            raise UserError(
                f'--candidate={candidate}: {field_name} = {actual!r}: expected {expected!r}, as '
                'in the baseline. Compare sweeps with the same metric, split and direction'
            )
    comparisons = compare_arms(*sweeps)
    table = _make_table(sweeps.candidate, comparisons)
    notes = _make_notes(sweeps, comparisons)
    title = f'{sweeps.baseline.path} → {sweeps.candidate.path}'

    # Write compare.md.
    header, *body = [[str(cell) for cell in cells] for cells in (table.header, *table.body)]
    note_items = '\n'.join(f'- {tables.escape_markdown(note)}' for note in notes)
    contents = f'{tables.format_markdown(header, body)}\n\n{note_items}'
    folder = sweeps.candidate.path / 'report' if out is None else pathlib.Path(out)
    markdown_file = folder / 'compare.md'
    with files.output_folder(folder):
        markdown_file.write_text(
            f'### {tables.escape_markdown(title)}\n\n{contents}\n', encoding='utf-8'
        )

    # Print the table and the notes.
    console = terminal.make_console()
    terminal.print_table(console, table, title)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    print(markdown_file)
    return comparisons


def compare_arms(baseline: Sweep, candidate: Sweep) -> list[ArmComparison]:
    """Compare every arm of either sweep, in the order of the baseline."""
    baseline_results, candidate_results = (
        {result.arm.label: result for result in analysis.compute_results(sweep)}
        for sweep in (baseline, candidate)
    )
    # Two single runs have the names of their directories, so they match whatever those are.
    if len(baseline_results) == len(candidate_results) == 1:
        baseline_results = dict(zip(candidate_results, baseline_results.values(), strict=True))
    comparisons = [
        _compare_arm(candidate, label, baseline_results.get(label), candidate_results.get(label))
        for label in {**baseline_results, **candidate_results}
    ]
    tests = statistics.correct_holm([comparison.test for comparison in comparisons])
    return [
        dataclasses.replace(comparison, test=test)
        for comparison, test in zip(comparisons, tests, strict=True)
    ]


def _compare_arm(
    sweep: Sweep, label: str, baseline: ArmResult | None, candidate: ArmResult | None
) -> ArmComparison:
    has_baseline = baseline is not None and baseline.metric is not None
    has_candidate = candidate is not None and candidate.metric is not None
    if not (baseline and candidate and has_baseline and has_candidate):
        return ArmComparison(label, baseline, candidate, verdict='lost' if has_baseline else None)
    difference, test = analysis.compare_finals(
        sweep, Finals(candidate.arm, candidate.final), Finals(baseline.arm, baseline.final)
    )
    verdict = statistics.judge(difference, sweep.lower_is_better)
    # Equal bits show that nothing changed, and need no test.
    if _is_equal(sweep, baseline, candidate):
        verdict, test = 'equal', None
    return ArmComparison(label, baseline, candidate, difference, test, verdict)


def _is_equal(sweep: Sweep, baseline: ArmResult, candidate: ArmResult) -> bool:
    """Return whether every common seed has the same metric, and the same score of each task."""
    common_seeds = baseline.final.keys() & candidate.final.keys()
    arms = baseline.arm, candidate.arm
    names = {
        name
        for arm in arms
        for name in arm.metric_names(sweep.split)
        if name == sweep.metric or name.startswith(f'{sweep.metric}/')
    }
    for name in names:
        values, expected = (arm.final_values(name, sweep.split) for arm in arms)
        if any(values.get(seed) != expected.get(seed) for seed in common_seeds):
            return False
    return bool(common_seeds)


def is_worse(comparison: ArmComparison) -> bool:
    """Return whether the verdict is 'worse' or 'lost'."""
    return comparison.verdict in ('worse', 'lost')


def explain_missing_verdict(comparison: ArmComparison) -> str:
    """Explain why there is no verdict although both sweeps have values, or return '' otherwise."""
    if comparison.verdict or not (
        comparison.baseline and comparison.candidate and comparison.baseline.metric
    ):
        return ''
    tasks, expected = comparison.candidate.arm.tasks, comparison.baseline.arm.tasks
    if set(tasks) != set(expected):
        return f'learned {analysis.describe_task_mismatch(tasks, expected)}'
    return 'no seed in common' if comparison.difference is None else 'one seed in common'


def _make_table(sweep: Sweep, comparisons: list[ArmComparison]) -> Table:
    columns = _make_columns(sweep, comparisons)
    return Table(columns, tables.make_body(columns, comparisons), set())


def _make_columns(sweep: Sweep, comparisons: list[ArmComparison]) -> list[Column[ArmComparison]]:
    metric = f'{sweep.metric_title} {"↓" if sweep.lower_is_better else "↑"}'
    num_tests = sum(comparison.test is not None for comparison in comparisons)
    # Both sides and their difference share their decimals, so that they visibly add up.
    baselines = [comparison.baseline for comparison in comparisons if comparison.baseline]
    candidates = [comparison.candidate for comparison in comparisons if comparison.candidate]
    decimals = tables.count_decimals(
        [result.metric for result in baselines],
        [result.metric for result in candidates],
        [comparison.difference for comparison in comparisons],
    )

    def format_metric(result: ArmResult | None) -> Cell:
        return tables.format_interval(result.metric if result else None, decimals)

    # The priorities differ from the order: on a narrow terminal the verdict precedes the costs.
    return [
        Column(
            'arm', 'arm', '', lambda comparison: Cell(comparison.label),
            terminal=Terminal(priority=0, wraps=True),
        ),
        Column(
            'baseline', metric, 'baseline',
            lambda comparison: format_metric(comparison.baseline),
            terminal=Terminal(priority=1),
        ),
        Column(
            'candidate', metric, 'candidate',
            lambda comparison: format_metric(comparison.candidate),
            terminal=Terminal(priority=2),
        ),
        Column(
            'difference', 'difference', tables.INTERVAL,
            lambda comparison: tables.format_interval(comparison.difference, decimals, '+'),
            terminal=Terminal(priority=3),
        ),
        Column(
            'p', 'p', 'Holm' if num_tests > 1 else '',
            lambda comparison: tables.format_test(comparison.test),
            terminal=Terminal(priority=5),
        ),
        Column(
            'parameters', 'parameters', '×',
            lambda comparison: _cost_cell(comparison, 'parameters'),
            terminal=Terminal(priority=6),
        ),
        Column(
            'flops', f'FLOPs per {sweep.unit}', '×',
            lambda comparison: _cost_cell(comparison, f'flops_per_{sweep.unit}'),
            terminal=Terminal(priority=8),
        ),
        Column(
            'seconds', 'train seconds', '×',
            lambda comparison: _cost_cell(comparison, 'seconds'),
            terminal=Terminal(priority=7),
        ),
        Column(
            'verdict', 'verdict', '', _verdict_cell, terminal=Terminal(priority=4, wraps=True)
        ),
    ]  # fmt: skip


def _cost_cell(comparison: ArmComparison, quantity: str) -> Cell:
    """Return a cell with the ratio of the costs, candidate over baseline."""
    baseline, candidate = (
        _get_cost(result, quantity) for result in (comparison.baseline, comparison.candidate)
    )
    if not baseline or candidate is None:
        return Cell(tables.NONE)
    return Cell(f'{candidate / baseline:.3g}')


def _get_cost(result: ArmResult | None, quantity: str) -> float | None:
    if result is None:
        return None
    return result.seconds if quantity == 'seconds' else result.arm.get_cost(quantity, 'model')


def _verdict_cell(comparison: ArmComparison) -> Cell:
    if comparison.difference:
        detail = f'(n = {comparison.difference.num_seeds})'
    else:
        detail = explain_missing_verdict(comparison) or _explain_missing_values(comparison)
    return Cell(comparison.verdict or tables.NONE, detail)


def _explain_missing_values(comparison: ArmComparison) -> str:
    for side, result in (('baseline', comparison.baseline), ('candidate', comparison.candidate)):
        if result is None:
            return f'not in the {side}'
        if result.metric is None:
            return f'{"not finite" if result.final else result.arm.state} in the {side}'
    return ''


def _make_notes(sweeps: Sweeps, comparisons: list[ArmComparison]) -> list[str]:
    # List the arms by verdict.
    verdicts: dict[str, list[str]] = {}
    for comparison in comparisons:
        verdicts.setdefault(comparison.verdict or 'without a verdict', []).append(comparison.label)
    verdict_list = '; '.join(
        f'{verdict}: {", ".join(labels)}' for verdict, labels in verdicts.items()
    )
    notes = [
        f'{verdict_list}.',
        'Differences are candidate − baseline, paired by the seeds that both have; better and '
        'worse mean that their interval excludes zero, equal that every seed has the same bits, '
        f'also in each task. × is candidate over baseline. {statistics.CAUTION}',
    ]
    if warning := statistics.warn_too_few_seeds([comparison.test for comparison in comparisons]):
        notes.append(warning)

    # List what changed in the configs, and the arms where it did.
    changes: dict[str, list[str]] = {}
    for comparison in comparisons:
        if comparison.baseline and comparison.candidate:
            for change in _list_changes(comparison.baseline.arm, comparison.candidate.arm):
                changes.setdefault(change, []).append(comparison.label)
    num_common = sum(
        bool(comparison.baseline and comparison.candidate) for comparison in comparisons
    )
    for change, labels in changes.items():
        scope = 'all arms' if len(labels) == num_common > 1 else ', '.join(labels)
        notes.append(f'The configs differ: {change} ({scope}).')

    # List the machines if they differ.
    old_machines, new_machines = map(_list_machines, sweeps)
    if old_machines != new_machines:
        notes.append(f'Other machines: {"; ".join(old_machines)} → {"; ".join(new_machines)}.')

    # List versions, devices and tokens by side.
    sides = zip(Sweeps._fields, sweeps, strict=True)
    arms = [dataclasses.replace(arm, label=side) for side, sweep in sides for arm in sweep.arms]
    return notes + provenance.describe(arms)


def _list_changes(baseline: Arm, candidate: Arm) -> list[str]:
    old_config, new_config = flatten(baseline.config), flatten(candidate.config)
    # A run that has not started has no config yet.
    if not old_config or not new_config:
        return []
    return [
        f'{config_key} = {old_config.get(config_key)!r} → {new_config.get(config_key)!r}'
        for config_key in sorted(old_config.keys() | new_config.keys())
        if old_config.get(config_key) != new_config.get(config_key)
    ]


def _list_machines(sweep: Sweep) -> list[str]:
    return sorted({str(arm.status['machine']) for arm in sweep.arms if 'machine' in arm.status})
