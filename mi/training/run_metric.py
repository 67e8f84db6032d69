"""User-defined metrics: functions of a run's records, named 'package.module:function'.

    def best_return(records):                   # the records of one seed and split, in order
        return max(record['return'] for record in records)

    best_return.lower_is_better = False         # optional: the direction of a sweep's METRIC

The value at a step is computed from all records up to that step, so that every metric has a
learning curve. The value of a seed is computed from all its records.
"""

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from mi.config import UserError, format_error
from mi.registry import import_object, is_reference

Record = dict[str, Any]  # a JSON object


class RunMetric(Protocol):
    """A function of a run's records for one seed and split."""

    def __call__(self, records: Sequence[Mapping[str, Any]], /) -> float | None:
        """Compute the metric after the last of the records.

        Args:
          records: one or more records in the order of their steps, each with 'step', 'split' and
            the numbers of the split. Non-finite numbers are NaN, which NumPy functions propagate
            but Python's `max` does not.

        Returns:
          A number, or None if the metric is not yet defined, such as a mean of ten records after
          the first record.
        """


def import_metric(metric: str) -> RunMetric:
    """Import the function of a user-defined metric.

    Raises:
      UserError: if the metric cannot be imported, or is not callable.
    """
    try:
        function = import_object(metric)
    except ValueError as error:
        raise UserError(f'METRIC = {error}') from error
    if not callable(function):
        raise UserError(
            f'METRIC = {metric!r}: expected a function of records, but found {function!r}'
        )
    return cast(RunMetric, function)


def find_direction(metric: str) -> bool | None:
    """Return the attribute `lower_is_better` of a user-defined metric, or None if it has none.

    Raises:
      UserError: if the metric cannot be imported, or the attribute is neither True nor False.
    """
    direction = getattr(import_metric(metric), 'lower_is_better', None)
    if direction is None or isinstance(direction, bool):
        return direction
    raise UserError(
        f'METRIC = {metric!r}: expected its attribute lower_is_better to be True or False, but '
        f'found {direction!r}'
    )


class MetricAppender:
    """A filter that adds a user-defined metric to the records of one run.

    The value is added under the name of the metric, or as None if it is not finite. Nothing is
    added if the function returns None, or if the metric is not user-defined.

    Args:
      metric: name of the metric.
      splits: splits to whose records the metric is added, or None for all splits whose records have
        the numbers that the function reads.
    """

    def __init__(self, metric: str, splits: Collection[str] | None = None):
        self._metric, self._splits = metric, splits
        self._history: dict[tuple[str, Any], list[Record]] = {}  # (split, seed) → records so far

    @functools.cached_property
    def _function(self) -> RunMetric | None:
        return import_metric(self._metric) if is_reference(self._metric) else None

    def clear(self) -> None:
        """Forget all previous records, for a run that has rewritten them."""
        self._history.clear()

    def append(self, records: Iterable[Record]) -> list[Record]:
        """Return the next records of the run with the metric added.

        Raises:
          UserError: if the function cannot be imported, raises an exception, or returns anything
            other than a number or None.
        """
        if self._function is None:
            return list(records)
        return [self._append_to(record) for record in records]

    def _append_to(self, record: Record) -> Record:
        split, step = record['split'], record['step']
        if self._splits is not None and split not in self._splits:
            return record

        # A resumed run repeats steps; the last record of a step counts.
        history = self._history.setdefault((split, record.get('seed')), [])
        while history and history[-1]['step'] >= step:
            history.pop()
        history.append({name: math.nan if v is None else v for name, v in record.items()})

        assert self._function is not None
        try:
            metric_value = self._function(tuple(history))
            number = None if metric_value is None else float(metric_value)
        except Exception as error:  # the function is the user's program and may raise anything
            if isinstance(error, KeyError) and self._splits is None:
                return record
            raise UserError(
                f'METRIC = {self._metric!r}: expected a number or None for the {len(history)} '
                f'{split} records up to step {step} ({type(error).__name__}: {format_error(error)})'
            ) from error
        if number is None:
            return record
        return {**record, self._metric: number if math.isfinite(number) else None}


def find_refusal(
    metric: str, split: str, names: Iterable[str], *, has_more_names: bool = False
) -> str:
    """Return the reason why a user-defined metric cannot be computed on a split, or ''.

    The function is called once with a single dummy record, whose numbers are all 1.

    Args:
      metric: name of the metric.
      split: name of the split.
      names: names of the numbers in its records.
      has_more_names: whether the records may have other numbers that the function reads.
    """
    record = {'step': 1, 'seed': 0, 'split': split, **dict.fromkeys(names, 1.0)}
    try:
        MetricAppender(metric, None if has_more_names else {split}).append([record])
    except UserError as error:
        return str(error)
    return ''
