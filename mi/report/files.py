"""The files of a run directory as the report reads them, and where it writes its own."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from mi.config import UserError

Record = dict[str, Any]


def read_lines(path: pathlib.Path, done: bool, warnings: list[str]) -> dict[int, Record]:
    """{line number: record}. What follows the last newline is a record that was being written."""
    if not path.exists():
        return {}
    *lines, rest = path.read_bytes().split(b'\n')
    records = {n: _record(line, path, n) for n, line in enumerate(lines, 1) if line.strip()}
    if rest.strip():
        try:
            records[len(lines) + 1] = _record(rest, path, len(lines) + 1)
        except UserError:
            if done:
                raise
            warnings.append(f'{path}, line {len(lines) + 1}: skipped, it is half written')
    return records


def _record(line: bytes, path: pathlib.Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError:  # also of bytes that are not text
        record = None
    if not isinstance(record, dict):
        raise UserError(f'{path}, line {number}: not a JSON object')
    return record


def field(record: Mapping[str, Any], key: str, kind: type, path: pathlib.Path) -> Any:
    """A value of a record that has to be there, of this type."""
    if not isinstance(record.get(key), kind):
        raise UserError(f'{path}: {key} = {record.get(key)!r}: expected a {kind.__name__}')
    return record[key]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextlib.contextmanager
def written_to(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder, and says in a line where it cannot be made or written to.

    Raises:
      UserError: then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f'--out={folder}: {error.strerror}; name another directory') from error
