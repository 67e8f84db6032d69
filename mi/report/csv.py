"""The table and the scores of single tasks as CSV, with every digit."""

import csv
import io

from mi.report import tables
from mi.report.analysis import Row
from mi.report.runs import Sweep
from mi.report.statistics import Estimate


def to_csv(sweep: Sweep, rows: list[Row]) -> str:
    """Return the table as CSV with every digit; a missing value is empty.

    A metric with the name of another column is called SPLIT/NAME.
    """
    leading = [_csv_scores(sweep, row) for row in rows]
    trailing = [_csv_costs(sweep, row) for row in rows]
    metrics = tables.secondary_names(rows)
    taken = leading[0].keys() | trailing[0].keys()
    names = [f'{sweep.split}/{name}' if name in taken else name for name in metrics]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow([*leading[0], *names, *trailing[0]])
    for row, scores, costs in zip(rows, leading, trailing, strict=True):
        secondary = [row.secondary.get(name) for name in metrics]
        writer.writerow([*scores.values(), *secondary, *costs.values()])
    return file.getvalue()


def _csv_scores(sweep: Sweep, row: Row) -> dict[str, object]:
    fields: dict[str, object] = {'arm': row.arm.label, 'state': row.arm.state}
    fields |= {'reason': row.arm.reason, 'split': sweep.split, 'metric': sweep.metric}
    fields |= _csv_estimate('', row.metric) | _csv_estimate('difference_', row.difference)
    fields |= {'p': row.test and row.test.p, 'p_holm': row.test and row.test.p_holm}
    for name in ('median', 'iqm', 'improvement'):
        fields |= _csv_estimate(f'{name}_', getattr(row.summary, name, None))
    fields |= _csv_estimate('equal_time_', row.equal_time)
    num_pairs = row.test.num_pairs if row.test else row.difference and row.difference.n
    return fields | {'difference_pairs': num_pairs, 'verdict': row.verdict}


def _csv_estimate(prefix: str, estimate: Estimate | None) -> dict[str, object]:
    return {f'{prefix}{key}': getattr(estimate, key, None) for key in ('mean', 'low', 'high')}


def _csv_costs(sweep: Sweep, row: Row) -> dict[str, object]:
    fields: dict[str, object] = {
        f'{quantity}_{part}': row.arm.get_cost(quantity, part)
        for quantity in ('parameters', f'flops_per_{sweep.unit}')
        for part in ('model', 'fusion')
    }
    fields |= {'train_seconds': row.seconds, f'{sweep.unit}s_per_second': row.rate}
    fields |= {'seeds': len(row.final), 'seeds_asked': len(row.arm.seeds)}
    return fields | {'remarks': '; '.join(row.remarks)}


def tasks_to_csv(rows: list[Row]) -> str:
    """Return every final score of every task, in the order of the seeds that have all tasks."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['arm', 'task', 'number', 'score'])
    for row in rows:
        if row.task_summary is None:
            continue
        for i, task in enumerate(row.task_summary.tasks):
            for number, value in enumerate(row.task_summary.scores[:, i]):
                writer.writerow([row.arm.label, task, number, value])
    return file.getvalue()
