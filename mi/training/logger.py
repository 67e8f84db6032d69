"""What a run measured: files for machines, one line for the person who waits.

metrics.jsonl   what was learnt, {"step", "seed", "split", …}: the same bits on every run
timing.jsonl    what it took here, {"step", "seconds", "tokens_per_second"}: never the same
tensorboard/    a copy of both, and another one where config.tracker says (mi.training.trackers)
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import tensorboardX
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from mi.config import UserError
from mi.training import sharding
from mi.training.io import complete_size, format_duration
from mi.training.trackers import Tracker

Record = dict[str, Any]  # name → value

LOWER = 'Lower config.optim.learning_rate or config.optim.clip_norm'


class MetricsWriter:
    """Writes the metrics of one run.

    Args:
      path: the run directory.
      position: length in bytes at which metrics.jsonl is continued; what a killed run wrote after
        its last checkpoint is cut off, because the continued run writes it again.
      step: the step that is continued from.
      tracker: what gets a copy beside TensorBoard; closed with the files.

    Raises:
      UserError: if metrics.jsonl has no line that ends at `position`. It is left as it is.
    """

    def __init__(
        self,
        path: pathlib.Path,
        position: int = 0,
        step: int = 0,
        tracker: Tracker | None = None,
    ):
        self._tracker = tracker
        _refuse_cut(path / 'metrics.jsonl', position)
        self._told = collections.Counter[tuple[Any, ...]]()
        if tracker and tracker.continued:
            self._told = _written_since(path, position, step)
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(open(path / 'metrics.jsonl', 'ab'))
            self._metrics.truncate(position)
            self._metrics.seek(0, os.SEEK_END)  # or `tell` is where the file ended before
            self._timing = stack.enter_context(open(path / 'timing.jsonl', 'ab'))
            self._timing.truncate(complete_size(path / 'timing.jsonl'))
            # The step itself is shown anew, as part of it may come after the checkpoint.
            self._tensorboard = TensorBoard(path / 'tensorboard', step if position else 0)
            stack.callback(self._tensorboard.close)
            for record in _records(path / 'metrics.jsonl', 0, position):
                if record['step'] == step:
                    self._tensorboard.write(step, _scalars(record))
            for record in _records(path / 'timing.jsonl'):
                if record.pop('step') == step and position:
                    self._tensorboard.write(step, _timings(record))
            if tracker:
                stack.callback(tracker.close)
            self._files = stack.pop_all()

    def write(self, step: int, seed: int, split: str, values: Mapping[str, Any]) -> None:
        """One record of a seed's metrics; None for a value that has no meaning here.

        What is not a number, such as how an evaluation was done, goes to the file alone.
        """
        record = {'step': step, 'seed': seed, 'split': split, **values}
        self._metrics.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._metrics.flush()
        self._copy(step, _scalars(record), (step, seed, split))

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """One record of what the steps since the last one took."""
        record = {'step': step, **values}
        self._timing.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._timing.flush()
        self._copy(step, _timings(values), (step,))

    def _copy(self, step: int, values: dict[str, float], record: tuple[Any, ...]) -> None:
        self._tensorboard.write(step, values)
        if self._told[record] > 0:  # before the run was killed
            self._told[record] -= 1
        elif self._tracker and values:
            self._tracker.write(step, values)

    def position(self) -> int:
        """Length of metrics.jsonl in bytes, all of it on disk: what a checkpoint remembers."""
        os.fsync(self._metrics.fileno())
        self._tensorboard.flush()
        return self._metrics.tell()

    def close(self) -> None:
        self._files.close()


class TensorBoard:
    """Scalars for TensorBoard, written by the caller's thread.

    tensorboardX's own SummaryWriter hands them to a thread, which can neither be waited for when a
    checkpoint is saved nor say that the disk is full.

    Args:
      path: the directory of the event files; one more is made.
      first: the first step that is written; what earlier files have from there on is hidden.
    """

    def __init__(self, path: pathlib.Path, first: int):
        path.mkdir(exist_ok=True)
        again = any(path.iterdir())
        suffix = f'.{time.time_ns()}'  # two within a second have names of their own, in order
        self._events = EventsWriter(str(path / 'events'), suffix)
        if again:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(self._event(first, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step."""
        for name, value in values.items():
            summary = tensorboardX.summary.scalar(name, value)
            self._events.write_event(self._event(step, summary=summary))

    def flush(self) -> None:
        """Return when all is on disk."""
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _event(self, step: int, **content: Any) -> Any:
        return event_pb2.Event(wall_time=time.time(), step=step, **content)


def _written_since(
    path: pathlib.Path, position: int, step: int
) -> collections.Counter[tuple[Any, ...]]:
    """Which records the files have beyond a checkpoint: a tracker was told them already."""
    told = collections.Counter[tuple[Any, ...]]()
    for record in _records(path / 'metrics.jsonl', position):
        told[record['step'], record['seed'], record['split']] += 1
    for record in _records(path / 'timing.jsonl'):
        if record['step'] > step or position == 0:
            told[record['step'],] = 1
    return told


def _records(file: pathlib.Path, start: int = 0, end: int | None = None) -> list[Record]:
    """The records of the whole lines between two positions of a file."""
    records = []
    content = file.read_bytes() if file.exists() else b''
    for line in content[start : complete_size(file) if end is None else end].splitlines():
        with contextlib.suppress(ValueError):  # whoever reads the file will say what is wrong
            records.append(json.loads(line))
    return records


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record, by the names that they have outside of the file."""
    split, seed = record['split'], record['seed']
    return {
        f'{split}/{name}/seed{seed}': value
        for name, value in record.items()
        if name not in ('step', 'seed', 'split') and isinstance(value, int | float)
    }


def _timings(values: Mapping[str, float]) -> dict[str, float]:
    return {f'timing/{name}': value for name, value in values.items()}


def _refuse_cut(file: pathlib.Path, position: int) -> None:
    """Refuses a file that was cut: `truncate` would fill it up with zeros to the position."""
    if position == 0:
        return
    size = file.stat().st_size if file.exists() else 0
    mend = 'restore it, or name another --workdir'
    if size < position:
        raise UserError(f'{file} has {size} bytes and the checkpoint needs {position}; {mend}')
    with open(file, 'rb') as stream:
        stream.seek(position - 1)
        if stream.read(1) != b'\n':
            raise UserError(
                f'{file} has no line that ends at byte {position}, where the checkpoint goes on; '
                f'{mend}'
            )


def find_records_end(path: pathlib.Path, position: int, step: int, count: int) -> int | None:
    """Return where the `count` records of a step end that begin at a position of metrics.jsonl.

    Where an evaluation comes after the checkpoint of its step, this says whether it was finished.

    Args:
      path: the run directory.
      position: in bytes; that of the checkpoint.
      step: of the records.
      count: how many there are to be.

    Returns:
      None if one of them is missing or cut.
    """
    if count == 0:
        return position
    file = path / 'metrics.jsonl'
    if not file.exists():
        return None
    with open(file, 'rb') as stream:
        stream.seek(position)
        for _ in range(count):
            line = stream.readline()
            if not line.endswith(b'\n') or json.loads(line)['step'] != step:
                return None
        return stream.tell()


def refuse_non_finite(seeds: Sequence[int], step: int, measured: dict[str, np.ndarray]) -> None:
    """Ends a run that has gone wrong, before anything of it is saved.

    Args:
      seeds: those of the leading axis.
      step: number of steps or updates.
      measured: name → [S].
    """
    for name, value in measured.items():
        if not np.isfinite(value).all():
            seed = seeds[int(np.argmin(np.isfinite(value)))]
            raise UserError(
                f'{name} of seed {seed} is not finite by step {step}; nothing of that is saved. '
                f'{LOWER}'
            )


def refuse_broken_state(seeds: Sequence[int], step: int, parts: Mapping[str, Any]) -> None:
    """Refuse a state that no training can go on from, before it is saved.

    All numbers have to be finite, and those of 'parameters' small enough for their squares to be.

    Args:
      seeds: those of the leading axis of every array, which may be split, and padded with repeats
        in their order.
      step: the one that the state comes after.
      parts: name → tree of arrays.

    Raises:
      UserError: which part, of which seed.
    """
    for name, tree in parts.items():
        limit = math.sqrt(np.finfo(np.float32).max) if name == 'parameters' else math.inf
        sound = np.ones(len(seeds), bool)
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                for shard in leaf.addressable_shards:
                    numbers = np.arange(leaf.shape[0] if leaf.ndim else 1)
                    places = numbers[shard.index[:1]] % len(seeds)
                    size = np.abs(np.asarray(shard.data)).reshape(len(places), -1)
                    np.logical_and.at(sound, places, (size < limit).all(1))  # NaN is not
        broken = [sharding.any_process(not each) for each in sound]
        if any(broken):
            what = f'an entry of the {name}' + (', or its square,' if name == 'parameters' else '')
            raise UserError(
                f'{what} of seed {seeds[broken.index(True)]} is not finite by step {step}; nothing '
                f'of that is saved. {LOWER}'
            )


class Progress:
    """One line with step, rate, time left and the last loss; plain lines where no terminal is.

    Args:
      total: number of steps.
      done: steps done before.
      every: seconds between two plain lines.
    """

    def __init__(self, total: int, done: int = 0, every: float = 15.0):
        self._total, self._first, self._every = total, done, every
        self._console = rich.console.Console(stderr=True)
        self._start = self._last_line = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn('{task.fields[note]}'),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn('{task.fields[rate]}'),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task('', total=total, completed=done, note='', rate='')
            self._bar.start()

    def update(self, step: int, note: str, rate: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note, rate=rate)
            return
        now = time.monotonic()
        if now - self._last_line >= self._every or step == self._total:
            per_step = (now - self._start) / max(1, step - self._first)
            left = format_duration(per_step * (self._total - step))
            self._console.print(f'step {step}/{self._total}  {note}  {rate}  {left} left')
            self._last_line = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class RunLogger(contextlib.AbstractContextManager['RunLogger']):
    """The files and the line of one run; nothing at all in a process that does not write.

    Args:
      path: the run directory; None for a process that does not write.
      total: number of steps.
      done: the step that is continued from.
      position, tracker: as in `MetricsWriter`.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        total: int,
        done: int,
        position: int,
        tracker: Tracker | None = None,
    ):
        self._files = path and MetricsWriter(path, position, done, tracker)
        self._progress = path and Progress(total, done)

    def write(self, step: int, seed: int, split: str, values: Mapping[str, Any]) -> None:
        """Write a record as `MetricsWriter` does; a value that is not finite ends the run."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                refuse_non_finite([seed], step, {f'{name} ({split})': np.asarray([value])})
        if self._files:
            self._files.write(step, seed, split, values)

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """As in `MetricsWriter`."""
        if self._files:
            self._files.write_timing(step, values)

    def show_progress(self, step: int, note: str, rate: str) -> None:
        """Shows how far the run is."""
        if self._progress:
            self._progress.update(step, note, rate)

    def position(self) -> int:
        """As in `MetricsWriter`."""
        return self._files.position() if self._files else 0

    def __exit__(self, *exception: object) -> None:
        if self._files and self._progress:
            self._progress.close()
            self._files.close()
