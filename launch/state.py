"""What a run directory says of its run, read from outside while it goes on or after it.

waiting     nothing was started yet           done        all steps
running     somebody holds its lock           preempted   stopped and saved: goes on if started
died        it said it was running, and       failed      with a reason
            nobody holds its lock             stopped     by a rule of the sweep, for good
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import rich.markup
import rich.table

from mi.config import UserError
from mi.files import clock, held, read_json, whole_lines

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
      metric: whose newest value is wanted. Where it has none yet, the first number of the newest
        record is shown.
    """
    told = status(path)
    word = str(told.get('state', 'waiting'))
    reason = str(told.get('reason') or '')
    alive = held(path / 'lock') or held(path / 'launched')
    if alive:
        word, reason = 'running', ''
    elif (path / STOPPED).exists():
        word, reason = 'stopped', str(written(path / STOPPED).get('reason', ''))
    elif word == 'waiting' and last_line(path / 'log.txt'):  # refused before it had begun
        word, reason = 'failed', last_line(path / 'log.txt')
    elif word == 'running':
        word, reason = 'died', last_line(path / 'log.txt') or 'its process is gone'
    step, steps = _count(told, 'step'), _count(written(path / 'cost.json'), 'steps')
    rate, left = '', None
    timing = records(path / 'timing.jsonl', TIMING)
    if timing:
        last = timing[-1]
        step = max(step, last['step'])
        every = last['step'] - (timing[-2]['step'] if len(timing) > 1 else 0)
        rates = {
            k.removesuffix(RATE): v
            for k, v in last.items()
            if k.endswith(RATE) and isinstance(v, NUMBER)
        }
        rate = ', '.join(f'{v:,.0f} {k}/s' for k, v in rates.items())
        if alive and steps and every > 0:
            left = (steps - last['step']) * last['seconds'] / every
    return State(word, step, steps, rate, left, _newest(path / 'metrics.jsonl', metric), reason)


def of_sweep(workdir: pathlib.Path) -> dict[str, State]:
    """Of the members of a sweep, in its order, by name; or of a single run.

    Raises:
      UserError: if it is neither.
    """
    if (workdir / 'sweep.json').exists():
        sweep = described(workdir, {'metric': str, 'members': list})
        return {m['name']: read(workdir / m['name'], sweep['metric']) for m in sweep['members']}
    if not (workdir / 'status.json').exists():
        raise UserError(
            f'--workdir={workdir}: no sweep.json and no status.json, so neither a sweep nor a run'
        )
    return {workdir.name: read(workdir)}


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
    found = (_parsed(line) for line in _tail(file, most).split(b'\n')[:-1])
    return [record for record in found if _has(record, needs)]


def append(file: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Adds a record to a file that this process alone writes; half a line at its end is cut off."""
    with open(file, 'ab') as stream:
        stream.truncate(whole_lines(file))
        stream.write(json.dumps(record).encode() + b'\n')


def last_line(log: pathlib.Path) -> str:
    """The last line of a log that says something."""
    lines = _tail(log).decode(errors='replace').splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), '')


def _tail(file: pathlib.Path, most: int = TAIL) -> bytes:
    try:
        with open(file, 'rb') as stream:
            stream.seek(0, 2)
            size = stream.tell()
            stream.seek(max(0, size - most))
            text = stream.read()
    except FileNotFoundError:
        return b''
    return text.partition(b'\n')[2] if size > most else text


def curve(path: pathlib.Path, metric: str, split: str) -> dict[int, float]:
    """Step → the metric of a run, the mean over its seeds; all that it has."""
    found: dict[int, list[float]] = {}
    for record in records(path / 'metrics.jsonl', METRICS, most=2**62):
        if record['split'] == split and isinstance(record.get(metric), NUMBER):
            found.setdefault(record['step'], []).append(record[metric])
    return {step: sum(values) / len(values) for step, values in found.items()}


def _newest(file: pathlib.Path, metric: str) -> str:
    """'bits_per_byte 2.1 (valid)': of the newest step and split, the mean over seeds."""
    found = records(file, METRICS)
    have = [r for r in found if isinstance(r.get(metric), NUMBER)]
    if not have:
        have = found
        numbers = [k for k, v in found[-1].items() if isinstance(v, float)] if found else []
        if not numbers:
            return ''
        metric = numbers[0]
    last = have[-1]
    values = [
        r[metric]
        for r in have
        if (r['step'], r['split']) == (last['step'], last['split'])
        and isinstance(r.get(metric), NUMBER)
    ]
    return f'{metric} {sum(values) / len(values):.4g} ({last["split"]})' if values else ''


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


def _count(record: Mapping[str, Any], key: str) -> int:
    return record[key] if isinstance(record.get(key), int) else 0


def table(title: str, states: Mapping[str, State], notes: Sequence[str] = ()) -> rich.table.Table:
    """A line for each run, by its label, and how many there are of each kind."""
    count: dict[str, int] = {}
    for state in states.values():
        count[state.word] = count.get(state.word, 0) + 1
    summary = ', '.join(f'{number} {word}' for word, number in count.items())
    shown = rich.table.Table(title=', '.join([title, summary, *notes]), box=None)
    for heading in ('run', 'state', 'step', 'rate', 'left', 'metric', 'reason'):
        right = heading in ('step', 'rate', 'left')
        shown.add_column(heading, justify='right' if right else 'left', overflow='fold')
    for label, state in states.items():
        shown.add_row(*(rich.markup.escape(cell) for cell in cells(label, state)))
    return shown


def cells(label: str, state: State) -> tuple[str, ...]:
    """What the table shows of a run."""
    steps = f'{state.step}/{state.steps}' if state.steps else ''
    left = '' if state.left is None else clock(state.left)
    return label, state.word, steps, state.rate, left, state.metric, state.reason
