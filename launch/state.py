"""What a run directory says of its run, read from outside while it goes on or after it.

waiting     nothing was started yet           done        all steps
running     somebody holds its lock           preempted   stopped and saved: goes on if started
died        it said it was running, and       failed      with a reason
            nobody holds its lock             stopped     by a rule of the sweep, for good
"""

import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.markup
import rich.table

from launch import restarts
from mi.config import UserError
from mi.training.io import complete_size, format_duration, read_json
from mi.training.lock import is_locked

RATE = '_per_second'  # how the rates in timing.jsonl end
STOPPED = 'stopped.json'  # why a rule of the sweep has stopped the run; it is not started again
TAIL = 2**16  # bytes of a file of records that are read, from its end

Needs = Mapping[str, type | tuple[type, ...]]  # key → type: what a record has to have
NUMBER = (int, float)
TIMING: Needs = {'step': int, 'seconds': NUMBER}
METRICS: Needs = {'step': int, 'split': str}


class State(NamedTuple):
    """How a run stands.

    Attributes:
      word: one of those above.
      step, steps: how far it is, and how far it will go; 0 where that is not known yet.
      rate: in words, as '1,200 tokens/s'.
      left: seconds, by the pace of the last record; None where it is not running.
      metric: the newest value of what the sweep compares, in words.
      reason: why it failed, died or was stopped.
    """

    word: str
    step: int = 0
    steps: int = 0
    rate: str = ''
    left: float | None = None
    metric: str = ''
    reason: str = ''


def read(path: pathlib.Path, metric: str = '') -> State:
    """The state of a run directory.

    Args:
      path: of the run; it need not exist.
      metric: whose newest value is wanted; '' for the first number of the newest record.
    """
    return Reader(metric).read(path)


class Reader:
    """Reads the states of many runs again and again, and of their files only what has changed.

    What is stored is looked at before it is read, files of records are read from where the last
    look ended, and a run that has come to its end is not looked at again.

    Args:
      metric: as in `read`.
    """

    def __init__(self, metric: str = ''):
        self._metric = metric
        self._runs: dict[pathlib.Path, _Run] = {}
        self._final: dict[pathlib.Path, State] = {}

    def read(self, path: pathlib.Path) -> State:
        """The state of a run directory, which need not exist."""
        if path in self._final:
            return self._final[path]
        if path not in self._runs:
            if not path.exists():
                return State('waiting')
            self._runs[path] = _Run(path, self._metric)
        run = self._runs[path]
        state = run.read()
        if state.word in ('done', 'stopped'):
            self._final[path] = state
            del self._runs[path]
        return state


class _Run:
    """What is known of a run directory that exists."""

    def __init__(self, path: pathlib.Path, metric: str):
        self._path, self._metric = path, metric
        self._status = _Written(path / 'status.json')
        self._cost = _Written(path / 'cost.json')
        self._timing = Added(path / 'timing.jsonl', TIMING)
        self._metrics = Added(path / 'metrics.jsonl', METRICS)
        self._clock: list[dict[str, Any]] = []  # the last two records of timing.jsonl
        self._measured = _Measured(metric)

    def read(self) -> State:
        path, told = self._path, self._status.value()
        word = str(told.get('state', 'waiting'))
        reason = str(told.get('reason') or '')
        alive = is_locked(path / 'lock') or is_locked(path / 'launched')
        if alive:
            word, reason = 'running', ''
        elif (path / STOPPED).exists():
            word, reason = 'stopped', str(written(path / STOPPED).get('reason', ''))
        elif word in ('preempted', 'waiting', 'running') and (why := restarts.reason(path)):
            word, reason = 'failed', why
        elif word == 'waiting' and last_line(path / 'log.txt'):  # refused before it had begun
            word, reason = 'failed', last_line(path / 'log.txt')
        elif word == 'running':
            word, reason = 'died', last_line(path / 'log.txt') or 'its process is gone'

        # How far it is, and how fast.
        step, steps = count(told, 'step'), count(self._cost.value(), 'steps')
        rate, left = '', None
        added, starts_over = self._timing.read()
        self._clock = [*([] if starts_over else self._clock), *added][-2:]
        if self._clock:
            last = self._clock[-1]
            step = max(step, last['step'])
            every = last['step'] - (self._clock[-2]['step'] if len(self._clock) > 1 else 0)
            rates = {
                k.removesuffix(RATE): v
                for k, v in last.items()
                if k.endswith(RATE) and isinstance(v, NUMBER)
            }
            rate = ', '.join(f'{v:,.0f} {k}/s' for k, v in rates.items())
            if alive and steps and every > 0:
                left = (steps - last['step']) * last['seconds'] / every

        added, starts_over = self._metrics.read()
        if starts_over:
            self._measured = _Measured(self._metric)
        self._measured.add(added)
        metric = self._measured.words(is_over=word in ('done', 'stopped'))
        return State(word, step, steps, rate, left, metric, reason)


class _Measured:
    """The newest value of a metric, in words; where it has none, another one's, and that it is."""

    def __init__(self, metric: str):
        self._metric = metric
        self._wanted: list[dict[str, Any]] = []  # the newest records with the metric, of one step
        self._others: list[dict[str, Any]] = []  # those without, of one step

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            has_metric = isinstance(record.get(self._metric), NUMBER)
            newest = self._wanted if has_metric else self._others
            if newest and newest[-1]['step'] != record['step']:
                newest.clear()
            newest.append(record)

    def words(self, is_over: bool) -> str:
        """'bits_per_byte 2.1 (valid)': of the newest step and split, the mean over seeds."""
        if self._wanted:
            return _mean(self._metric, self._wanted)
        last = self._others[-1] if self._others else {}
        name = next((name for name, value in last.items() if isinstance(value, float)), '')
        if not name or not self._metric:
            return name and _mean(name, self._others)
        return f'no {self._metric}{"" if is_over else " yet"}, {_mean(name, self._others)}'


def _mean(name: str, records: Sequence[dict[str, Any]]) -> str:
    """Of the records of the last one's split."""
    split = records[-1]['split']
    values = [r[name] for r in records if r['split'] == split and isinstance(r.get(name), NUMBER)]
    return f'{name} {sum(values) / len(values):.4g} ({split})'


class _Written:
    """A JSON object that is read again where its file has changed."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        self._stamp: Stamp | None = None
        self._value: dict[str, Any] = {}

    def value(self) -> dict[str, Any]:
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            self._stamp, self._value = stamp, written(self._file)
        return self._value


class Added:
    """The records that a file of one JSON object a line gets; it need not exist.

    Args:
      file: of records.
      needs: what each record has to have; others are left out, as is half a line at the end.
      most: bytes that the first look reads, from the end.
    """

    def __init__(self, file: pathlib.Path, needs: Needs, most: int = TAIL):
        self._file, self._needs, self._most = file, needs, most
        self._stamp: Stamp | None = None
        self._end = 0  # of the last whole line that was read

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The records since the last look, and whether they replace those before.

        They do at the first look, and where the file was cut or is another one, as that of a run
        that goes on from a checkpoint.
        """
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return [], False
        before, self._stamp = self._stamp, stamp
        starts_over = (
            before is None or stamp is None or stamp.file != before.file or stamp.size < self._end
        )
        if starts_over:
            text, self._end = _tail_at(self._file, self._most)
        else:
            with open(self._file, 'rb') as stream:
                stream.seek(self._end)
                text = stream.read()
        whole = text.rfind(b'\n') + 1
        self._end += whole
        found = (_parsed(line) for line in text[:whole].split(b'\n')[:-1])
        return [record for record in found if _has(record, self._needs)], starts_over


class Stamp(NamedTuple):
    """What tells whether a file has changed."""

    file: int
    size: int
    changed: int


def _stamp(file: pathlib.Path) -> Stamp | None:
    """None where there is no file."""
    try:
        of = os.stat(file)
    except FileNotFoundError:
        return None
    return Stamp(of.st_ino, of.st_size, of.st_mtime_ns)


def of_sweep(workdir: pathlib.Path, reader: Reader | None = None) -> dict[str, State]:
    """Of the members of a sweep, in its order, by name; or of a single run.

    Args:
      workdir: of the sweep or the run.
      reader: that of the last look, if there was one.

    Raises:
      UserError: if it is neither.
    """
    metric, members = members_of(workdir)
    reader = reader or Reader(metric)
    return {path.name: reader.read(path) for path in members}


def members_of(workdir: pathlib.Path) -> tuple[str, list[pathlib.Path]]:
    """The metric and the run directories of a sweep; '' and the directory itself, of a run.

    Raises:
      UserError: if it is neither.
    """
    if (workdir / 'sweep.json').exists():
        sweep = described(workdir, {'metric': str, 'members': list})
        return sweep['metric'], [workdir / m['name'] for m in sweep['members']]
    if not (workdir / 'status.json').exists():
        raise UserError(
            f'--workdir={workdir}: no sweep.json and no status.json, so neither a sweep nor a run'
        )
    return '', [workdir]


def described(workdir: pathlib.Path, needs: Needs) -> dict[str, Any]:
    """What sweep.json says of a sweep; at least what is needed of it.

    Raises:
      UserError: if it is damaged.
    """
    file = workdir / 'sweep.json'
    sweep = read_json(file)
    lacks = [key for key, kind in needs.items() if not isinstance(sweep.get(key), kind)]
    members = sweep.get('members', [])
    if not all(_has(member, {'name': str, 'overrides': dict}) for member in members):
        lacks.append('members')
    if lacks:
        raise UserError(
            f'{file}: {lacks[0]} = {sweep.get(lacks[0])!r} is not what a launcher writes; restore '
            f'it, or name another --workdir'
        )
    return sweep


def done(path: pathlib.Path) -> bool:
    """Whether there is nothing left to run: all steps are done, or a rule has stopped it."""
    return (path / STOPPED).exists() or status(path).get('state') == 'done'


def status(path: pathlib.Path) -> dict[str, Any]:
    """What a run has written of itself last; {} if it has not yet."""
    return written(path / 'status.json')


def records(file: pathlib.Path, needs: Needs, most: int = TAIL) -> list[dict[str, Any]]:
    """The newest records of a file of one JSON object a line.

    Half a line at its end is left, and so is a line that is damaged: no run is given up for it.

    Args:
      file: it need not exist.
      needs: what each record has to have.
      most: bytes that are read, from the end.
    """
    return Added(file, needs, most).read()[0]


def append(file: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Adds a record to a file that this process alone writes; half a line at its end is cut off."""
    with open(file, 'ab') as stream:
        stream.truncate(complete_size(file))
        stream.write(json.dumps(record).encode() + b'\n')


def last_line(log: pathlib.Path) -> str:
    """The last line of a log that says something."""
    lines = _tail(log).decode(errors='replace').splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


def _tail(file: pathlib.Path, most: int = TAIL) -> bytes:
    return _tail_at(file, most)[0]


def _tail_at(file: pathlib.Path, most: int) -> tuple[bytes, int]:
    """The last lines of a file, of so many bytes at most, and where they begin."""
    try:
        with open(file, 'rb') as stream:
            size = stream.seek(0, 2)
            begin = stream.seek(max(0, size - most))
            text = stream.read()
    except FileNotFoundError:
        return b'', 0
    half = text.find(b'\n') + 1 if begin else 0
    return text[half:], begin + half


class Curve:
    """Step → the metric of a run, the mean over its seeds; all that it has.

    Args:
      path: of the run.
      metric: its name.
      split: of the records.
    """

    def __init__(self, path: pathlib.Path, metric: str, split: str):
        self._added = Added(path / 'metrics.jsonl', METRICS, most=2**62)
        self._metric, self._split = metric, split
        self._values: dict[int, list[float]] = {}

    def read(self) -> dict[int, float]:
        """As it is now; only what was added since the last look is read."""
        added, starts_over = self._added.read()
        if starts_over:
            self._values = {}
        for record in added:
            value = record.get(self._metric)
            if record['split'] == self._split and isinstance(value, NUMBER):
                self._values.setdefault(record['step'], []).append(value)
        return {step: sum(values) / len(values) for step, values in self._values.items()}


def curve(path: pathlib.Path, metric: str, split: str) -> dict[int, float]:
    """Step → the metric of a run, the mean over its seeds; all that it has."""
    return Curve(path, metric, split).read()


def written(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or no whole one, as a power failure may leave it."""
    try:
        value = _parsed(file.read_bytes())
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}


def _parsed(text: bytes) -> Any:
    """None of what is not JSON, or not text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _has(record: Any, needs: Needs) -> bool:
    return isinstance(record, dict) and all(
        isinstance(record.get(key), kind) for key, kind in needs.items()
    )


def count(record: Mapping[str, Any], key: str) -> int:
    """An integer of a record; 0 where it has none."""
    return record[key] if isinstance(record.get(key), int) else 0


REASON = 80  # characters of a reason where there is little room
# What a person who looks wants to see first.
ORDER = ('running', 'failed', 'died', 'preempted', 'queued', 'waiting', 'stopped', 'done')


def table(title: str, states: Mapping[str, State], most: int | None = None) -> rich.table.Table:
    """How many runs there are of each state, and a line for each, running and failed ones first.

    Args:
      title: what stands above it, before the counts.
      states: label → state.
      most: lines, of which long reasons are cut; None for all. The last one says what is not shown.
    """
    place = {word: i for i, word in enumerate(ORDER)}
    lines = sorted(states.items(), key=lambda item: place.get(item[1].word, len(ORDER)))
    shown = lines if most is None else lines[:most]
    heading = ', '.join([title, _counts(states.values())])
    grid = rich.table.Table(title=heading, box=None)
    for name in ('run', 'state', 'step', 'rate', 'left', 'metric', 'reason'):
        right = name in ('step', 'rate', 'left')
        grid.add_column(name, justify='right' if right else 'left', overflow='fold')
    for label, state in shown:
        texts = cells(label, state)
        if most is not None and len(state.reason) > REASON:
            texts = *texts[:-1], f'{state.reason[:REASON]}…'
        grid.add_row(*map(rich.markup.escape, texts))
    if hidden := [state for _, state in lines[len(shown) :]]:
        grid.caption = f'and {len(hidden)} more: {_counts(hidden)}'
        grid.caption_justify = 'left'
    return grid


def _counts(states: Iterable[State]) -> str:
    """'2 running, 1 failed', in the order of the table."""
    count = Counter(state.word for state in states)
    known = [word for word in ORDER if word in count]
    return ', '.join(f'{count[word]} {word}' for word in [*known, *(count.keys() - {*known})])


class Table:
    """The table of `table`, with as many lines as there is room for on the screen.

    Args:
      title: as there.
      states: as there.
    """

    def __init__(self, title: str, states: Mapping[str, State]):
        self._title, self._states = title, states

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        options = options.update(height=None)  # or every table would be filled up to it
        room = console.height

        def fits(most: int) -> bool:
            grid = table(self._title, self._states, most)
            return len(console.render_lines(grid, options, pad=False)) <= room

        low, high = 0, min(len(self._states), room)  # so many fit, and at most so many can
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        yield table(self._title, self._states, low)


def cells(label: str, state: State) -> tuple[str, ...]:
    """What the table shows of a run."""
    steps = f'{state.step}/{state.steps}' if state.steps else ''
    left = '' if state.left is None else format_duration(state.left)
    return label, state.word, steps, state.rate, left, state.metric, state.reason
