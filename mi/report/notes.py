"""Notes that explain how to read the table."""

from mi.registry import is_reference
from mi.report import analysis, provenance, statistics, tables
from mi.report.analysis import ArmResult
from mi.report.arms import Sweep


def make_notes(sweep: Sweep, results: list[ArmResult]) -> list[str]:
    """Make the notes to show below the table, for all formats."""
    # Explain the columns of scores, in their order.
    notes = [_seed_note(results)]
    if sweep.baseline is not None:
        notes.append(
            f'Differences are arm − {sweep.baseline}, paired by seed; better and worse mean '
            'that their interval excludes zero.'
        )
        notes += _test_notes(results)
    if tables.has_tasks(results):
        notes.append(_task_note(sweep, results))
    if tables.has_equal_time(results):
        seconds = tables.format_seconds(analysis.find_equal_time(sweep))
        notes.append(
            f'At equal time: the last {sweep.curves} record that an arm had reached when the '
            f'fastest was done, {seconds} s of training.'
        )

    if is_reference(sweep.metric):
        notes.append(
            f'{sweep.metric_title}: {sweep.metric}, a function of the {sweep.split} records of a '
            f'seed.'
        )

    # Explain the costs, and the bold numbers.
    notes.append(
        'Parameters and FLOPs: the whole model / the fusion alone. FLOPs per '
        f'{sweep.unit}: forward, matrix products only, a multiply-add counts as two. Seconds and '
        f'{sweep.unit}s/s: training, all seeds of the run together.'
    )
    if len(results) > 1:
        scope = ' of each problem' if len(sweep.group_by_problem()) > 1 else ''
        notes.append(f'Bold marks the best mean{scope} and claims no significance.')
    remarks = [remark for result in results for remark in result.remarks]
    return [*notes, *remarks, *sweep.notes, *provenance.describe(sweep.arms)]


def _seed_note(results: list[ArmResult]) -> str:
    seed_counts = sorted({result.metric.num_seeds for result in results if result.metric})
    if len(seed_counts) == 1:
        sentence = f'{seed_counts[0]} {"seed" if seed_counts == [1] else "seeds"} per arm.'
    elif seed_counts:
        arm_counts = [
            f'{result.arm.label} {result.metric.num_seeds}' for result in results if result.metric
        ]
        sentence = f'The arms differ in their number of seeds: {", ".join(arm_counts)}.'
    else:
        sentence = 'No arm has a final record yet.'
    caveat = ' One seed has no interval.' if 1 in seed_counts else ''
    return f'{sentence} {statistics.CAUTION}{caveat}'


def _test_notes(results: list[ArmResult]) -> list[str]:
    tests = [result.test for result in results if result.test is not None]
    if not tests:
        return []
    correction = ''
    if len(tests) > 1:
        correction = f', corrected by Holm for the {len(tests)} arms; the intervals are not'
    explanation = (
        'p: the probability that differences of these sizes have a mean so far from zero if each '
        f'sign is chance, by a two-sided permutation test{correction}.'
    )
    warning = statistics.warn_too_few_seeds([result.test for result in results])
    return [explanation, warning] if warning else [explanation]


def _task_note(sweep: Sweep, results: list[ArmResult]) -> str:
    if any(result.task_summary.has_separate_runs for result in results if result.task_summary):
        resampling = (
            'All intervals of this table resample the runs of each task independently, because '
            'every task was learned by separate runs (stratified bootstrap)'
        )
    else:
        resampling = 'Their intervals resample whole seeds, because one agent learns all tasks'
    improvement = ''
    if sweep.baseline is not None:
        improvement = (
            f'P(improvement): the probability that a seed of this arm beats a seed of '
            f'{sweep.baseline} on a task, ties counted half; 0.5 means neither. '
        )
    return (
        'Means are over tasks and seeds. Median: the median over tasks of the means over seeds. '
        f'IQM: the mean of the middle half of all scores. {improvement}{resampling}.'
    )
