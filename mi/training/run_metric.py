"""Metrics by reference: functions of the records of a run, named 'package.module:function'.

    def best_return(records):                   # the records of one seed and split, in order
        return max(record['return'] for record in records)

    best_return.lower_is_better = False         # optional: the direction of a sweep's METRIC

The value at a step is that of the records up to the step, so that every function has a learning
curve. The value of a seed is that of all its records.
"""

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from mi.config import UserError, format_error
from mi.registry import import_object, is_reference

Record = dict[str, Any]  # a JSON object


class RunMetric(Protocol):
    """A function of the records of one seed and split of a run."""

    def __call__(self, records: Sequence[Mapping[str, Any]], /) -> float | None:
        """Return the value after the last of the records.

        Args:
          records: one or more records in the order of their steps, each with 'step', 'split' and
            the numbers of the split. A number that was not finite is NaN, which NumPy's functions
            hand on and Python's `max` does not.

        Returns:
          A number; None while there is none, as for a mean of ten records after the first one.
        """


def import_metric(metric: str) -> RunMetric:
    """Import the function of a metric by reference.

    Raises:
      UserError: if it cannot be imported, or called.
    """
    try:
        function = import_object(metric)
    except ValueError as error:
        raise UserError(f'METRIC = {error}') from error
    if not callable(function):
        raise UserError(f'METRIC = {metric!r}: expected a function of records, not {function!r}')
    return cast(RunMetric, function)


def find_direction(metric: str) -> bool | None:
    """Return the attribute `lower_is_better` of a metric by reference; None without one.

    Raises:
      UserError: if the metric cannot be imported, or the attribute is neither True nor False.
    """
    direction = getattr(import_metric(metric), 'lower_is_better', None)
    if direction is None or isinstance(direction, bool):
        return direction
    raise UserError(
        f'METRIC = {metric!r}: expected its attribute lower_is_better to be True or False, not '
        f'{direction!r}'
    )


class MetricAppender:
    """A reader's last step, which adds a metric by reference to the records of one run.

    Records keep their numbers, and get the value under the name of the metric: null where it is not
    finite, nothing where the function returns None. Other metrics are recorded by the run itself,
    and nothing is added.

    Args:
      metric: the name of the metric.
      splits: the splits whose records get it; None for those whose records have the numbers that
        the function reads.
    """

    def __init__(self, metric: str, splits: Collection[str] | None = None):
        self._metric, self._splits = metric, splits
        self._history: dict[tuple[str, Any], list[Record]] = {}  # (split, seed) → records so far

    @functools.cached_property
    def _function(self) -> RunMetric | None:
        return import_metric(self._metric) if is_reference(self._metric) else None

    def clear(self) -> None:
        """Forget the records so far, because a run has replaced them."""
        self._history.clear()

    def append(self, records: Iterable[Record]) -> list[Record]:
        """Return the next records of the run, with the metric.

        Raises:
          UserError: if the function cannot be imported, raises, or returns something else than a
            number or None.
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
    """Return why a metric by reference cannot be computed from a split; '' if it can.

    The function is called once with one made-up record, whose numbers are all 1.

    Args:
      metric: the name of the metric.
      split: the split.
      names: names of the numbers in its records.
      has_more_names: whether the records have other numbers too, which the function may read.
    """
    record = {'step': 1, 'seed': 0, 'split': split, **dict.fromkeys(names, 1.0)}
    try:
        MetricAppender(metric, None if has_more_names else {split}).append([record])
    except UserError as error:
        return str(error)
    return ''
