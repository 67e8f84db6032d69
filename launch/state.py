"""The state and progress of a sweep's members, read from their run directories."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.records import (
    METRICS,
    NUMBER,
    TAIL,
    TIMING,
    WHOLE_FILE,
    Fields,
    FileStamp,
    Record,
    RecordReader,
    get_int,
    has_fields,
    read_stamp,
)
from mi.config import UserError
from mi.registry import is_reference
from mi.training.io import read_json
from mi.training.run_metric import MetricAppender
from mi.training.run_state import STOP_MARK, read_object, read_run_state

RATE_SUFFIX = '_per_second'  # suffix of the rates in timing.jsonl


class MemberState(NamedTuple):
    """The state and progress of a member.

    Attributes:
      phase: a phase of `mi.training.run_state.RunState`.
      step: newest step, or 0 if unknown.
      num_steps: number of steps in the run, or 0 if unknown.
      rate: speed as text, such as '1,200 tokens/s'.
      seconds_left: time to the last step at the pace of the newest record, or None if the
        member is not running.
      metric: newest value of the sweep's metric, as text.
      reason: why the member failed, died or was stopped.
    """

    phase: str
    step: int = 0
    num_steps: int = 0
    rate: str = ''
    seconds_left: float | None = None
    metric: str = ''
    reason: str = ''


def read_member_state(run_dir: pathlib.Path, metric: str = '') -> MemberState:
    """Return the state of a member.

    Args:
      run_dir: run directory of the member, which need not exist.
      metric: metric to show, or '' for the first number of the newest record.
    """
    return StateReader(metric).read(run_dir)


class StateReader:
    """A reader of members' states, which skips files that have not changed.

    It reads only the new records of a file, and caches the states of members that are done or
    stopped.

    Args:
      metric: see `read_member_state`.
    """

    def __init__(self, metric: str = ''):
        self._metric = metric
        self._members: dict[pathlib.Path, _MemberReader] = {}
        self._final_states: dict[pathlib.Path, MemberState] = {}

    def read(self, run_dir: pathlib.Path) -> MemberState:
        """Return the state of a member, whose run directory need not exist."""
        if run_dir in self._final_states:
            return self._final_states[run_dir]
        if run_dir not in self._members:
            if not run_dir.exists():
                return MemberState('waiting')
            self._members[run_dir] = _MemberReader(run_dir, self._metric)
        state = self._members[run_dir].read()
        if state.phase in ('done', 'stopped'):
            self._final_states[run_dir] = state
            del self._members[run_dir]
        return state


class _MemberReader:
    """A reader for one run directory, which must exist."""

    def __init__(self, run_dir: pathlib.Path, metric: str):
        self._run_dir, self._metric = run_dir, metric
        self._status = _CachedObject(run_dir / 'status.json')
        self._cost = _CachedObject(run_dir / 'cost.json')
        self._timing = RecordReader(run_dir / 'timing.jsonl', TIMING)
        # A metric by reference needs the records from the first one on.
        tail = WHOLE_FILE if is_reference(metric) else TAIL
        self._metrics = RecordReader(run_dir / 'metrics.jsonl', METRICS, tail)
        self._appender = MetricAppender(metric)
        self._metric_error = ''
        self._last_timings: list[Record] = []  # the last two records of timing.jsonl
        self._metric_summary = _MetricSummary(metric)

    def read(self) -> MemberState:
        status = self._status.read()
        run_state = read_run_state(self._run_dir, status)
        step, num_steps = get_int(status, 'step'), get_int(self._cost.read(), 'steps')

        # Measure the pace between the last two records.
        new_timings, is_replaced = self._timing.read()
        self._last_timings = [*([] if is_replaced else self._last_timings), *new_timings][-2:]
        rate, seconds_left = '', None
        if self._last_timings:
            timing = self._last_timings[-1]
            step = max(step, timing['step'])
            rate = _format_rates(timing)
            previous_step = self._last_timings[-2]['step'] if len(self._last_timings) > 1 else 0
            interval = timing['step'] - previous_step
            if run_state.phase == 'running' and num_steps and interval > 0:
                seconds_left = (num_steps - timing['step']) * timing['seconds'] / interval

        # Summarize the newest value of the metric.
        new_metrics, is_replaced = self._metrics.read()
        if is_replaced:
            self._metric_summary = _MetricSummary(self._metric)
            self._appender.clear()
        try:
            self._metric_summary.add(self._appender.append(new_metrics))
        except UserError as error:  # a broken function of METRIC must not hide the states
            self._metric_error = str(error)
        is_over = run_state.phase in ('done', 'stopped')
        metric = self._metric_error or self._metric_summary.format(is_over)
        return MemberState(
            run_state.phase, step, num_steps, rate, seconds_left, metric, run_state.reason
        )


def _format_rates(timing: Record) -> str:
    """Format the rates in a record of timing.jsonl, for example '1,200 tokens/s'."""
    rates = {
        field_name.removesuffix(RATE_SUFFIX): value
        for field_name, value in timing.items()
        if field_name.endswith(RATE_SUFFIX) and isinstance(value, NUMBER)
    }
    return ', '.join(f'{speed:,.0f} {unit}/s' for unit, speed in rates.items())


class _MetricSummary:
    """A summary of a metric's newest value.

    If the metric has no value, the summary says so and shows another metric.
    """

    def __init__(self, metric: str):
        self._metric = metric
        self._with_metric: list[Record] = []  # the newest records with the metric, all of one step
        self._without_metric: list[Record] = []  # the newest records without it, all of one step

    def add(self, records: Sequence[Record]) -> None:
        """Add the records that a run has written since the last call."""
        for record in records:
            has_metric = isinstance(record.get(self._metric), NUMBER)
            newest = self._with_metric if has_metric else self._without_metric
            if newest and newest[-1]['step'] != record['step']:
                newest.clear()
            newest.append(record)

    def format(self, is_over: bool) -> str:
        """Format the mean over seeds at the newest step, such as 'bits_per_byte 2.1 (valid)'."""
        if self._with_metric:
            return _format_mean(self._metric, self._with_metric)
        record = self._without_metric[-1] if self._without_metric else {}
        other_metric = next(
            (other_metric for other_metric, value in record.items() if isinstance(value, float)), ''
        )
        if not other_metric:
            return ''
        mean = _format_mean(other_metric, self._without_metric)
        if not self._metric:
            return mean
        return f'no {self._metric}{"" if is_over else " yet"}, {mean}'


def _format_mean(metric: str, records: Sequence[Record]) -> str:
    """Format the mean of a metric over the records with the same split as the last one."""
    split = records[-1]['split']
    values = [
        record[metric]
        for record in records
        if record['split'] == split and isinstance(record.get(metric), NUMBER)
    ]
    return f'{metric} {sum(values) / len(values):.4g} ({split})'


class _CachedObject:
    """A JSON object that is read again when its file changes."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        self._stamp: FileStamp | None = None
        self._value: Record = {}

    def read(self) -> Record:
        stamp = read_stamp(self._file)
        if stamp != self._stamp:
            self._stamp, self._value = stamp, read_object(self._file)
        return self._value


def read_sweep_states(
    workdir: pathlib.Path, reader: StateReader | None = None
) -> dict[str, MemberState]:
    """Return name → state for the members of a sweep, in order, or for a single run.

    Args:
      workdir: directory of a sweep or a run.
      reader: reader of earlier calls, to read only changes.

    Raises:
      UserError: if the directory is neither a sweep nor a run.
    """
    metric, run_dirs = find_members(workdir)
    reader = reader or StateReader(metric)
    return {run_dir.name: reader.read(run_dir) for run_dir in run_dirs}


def find_members(workdir: pathlib.Path) -> tuple[str, list[pathlib.Path]]:
    """Return the metric and run directories of a sweep, or '' and the directory itself for a run.

    Raises:
      UserError: if the directory is neither a sweep nor a run.
    """
    if (workdir / 'sweep.json').exists():
        sweep = read_sweep_file(workdir, {'metric': str, 'members': list})
        return sweep['metric'], [workdir / member['name'] for member in sweep['members']]
    if not (workdir / 'status.json').exists():
        raise UserError(
            f'--workdir={workdir}: expected the directory of a sweep or a run, with sweep.json or '
            f'status.json'
        )
    return '', [workdir]


def read_sweep_file(workdir: pathlib.Path, fields: Fields) -> dict[str, Any]:
    """Return the content of a sweep's sweep.json.

    Args:
      workdir: directory of the sweep.
      fields: required fields.

    Raises:
      UserError: if the file is damaged.
    """
    file = workdir / 'sweep.json'
    sweep = read_json(file)
    invalid_fields = [
        field_name
        for field_name, kind in fields.items()
        if not isinstance(sweep.get(field_name), kind)
    ]
    members = sweep.get('members', [])
    if not all(has_fields(member, {'name': str, 'overrides': dict}) for member in members):
        invalid_fields.append('members')
    if invalid_fields:
        field_name = invalid_fields[0]
        raise UserError(
            f'{file}: {field_name} = {sweep.get(field_name)!r}: expected a value written by a '
            f'launcher. Restore the file, or use another --workdir'
        )
    return sweep


def is_finished(run_dir: pathlib.Path) -> bool:
    """Return whether a run is finished, because all steps are done or a rule has stopped it."""
    return (run_dir / STOP_MARK).exists() or read_status(run_dir).get('state') == 'done'


def read_status(run_dir: pathlib.Path) -> Record:
    """Return the content of a run's status.json, or {} if it has not been written yet."""
    return read_object(run_dir / 'status.json')
