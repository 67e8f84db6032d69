"""The lock of a run directory, which allows one writer at a time.

The kernel releases the lock when the process exits for any reason, including `kill -9`. Therefore,
a run is alive if and only if its lock is held.
"""

import contextlib
import fcntl
import os
import pathlib
import platform
import time
from collections.abc import Iterator

from mi.config import UserError

ATTEMPTS = 10
SECONDS_BETWEEN_ATTEMPTS = 0.1


@contextlib.contextmanager
def hold_lock(lock: pathlib.Path, run_path: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a run directory while the context is open.

    Raises:
      UserError: if another process holds the lock, or if the lock file cannot be opened.
    """
    try:
        opened = open(lock, 'a+')  # noqa: SIM115
    except OSError as error:
        raise UserError(f'{lock}: {error.strerror}. Use another --workdir') from error
    with opened as file:
        # Try for a second, because `is_locked` takes the lock for an instant as well.
        for attempt in range(ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt < ATTEMPTS - 1:
                    time.sleep(SECONDS_BETWEEN_ATTEMPTS)
                    continue
                file.seek(0)
                holder = file.read().strip() or 'another process'
                raise UserError(
                    f'{run_path} is in use by {holder}. Wait for it to exit, or use another '
                    f'--workdir'
                ) from error
        # Record the holder for the error message above.
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}')
        file.flush()
        yield  # closing the file releases the lock


def is_locked(lock: pathlib.Path) -> bool:
    """Return whether a process holds a lock file.

    The check briefly takes a shared lock, so that two checks do not interfere. `hold_lock` retries
    for a second, so that it succeeds in spite of a check.
    """
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
