"""The table and the scores of single tasks as CSV, in full precision."""

import csv
import io

from mi.report import tables
from mi.report.analysis import ArmResult
from mi.report.arms import Sweep
from mi.report.statistics import Estimate


def to_csv(sweep: Sweep, results: list[ArmResult]) -> str:
    """Format the table as CSV in full precision, with empty cells for missing values.

    A metric that has the same name as another column is renamed to SPLIT/NAME.
    """
    # The metrics come between the scores and the costs, whose columns are the same in every sweep.
    leading = [_csv_scores(sweep, result) for result in results]
    trailing = [_csv_costs(sweep, result) for result in results]
    metric_names = tables.secondary_names(results)
    taken_names = leading[0].keys() | trailing[0].keys()
    column_names = [
        f'{sweep.split}/{name}' if name in taken_names else name for name in metric_names
    ]

    # Write the header and a line per arm.
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow([*leading[0], *column_names, *trailing[0]])
    for result, scores, costs in zip(results, leading, trailing, strict=True):
        secondary = [result.secondary.get(name) for name in metric_names]
        writer.writerow([*scores.values(), *secondary, *costs.values()])
    return buffer.getvalue()


def _csv_scores(sweep: Sweep, result: ArmResult) -> dict[str, object]:
    fields: dict[str, object] = {'arm': result.arm.label, 'state': result.arm.state}
    fields |= {'reason': result.arm.reason, 'split': sweep.split, 'metric': sweep.metric}
    fields |= _csv_estimate('', result.metric) | _csv_estimate('difference_', result.difference)
    fields |= {'p': result.test and result.test.p, 'p_holm': result.test and result.test.p_holm}
    for statistic in ('median', 'iqm', 'improvement'):
        fields |= _csv_estimate(f'{statistic}_', getattr(result.summary, statistic, None))
    fields |= _csv_estimate('equal_time_', result.equal_time)
    num_pairs = result.difference and result.difference.num_seeds
    if result.test:
        num_pairs = result.test.num_pairs
    return fields | {'difference_pairs': num_pairs, 'verdict': result.verdict}


def _csv_estimate(prefix: str, estimate: Estimate | None) -> dict[str, object]:
    fields = ('mean', 'low', 'high')
    return {f'{prefix}{field}': getattr(estimate, field, None) for field in fields}


def _csv_costs(sweep: Sweep, result: ArmResult) -> dict[str, object]:
    fields: dict[str, object] = {
        f'{quantity}_{component}': result.arm.get_cost(quantity, component)
        for quantity in ('parameters', f'flops_per_{sweep.unit}')
        for component in ('model', 'fusion')
    }
    fields |= {'train_seconds': result.seconds, f'{sweep.unit}s_per_second': result.rate}
    fields |= {'seeds': len(result.final), 'seeds_total': len(result.arm.seeds)}
    return fields | {'remarks': '; '.join(result.remarks)}


def tasks_to_csv(results: list[ArmResult]) -> str:
    """Format the final scores as CSV, by arm, task and seed.

    Arms with fewer than two tasks are omitted, and so are seeds without a finite score in every
    task. The column `number` counts the remaining seeds from 0.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow(['arm', 'task', 'number', 'score'])
    for result in results:
        if result.task_summary is None:
            continue
        for task_index, task in enumerate(result.task_summary.tasks):
            for seed_index, score in enumerate(result.task_summary.scores[:, task_index]):
                writer.writerow([result.arm.label, task, seed_index, score])
    return buffer.getvalue()
