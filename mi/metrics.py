"""What a run measured: files for machines, one line for the person who waits.

metrics.jsonl   what was learnt, {"step", "seed", "split", …}: the same bits on every run
timing.jsonl    what it took here, {"step", "seconds", "tokens_per_second"}: never the same
tensorboard/    a copy of both, and another one where config.tracker says (mi.tracking)
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tensorboardX

from mi.config import UserError
from mi.files import clock, whole_lines
from mi.tracking import Tracker

Record = dict[str, Any]  # name → value


class Metrics:
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
        self._metrics = open(path / 'metrics.jsonl', 'ab')  # noqa: SIM115
        self._metrics.truncate(position)
        self._metrics.seek(0, os.SEEK_END)  # or `tell` is where the file ended before
        self._timing = open(path / 'timing.jsonl', 'ab')  # noqa: SIM115
        self._timing.truncate(whole_lines(path / 'timing.jsonl'))
        self._tensorboard = tensorboardX.SummaryWriter(
            str(path / 'tensorboard'), purge_step=step or None, write_to_disk=True
        )

    def write(self, step: int, seed: int, split: str, values: Mapping[str, Any]) -> None:
        """One record of a seed's metrics; None for a value that has no meaning here.

        What is not a number, such as how an evaluation was done, goes to the file alone.
        """
        record = {'step': step, 'seed': seed, 'split': split, **values}
        self._metrics.write(json.dumps(record).encode() + b'\n')
        self._metrics.flush()
        numbers = {n: value for n, value in values.items() if isinstance(value, int | float)}
        self._copy(step, {f'{split}/{name}/seed{seed}': value for name, value in numbers.items()})

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """One record of what the steps since the last one took."""
        self._timing.write(json.dumps({'step': step, **values}).encode() + b'\n')
        self._timing.flush()
        self._copy(step, {f'timing/{name}': value for name, value in values.items()})

    def _copy(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._tracker and values:
            self._tracker.write(step, values)

    def position(self) -> int:
        """Length of metrics.jsonl in bytes, all of it on disk: what a checkpoint remembers."""
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()
        self._tensorboard.close()
        if self._tracker:
            self._tracker.close()


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


def end_of_records(path: pathlib.Path, position: int, step: int, count: int) -> int | None:
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
                f'Lower config.optim.learning_rate or config.optim.clip_norm'
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
            left = clock(per_step * (self._total - step))
            self._console.print(f'step {step}/{self._total}  {note}  {rate}  {left} left')
            self._last_line = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Log(contextlib.AbstractContextManager['Log']):
    """The files and the line of one run; nothing at all in a process that does not write.

    Args:
      path: the run directory; None for a process that does not write.
      total: number of steps.
      done: the step that is continued from.
      position, tracker: as in `Metrics`.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        total: int,
        done: int,
        position: int,
        tracker: Tracker | None = None,
    ):
        self._files = path and Metrics(path, position, done, tracker)
        self._progress = path and Progress(total, done)

    def write(self, step: int, seed: int, split: str, values: Mapping[str, Any]) -> None:
        """As in `Metrics`."""
        if self._files:
            self._files.write(step, seed, split, values)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """As in `Metrics`."""
        if self._files:
            self._files.timing(step, values)

    def progress(self, step: int, note: str, rate: str) -> None:
        """Shows how far the run is."""
        if self._progress:
            self._progress.update(step, note, rate)

    def position(self) -> int:
        """As in `Metrics`."""
        return self._files.position() if self._files else 0

    def __exit__(self, *exception: object) -> None:
        if self._files and self._progress:
            self._progress.close()
            self._files.close()
