"""Files of runs and launchers: atomic JSON, tolerant readers, and errors of a full disk."""

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
    """Write a JSON file atomically, so that a reader never sees a half-written file.

    Raises:
      UserError: if a number is not finite, which JSON cannot represent.
    """
    try:
        encoded = json.dumps(contents, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f'{path}: expected finite numbers ({format_error(error)}). The file is not written'
        ) from error
    with replace_file(path) as temporary:
        temporary.write_text(encoded + '\n')


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path, move it to `path` on success, and remove it after an error."""
    temporary_path = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield temporary_path
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)


def overwrite(path: pathlib.Path, contents: bytes) -> None:
    """Overwrite an existing file in place, which is possible even on a full disk.

    Raises:
      OSError: if the file cannot be written.
    """
    with open(path, 'r+b') as stream:
        stream.write(contents)
        stream.truncate()


def read_json(path: pathlib.Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
      path: the file.
      missing: value to return if the file does not exist, or None to raise FileNotFoundError.

    Raises:
      UserError: if the file contains anything other than a JSON object.
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
            f'{path}: expected a JSON object, but got {type(contents).__name__}. Restore it, or '
            f'use another --workdir'
        )
    return contents


def complete_size(path: pathlib.Path) -> int:
    """Return the size of a file up to its last newline, or 0 if the file does not exist.

    A killed process may have left an incomplete line after the last newline.
    """
    return path.read_bytes().rfind(b'\n') + 1 if path.exists() else 0


def storage_failure(error: BaseException) -> str:
    """Return the reason why a file could not be written, or '' for an unrelated exception.

    The error of the operating system may be a cause of the exception or, as in exceptions of orbax,
    only a part of its message.
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
    """Format a duration as hours, minutes and seconds, such as '00:00:09' or '250:05:09'."""
    minutes, remainder = divmod(int(seconds), 60)
    return f'{minutes // 60:02}:{minutes % 60:02}:{remainder:02}'
