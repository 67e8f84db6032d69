"""Functions that read, average and join the records of metrics.jsonl and timing.jsonl."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from mi.config import UserError

Record = dict[str, Any]  # a JSON object


def read_metrics(path: pathlib.Path, is_done: bool, warnings: list[str]) -> list[Record]:
    """Read the records of metrics.jsonl. See `_read_lines` for the arguments and errors."""
    records = _read_lines(path, is_done, warnings)
    for line_number, record in records.items():
        has_position = isinstance(record.get('step'), int) and isinstance(record.get('seed'), int)
        if not has_position or not isinstance(record.get('split'), str):
            raise UserError(f'{path}, line {line_number}: expected the fields step, seed and split')
    return list(records.values())


def read_timing(path: pathlib.Path, is_done: bool, warnings: list[str]) -> list[Record]:
    """Read the records of timing.jsonl. See `_read_lines` for the arguments and errors."""
    records = _read_lines(path, is_done, warnings)
    for line_number, record in records.items():
        if not isinstance(record.get('step'), int) or not is_number(record.get('seconds')):
            raise UserError(f'{path}, line {line_number}: expected the fields step and seconds')
    return list(records.values())


def _read_lines(path: pathlib.Path, is_done: bool, warnings: list[str]) -> dict[int, Record]:
    """Read a JSON Lines file as {line number: record}, or return {} if it does not exist.

    Text after the last newline is a record that is still being written.

    Args:
      path: the file.
      is_done: whether the run is done, so that an incomplete record is an error.
      warnings: list to which a line is appended for each skipped record.

    Raises:
      UserError: if a line is not a JSON object.
    """
    if not path.exists():
        return {}
    # Every complete line ends in a newline.
    *lines, unfinished = path.read_bytes().split(b'\n')
    records = {
        line_number: _parse_record(line, path, line_number)
        for line_number, line in enumerate(lines, 1)
        if line.strip()
    }

    # The process may be killed, or still be writing, in the middle of the last line.
    if unfinished.strip():
        line_number = len(lines) + 1
        try:
            records[line_number] = _parse_record(unfinished, path, line_number)
        except UserError:
            if is_done:
                raise
            warnings.append(f'{path}, line {line_number}: skipped an incomplete record')
    return records


def _parse_record(line: bytes, path: pathlib.Path, line_number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError:  # includes UnicodeDecodeError
        record = None
    if not isinstance(record, dict):
        raise UserError(f'{path}, line {line_number}: expected a JSON object')
    return record


def require_field(record: Record, field_name: str, expected_type: type, path: pathlib.Path) -> Any:
    """Return a field of a record.

    Raises:
      UserError: if the field is missing or has the wrong type. The message names the file `path`.
    """
    if not isinstance(record.get(field_name), expected_type):
        raise UserError(
            f'{path}: {field_name} = {record.get(field_name)!r}: '
            f'expected a {expected_type.__name__}'
        )
    return record[field_name]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def average_timing(timings: Sequence[Sequence[Record]]) -> list[Record]:
    """Average the timing records of several runs over the steps that all runs have.

    A rate is the number of units in all runs over the seconds of all runs.
    """
    step_records = [{record['step']: record for record in timing} for timing in timings]
    averages: list[Record] = []
    for step in sorted(set.intersection(*map(set, step_records)) if step_records else ()):
        records = [run_records[step] for run_records in step_records]
        seconds = [record['seconds'] for record in records]
        average: Record = {}
        for field_name in records[0]:
            if not all(is_number(record.get(field_name)) for record in records):
                continue
            is_rate = field_name == 'mfu' or field_name.endswith('_per_second')
            weights = seconds if is_rate and sum(seconds) > 0 else [1.0] * len(records)
            values = [record[field_name] for record in records]
            average[field_name] = float(np.average(values, weights=weights))
        averages.append(average | {'step': step})
    return averages


def join_tasks(task_records: Mapping[str, Sequence[Record]], metric: str) -> list[Record]:
    """Join the records of several tasks, {task: records}, with the mean of the metric over tasks.

    The result has one record for each step, seed and split that all tasks recorded. The mean is
    None if the metric of any task is None, because it is not finite.
    """
    # Collect the values of the tasks by (step, seed, split).
    task_values: dict[tuple[int, int, str], dict[str, float | None]] = {}
    for task, records in task_records.items():
        for record in records:
            if metric in record and (record[metric] is None or is_number(record[metric])):
                position = record['step'], record['seed'], record['split']
                task_values.setdefault(position, {})[task] = record[metric]

    # Write one record where every task has a value.
    joined: list[Record] = []
    for (step, seed, split), values in task_values.items():
        if len(values) == len(task_records):
            finite_values = [value for value in values.values() if value is not None]
            is_finite = len(finite_values) == len(values)
            task_mean = math.fsum(finite_values) / len(values) if is_finite else None
            joined.append({'step': step, 'seed': seed, 'split': split, metric: task_mean})
            joined[-1] |= {f'{metric}/{task}': value for task, value in values.items()}
    return joined
