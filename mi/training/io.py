"""Files of runs and launchers: atomic JSON, tolerant readers, errors of a full disk."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from mi.config import UserError, format_error

# Errors of the file system that a user can fix: full, over quota, too large, broken, read-only.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def write_json(path: pathlib.Path, contents: object) -> None:
    """Write a JSON file atomically: a reader never sees a half-written file.

    Raises:
      UserError: if a number is not finite, which JSON cannot represent.
    """
    try:
        encoded = json.dumps(contents, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(f'{path}: {format_error(error)}; nothing is written') from error
    with replace_file(path) as temporary:
        temporary.write_text(encoded + '\n')


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path that replaces a file at the end, or is removed after an error."""
    temporary_path = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield temporary_path
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)


def overwrite(path: pathlib.Path, contents: bytes) -> None:
    """Overwrite a file in the blocks that it has, which works on a full disk as well.

    Raises:
      OSError: if that fails too.
    """
    with open(path, 'r+b') as stream:
        stream.write(contents)
        stream.truncate()


def read_json(path: pathlib.Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object of a file, or `missing`, unless None, if the file does not exist.

    Raises:
      UserError: if the file holds anything but a JSON object.
    """
    if missing is not None and not path.exists():
        return missing
    try:
        contents = json.loads(path.read_bytes())
    except ValueError as error:  # also for bytes that are not text
        raise UserError(
            f'{path} is not JSON ({error}). Restore it, or use another --workdir'
        ) from error
    if not isinstance(contents, dict):
        raise UserError(
            f'{path}: expected a JSON object, got {type(contents).__name__}. Restore it, or use '
            f'another --workdir'
        )
    return contents


def complete_size(path: pathlib.Path) -> int:
    """Return the size of a file up to its last newline, 0 if it does not exist.

    A killed process may have left half a line after it.
    """
    return path.read_bytes().rfind(b'\n') + 1 if path.exists() else 0


def storage_failure(error: BaseException) -> str:
    """Return why a file could not be written, '' if the exception has another cause.

    The operating system's error may be the cause of the exception, or only be part of its message,
    as in those of orbax.
    """
    # Follow the chain of causes to an error of the operating system.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in STORAGE:
            prefix = f'{cause.filename}: ' if cause.filename else ''
            return f'{prefix}{os.strerror(cause.errno)}'
        for error_number in STORAGE[:3]:
            if os.strerror(error_number) in str(cause):
                return os.strerror(error_number)
        cause = cause.__cause__ or cause.__context__
    return ''


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds, such as '00:00:09' or '250:05:09'."""
    minutes, remainder = divmod(int(seconds), 60)
    return f'{minutes // 60:02}:{minutes % 60:02}:{remainder:02}'
