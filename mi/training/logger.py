"""The logger of a run: metric files, TensorBoard, a tracker, and a progress line.

metrics.jsonl   results, {"step", "seed", "split", …}; bit-identical in every run
timing.jsonl    speed, {"step", "seconds", "tokens_per_second"}; different in every run
tensorboard/    a copy of both; config.tracker adds another copy (mi.training.trackers)
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

import chex
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

Metrics = Mapping[str, object]  # name → number, text, or None where it is undefined
Record = dict[str, Any]  # name → value
RecordKey = tuple[int | str, ...]  # (step, seed, split), or (step,) for timing

ADVICE = 'Try a lower config.optim.learning_rate or config.optim.clip_norm'


class MetricsWriter:
    """A writer for the metrics of one run.

    Args:
      path: run directory.
      position: number of bytes of metrics.jsonl to keep. Later records were written by a killed run
        after its last checkpoint. They are removed, because the resumed run writes them again.
      step: step of the checkpoint.
      tracker: tracker that receives a copy of the metrics. It is closed with the files.

    Raises:
      UserError: if no line of metrics.jsonl ends at `position`. The file is not changed.
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
        # Records that the tracker received before the run was killed.
        self._tracked = collections.Counter[RecordKey]()
        if tracker and tracker.continued:
            self._tracked = _count_records_since(path, position, step)
        # Open the files; an error closes those that are open.
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(open(path / 'metrics.jsonl', 'ab'))
            self._metrics.truncate(position)
            self._metrics.seek(0, os.SEEK_END)  # truncate does not move `tell`
            self._timing = stack.enter_context(open(path / 'timing.jsonl', 'ab'))
            self._timing.truncate(complete_size(path / 'timing.jsonl'))
            # Repeat the step of the checkpoint: part of it may have come after the checkpoint.
            self._tensorboard = TensorBoard(path / 'tensorboard', step if position else 0)
            stack.callback(self._tensorboard.close)
            for record in read_records(path / 'metrics.jsonl', 0, position):
                if record['step'] == step:
                    self._tensorboard.write(step, _name_scalars(record))
            for record in read_records(path / 'timing.jsonl'):
                if record.pop('step') == step and position:
                    self._tensorboard.write(step, _name_timings(record))
            if tracker:
                stack.callback(tracker.close)
            self._files = stack.pop_all()

    def write(self, step: int, seed: int, split: str, metrics: Metrics) -> None:
        """Write one record of a seed's metrics, with None for undefined values.

        Values other than numbers, such as the protocol of an evaluation, are only written to
        metrics.jsonl.
        """
        record = {'step': step, 'seed': seed, 'split': split, **metrics}
        self._metrics.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._metrics.flush()
        self._copy(step, _name_scalars(record), (step, seed, split))

    def write_timing(self, step: int, timings: Mapping[str, float]) -> None:
        """Write one record of the time taken by the steps since the last record."""
        record = {'step': step, **timings}
        self._timing.write(json.dumps(record, allow_nan=False).encode() + b'\n')
        self._timing.flush()
        self._copy(step, _name_timings(timings), (step,))

    def _copy(self, step: int, scalars: dict[str, float], record_key: RecordKey) -> None:
        self._tensorboard.write(step, scalars)
        if self._tracked[record_key] > 0:
            self._tracked[record_key] -= 1
        elif self._tracker and scalars:
            self._tracker.write(step, scalars)

    def position(self) -> int:
        """Flush metrics.jsonl to disk, and return its size in bytes for a checkpoint."""
        os.fsync(self._metrics.fileno())
        self._tensorboard.flush()
        return self._metrics.tell()

    def close(self) -> None:
        self._files.close()


class TensorBoard:
    """A synchronous writer of TensorBoard scalars.

    The SummaryWriter of tensorboardX writes in a separate thread. A checkpoint cannot wait for that
    thread, and the thread cannot report a full disk.

    Args:
      path: directory of the event files, to which the writer adds one.
      first: first step to write. TensorBoard hides the events of earlier files from this step on.
    """

    def __init__(self, path: pathlib.Path, first: int):
        path.mkdir(exist_ok=True)
        has_events = any(path.iterdir())
        suffix = f'.{time.time_ns()}'  # unique and ordered, even within one second
        self._events = EventsWriter(str(path / 'events'), suffix)
        if has_events:
            session_start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(self._event(first, session_log=session_start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        for scalar_name, scalar in scalars.items():
            summary = tensorboardX.summary.scalar(scalar_name, scalar)
            self._events.write_event(self._event(step, summary=summary))

    def flush(self) -> None:
        """Wait until all events are on disk."""
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _event(self, step: int, **content: Any) -> event_pb2.Event:
        return event_pb2.Event(wall_time=time.time(), step=step, **content)


def _count_records_since(
    path: pathlib.Path, position: int, step: int
) -> collections.Counter[RecordKey]:
    """Count the records after a checkpoint, which the tracker has already received."""
    record_counts = collections.Counter[RecordKey]()
    for record in read_records(path / 'metrics.jsonl', position):
        record_counts[record['step'], record['seed'], record['split']] += 1
    for record in read_records(path / 'timing.jsonl'):
        if record['step'] > step or position == 0:
            record_counts[record['step'],] = 1
    return record_counts


def read_records(file: pathlib.Path, start: int = 0, end: int | None = None) -> list[Record]:
    """Return the records of the complete lines between two positions of a file."""
    records = []
    contents = file.read_bytes() if file.exists() else b''
    for line in contents[start : complete_size(file) if end is None else end].splitlines():
        with contextlib.suppress(ValueError):  # the report names broken lines
            records.append(json.loads(line))
    return records


def _name_scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a record by their names in TensorBoard and trackers."""
    split, seed = record['split'], record['seed']
    return {
        f'{split}/{metric_name}/seed{seed}': metric_value
        for metric_name, metric_value in record.items()
        if metric_name not in ('step', 'seed', 'split') and isinstance(metric_value, int | float)
    }


def _name_timings(timings: Mapping[str, float]) -> dict[str, float]:
    return {f'timing/{timing_name}': seconds for timing_name, seconds in timings.items()}


def _refuse_cut(file: pathlib.Path, position: int) -> None:
    """Raise UserError if a file is truncated, because `truncate` would pad it with zeros."""
    if position == 0:
        return
    file_size = file.stat().st_size if file.exists() else 0
    advice = 'Restore it, or use another --workdir'
    if file_size < position:
        raise UserError(
            f'{file}: expected at least {position} bytes, because the checkpoint continues there, '
            f'but found {file_size}. {advice}'
        )
    with open(file, 'rb') as stream:
        stream.seek(position - 1)
        if stream.read(1) != b'\n':
            raise UserError(
                f'{file}: expected a line that ends at byte {position}, because the checkpoint '
                f'continues there. {advice}'
            )


def find_records_end(path: pathlib.Path, position: int, step: int, num_records: int) -> int | None:
    """Find the end of the evaluation records that follow a checkpoint in metrics.jsonl.

    Args:
      path: run directory.
      position: position of the checkpoint in metrics.jsonl, in bytes.
      step: step of the records.
      num_records: number of records of a complete evaluation.

    Returns:
      The end of the records in bytes, or None if a record is missing or truncated.
    """
    if num_records == 0:
        return position
    file = path / 'metrics.jsonl'
    if not file.exists():
        return None
    with open(file, 'rb') as stream:
        stream.seek(position)
        for _ in range(num_records):
            line = stream.readline()
            if not line.endswith(b'\n') or json.loads(line)['step'] != step:
                return None
        return stream.tell()


def refuse_non_finite(seeds: Sequence[int], step: int, measured: dict[str, np.ndarray]) -> None:
    """Raise an error for non-finite metrics, before a checkpoint is saved.

    Args:
      seeds: the S seeds.
      step: number of steps or updates.
      measured: name of each metric → its values [S].

    Raises:
      UserError: if a metric is not finite.
    """
    for metric_name, values_by_seed in measured.items():
        if not np.isfinite(values_by_seed).all():
            bad_seed = seeds[int(np.argmin(np.isfinite(values_by_seed)))]
            raise UserError(
                f'{metric_name} of seed {bad_seed} is not finite at step {step}, so this state '
                f'is not saved. {ADVICE}'
            )


def refuse_broken_state(
    seeds: Sequence[int], step: int, parts: Mapping[str, chex.ArrayTree]
) -> None:
    """Raise an error for a state from which training cannot continue, before it is saved.

    All entries must be finite, and so must the squares of the 'parameters'.

    Args:
      seeds: seeds along the leading axis of every array. The axis may be sharded, and padded with
        repeated seeds in the same order.
      step: number of steps that the state has completed.
      parts: name of each part of the state → tree of arrays.

    Raises:
      UserError: if an entry is not finite or too large.
    """
    # Check the shards of this process, seed by seed.
    is_sound = np.ones((len(parts), len(seeds)), bool)
    for part_is_sound, (part_name, tree) in zip(is_sound, parts.items(), strict=True):
        limit = math.sqrt(np.finfo(np.float32).max) if part_name == 'parameters' else math.inf
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                for shard in leaf.addressable_shards:
                    seed_rows = np.arange(leaf.shape[0] if leaf.ndim else 1)
                    seed_indices = seed_rows[shard.index[:1]] % len(seeds)
                    magnitudes = np.abs(np.asarray(shard.data)).reshape(len(seed_indices), -1)
                    is_bounded = (magnitudes < limit).all(1)  # False for NaN
                    np.logical_and.at(part_is_sound, seed_indices, is_bounded)

    # Agree on it with the other processes, and name the first part and seed.
    for part_name, is_broken in zip(parts, sharding.any_process(~is_sound), strict=True):
        if is_broken.any():
            bad_seed = seeds[int(is_broken.argmax())]
            suffix = ', or its square,' if part_name == 'parameters' else ''
            raise UserError(
                f'an entry of the {part_name}{suffix} of seed {bad_seed} is not finite at step '
                f'{step}, so this state is not saved. {ADVICE}'
            )


class Progress:
    """A progress report on stderr: a bar in a terminal, or plain lines elsewhere.

    A line shows the step, a note, the rate and the time left.

    Args:
      total: number of steps.
      done: number of steps completed before the run was resumed.
      interval: minimum time between plain lines, in seconds.
    """

    def __init__(self, total: int, done: int = 0, interval: float = 15.0):
        self._total, self._first, self._interval = total, done, interval
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
        """Update the bar, or print a line once per interval and at the last step."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note, rate=rate)
            return
        now = time.monotonic()
        if now - self._last_line >= self._interval or step == self._total:
            per_step = (now - self._start) / max(1, step - self._first)
            time_left = format_duration(per_step * (self._total - step))
            self._console.print(f'step {step}/{self._total}  {note}  {rate}  {time_left} left')
            self._last_line = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class RunLogger(contextlib.AbstractContextManager['RunLogger']):
    """A logger of one run, which combines `MetricsWriter` and `Progress`.

    If `path` is None, nothing is written, and `write` only checks that values are finite.

    Args:
      path: run directory, or None in a process that does not write.
      total: number of steps.
      done: step of the checkpoint that the run resumes from, or 0 for a new run.
      position: see `MetricsWriter`.
      tracker: see `MetricsWriter`.
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

    def write(self, step: int, seed: int, split: str, metrics: Metrics) -> None:
        """Write a record of a seed's metrics, see `MetricsWriter.write`.

        Raises:
          UserError: if a value is not finite, which should end the run.
        """
        for metric_name, metric_value in metrics.items():
            if isinstance(metric_value, float) and not math.isfinite(metric_value):
                measured = {f'{metric_name} ({split})': np.asarray([metric_value])}
                refuse_non_finite([seed], step, measured)
        if self._files:
            self._files.write(step, seed, split, metrics)

    def write_timing(self, step: int, timings: Mapping[str, float]) -> None:
        """Write a record of the time taken by steps, see `MetricsWriter.write_timing`."""
        if self._files:
            self._files.write_timing(step, timings)

    def show_progress(self, step: int, note: str, rate: str) -> None:
        """Show the progress of the run."""
        if self._progress:
            self._progress.update(step, note, rate)

    def position(self) -> int:
        """Flush metrics.jsonl and return its size in bytes, or 0 if this process does not write."""
        return self._files.position() if self._files else 0

    def __exit__(self, *exception: object) -> None:
        if self._files and self._progress:
            self._progress.close()
            self._files.close()
