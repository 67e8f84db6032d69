"""Readers for JSONL files, to which runs and launchers append records."""

import collections
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mi.training.io import complete_size
from mi.training.run_metric import MetricAppender
from mi.training.run_state import read_object

TAIL = 2**16  # bytes at the end of a file that are read the first time
WHOLE_FILE = 2**62  # as a tail: everything

Record = dict[str, Any]
Fields = Mapping[str, type | tuple[type, ...]]  # key → type of the values that a record must have
NUMBER = (int, float)
TIMING: Fields = {'step': int, 'seconds': NUMBER}  # fields of timing.jsonl
METRICS: Fields = {'step': int, 'split': str}  # fields of metrics.jsonl


class RecordReader:
    """A reader that returns the records added to a file since its last call.

    Args:
      file: the file, which need not exist.
      fields: required fields of a record. Records without them, damaged lines and an unfinished
        last line are skipped.
      tail: number of bytes at the end of the file that the first call reads.
    """

    def __init__(self, file: pathlib.Path, fields: Fields, tail: int = TAIL):
        self._file, self._fields, self._tail = file, fields, tail
        self._stamp: FileStamp | None = None
        self._end = 0  # offset after the last complete line that was read

    def read(self) -> tuple[list[Record], bool]:
        """Return the new records, and whether they replace all earlier ones.

        This is the case at the first call, and if the file was truncated or replaced, for example
        because a run resumed from a checkpoint.
        """
        stamp = read_stamp(self._file)
        if stamp == self._stamp:
            return [], False
        last_stamp, self._stamp = self._stamp, stamp
        is_replaced = (
            last_stamp is None
            or stamp is None
            or stamp.inode != last_stamp.inode
            or stamp.size < self._end
        )
        if is_replaced:
            content, self._end = _read_tail(self._file, self._tail)
        else:
            with open(self._file, 'rb') as stream:
                stream.seek(self._end)
                content = stream.read()
        length = content.rfind(b'\n') + 1
        self._end += length
        parsed = (_parse(line) for line in content[:length].split(b'\n')[:-1])
        return [record for record in parsed if has_fields(record, self._fields)], is_replaced


class CurveReader:
    """A reader for the learning curve of a run, step → metric averaged over seeds.

    The average is NaN if the metric of a seed is not finite. The newest step is left out until all
    seeds have their records, which a run writes one by one.

    Args:
      run_dir: the run directory.
      metric: name of the metric, or 'package.module:function'.
      split: split whose records are read.
    """

    def __init__(self, run_dir: pathlib.Path, metric: str, split: str):
        self._run_dir = run_dir
        self._records = RecordReader(run_dir / 'metrics.jsonl', METRICS, tail=WHOLE_FILE)
        self._metric, self._split = metric, split
        self._appender = MetricAppender(metric, {split})
        self._num_seeds = 0  # unknown
        self._num_records: collections.Counter[int] = collections.Counter()  # by step
        self._values: dict[int, list[float]] = {}

    def read(self) -> dict[int, float]:
        """Return the curve so far, reading only what was added since the last call."""
        new_records, is_replaced = self._records.read()
        if is_replaced:
            self._num_records, self._values = collections.Counter(), {}
            self._appender.clear()
        for record in self._appender.append(new_records):
            if record['split'] != self._split:
                continue
            self._num_records[record['step']] += 1
            value = record.get(self._metric, '')
            if value is None or isinstance(value, NUMBER):
                values = self._values.setdefault(record['step'], [])
                values.append(math.nan if value is None else value)

        # The newest step may lack seeds.
        complete = dict(self._values)
        newest = max(self._num_records, default=0)
        if self._num_records[newest] < self._count_seeds():
            complete.pop(newest, None)
        return {step: sum(values) / len(values) for step, values in complete.items()}

    def _count_seeds(self) -> int:
        """Return the number of seeds of the run, or 0 while it is unknown."""
        if not self._num_seeds:
            seeds = read_object(self._run_dir / 'config.json').get('seeds')
            self._num_seeds = len(seeds) if isinstance(seeds, list) else 0
        return self._num_seeds


class FileStamp(NamedTuple):
    """Properties of a file that change when the file does."""

    inode: int
    size: int
    modified_ns: int


def read_stamp(file: pathlib.Path) -> FileStamp | None:
    """Return the stamp of a file, or None if the file does not exist."""
    try:
        stat = os.stat(file)
    except FileNotFoundError:
        return None
    return FileStamp(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def read_records(file: pathlib.Path, fields: Fields, tail: int = TAIL) -> list[Record]:
    """Return the records in the last `tail` bytes of a file. For `fields`, see `RecordReader`."""
    return RecordReader(file, fields, tail).read()[0]


def read_curve(run_dir: pathlib.Path, metric: str, split: str) -> dict[int, float]:
    """Return the learning curve of a run, like `CurveReader.read`."""
    return CurveReader(run_dir, metric, split).read()


def append_record(file: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file that only this process writes, after any unfinished line is cut."""
    with open(file, 'ab') as stream:
        stream.truncate(complete_size(file))
        stream.write(json.dumps(record).encode() + b'\n')


def has_fields(record: Any, fields: Fields) -> bool:
    """Return whether a JSON value is an object with these fields."""
    return isinstance(record, dict) and all(
        isinstance(record.get(field_name), kind) for field_name, kind in fields.items()
    )


def get_int(record: Mapping[str, Any], field_name: str) -> int:
    """Return an integer field of a record, or 0 if it is missing."""
    return record[field_name] if isinstance(record.get(field_name), int) else 0


def _read_tail(file: pathlib.Path, max_bytes: int) -> tuple[bytes, int]:
    """Return the lines within the last `max_bytes` bytes, and the offset where they begin."""
    try:
        with open(file, 'rb') as stream:
            file_size = stream.seek(0, 2)
            offset = stream.seek(max(0, file_size - max_bytes))
            content = stream.read()
    except FileNotFoundError:
        return b'', 0
    first_line = content.find(b'\n') + 1 if offset else 0
    return content[first_line:], offset + first_line


def _parse(json_line: bytes) -> Any:
    """Return the value of a line of JSON, or None if it is damaged."""
    try:
        return json.loads(json_line)
    except ValueError:  # also raised for bytes that are not UTF-8
        return None
