"""Reading again what runs and launchers wrote, also where a failure has left less of it.

And how long they will go on, as both show it.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from mi.config import UserError, format_error


def read_json(path: pathlib.Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object of a file that has to be whole; `missing`, if given, where there is none.

    Raises:
      UserError: if it holds something else.
    """
    if missing is not None and not path.exists():
        return missing
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # also of bytes that are not text
        raise UserError(
            f'{path} is not JSON ({error}); restore it, or name another --workdir'
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f'{path} is no JSON object: expected {{…}}; restore it, or name another --workdir'
        )
    return value


STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def storage_failure(error: BaseException) -> str:
    """Say why a file could not be written, '' if an exception is of something else.

    The operating system's error may be what other exceptions came of, or only be in their words, as
    those of orbax.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in STORAGE:
            where = f'{seen.filename}: ' if seen.filename else ''
            return f'{where}{os.strerror(seen.errno)}'
        for number in STORAGE[:3]:
            if os.strerror(number) in str(seen):
                return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return ''


def complete_size(path: pathlib.Path) -> int:
    """Length of a file up to its last newline; who was killed may have left half a line after it.

    0 where there is no file.
    """
    return path.read_bytes().rfind(b'\n') + 1 if path.exists() else 0


def is_locked(lock: pathlib.Path) -> bool:
    """Whether a process holds a lock file.

    It is taken for an instant to find out, shared, so that those who ask do not see each other.
    `mi.training.run_dir` tries for a second before it gives up.
    """
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def format_duration(seconds: float) -> str:
    """'00:00:09', '250:05:09': hours, minutes and seconds, the hours beyond a day too."""
    minutes, rest = divmod(int(seconds), 60)
    return f'{minutes // 60:02}:{minutes % 60:02}:{rest:02}'


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes to a file beside it and renames: a reader never sees a half-written file.

    Raises:
      UserError: if a number is not finite, which JSON has no word for.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(f'{path}: {format_error(error)}; nothing is written') from error
    with replace_file(path) as beside:
        beside.write_text(text + '\n')


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside a file; what is written there takes its place, or is cleared away."""
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def overwrite(path: pathlib.Path, content: bytes) -> None:
    """Write over a file, in the blocks that it has: for one that a full disk must not stop.

    Raises:
      OSError: if that cannot be done either.
    """
    with open(path, 'r+b') as stream:
        stream.write(content)
        stream.truncate()
