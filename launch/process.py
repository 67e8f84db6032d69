"""One run on this machine: its process or processes, its log, and the lock that they live under.

The lock file `launched` in the run directory is locked before the process starts and is inherited
by it. So it is held from before the first instruction of a run to its very end, whatever happens to
the launcher: a launcher that was killed and started again sees which runs still go on.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import IO

from launch import state
from mi.training.lock import is_locked
from mi.training.run_dir import PREEMPTED

SAVING = 120.0  # seconds that processes have to save and end when one of them has
DYING = 10.0  # seconds that they have when one of them died: without it they cannot save


class Process:
    """A run that this launcher has started; made by `start`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]):
        self._processes = processes
        self._ended: float | None = None  # when the first of several was seen to have ended
        self._asked = False

    def poll(self) -> int | None:
        """The exit code; None as long as it runs.

        Of several processes, that of one that did not succeed, if there is one. Where one has ended
        the others have to follow, and are killed when they do not.
        """
        codes = [process.poll() for process in self._processes]
        over = [code for code in codes if code is not None]
        bad = [code for code in over if code]
        if len(over) == len(codes):
            return next((code for code in bad if code != PREEMPTED), max(bad, default=0))
        if over:
            now = time.monotonic()
            self._ended = self._ended or now
            fine = all(code in (0, PREEMPTED) for code in over)
            if now - self._ended > (SAVING if fine else DYING):
                self.kill()
        return None

    def stop(self) -> None:
        """Asks it to save and end; once, as a second signal ends a run at once."""
        if not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.1)
        return code

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


class Elsewhere:
    """A run that goes on in a directory and that another launcher has started."""

    def __init__(self, lock: pathlib.Path):
        self._lock = lock
        self._asked = False

    def poll(self) -> int | None:
        """The exit code as far as the run directory knows it; None as long as it runs."""
        if is_locked(self._lock):
            return None
        return {'done': 0, 'preempted': PREEMPTED}.get(state.read(self._lock.parent).word, 1)

    def stop(self) -> None:
        """As `Process.stop`, where it has said already which process of this machine it is."""
        told = state.status(self._lock.parent)
        here = told.get('host') == socket.gethostname() and told.get('state') == 'running'
        if here and not self._asked and is_locked(self._lock.parent / 'lock'):
            # It may have ended this moment, or belong to somebody else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(told['pid']), signal.SIGTERM)
                self._asked = True

    def wait(self) -> int:
        """Waits for one that was asked to stop; leaves any other alone."""
        while (code := self.poll()) is None:
            if not self._asked:
                return PREEMPTED
            time.sleep(0.1)
        return code


def start(
    path: pathlib.Path,
    command: Sequence[str],
    *,
    processes: int = 1,
    environments: Sequence[Mapping[str, str]] = ({},),
    cores: Collection[int] = (),
    slot: int = 0,
    cwd: str | None = None,
    lock_name: str = 'launched',
) -> Process | Elsewhere:
    """Starts a run, unless one that was started before still goes on in its directory.

    Args:
      path: the run directory.
      command: what runs it. One of several processes is told by --distributed which it is.
      processes: how many.
      environments: what is added to the environment of each.
      cores: of the CPU; () for all.
      slot: what it takes of the launcher, which `slot_of` tells another launcher.
      cwd: where it runs; None for here.
      lock_name: of the lock; another for each that are started apart and share a directory.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / lock_name, 'a+') as lock, open(path / 'log.txt', 'ab') as log:
        if not taken(lock):
            return Elsewhere(path / lock_name)
        lock.truncate(0)
        lock.write(json.dumps({'slot': slot, 'host': socket.gethostname()}))
        lock.flush()
        started: list[subprocess.Popen[bytes]] = []
        address = f'localhost:{free_port()}' if processes > 1 else ''
        with _on(cores), _all_or_none(started):
            for i in range(processes):
                each = (
                    [*command, f'--distributed={address},{processes},{i}'] if address else command
                )
                started.append(
                    subprocess.Popen(
                        each,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        cwd=cwd,
                        env={**os.environ, **environments[i % len(environments)]},
                        # A group of its own: Ctrl-C reaches the launcher alone, which then asks the
                        # runs to save.
                        process_group=0,
                        pass_fds=[lock.fileno()],
                    )
                )
    return Process(started)


@contextlib.contextmanager
def _all_or_none(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Kills what was started within, where the others cannot be: nobody would know of it."""
    try:
        yield
    except BaseException:
        for each in started:
            each.kill()
            each.wait()
        raise


@contextlib.contextmanager
def _on(cores: Collection[int]) -> Iterator[None]:
    """What is started within stays on these cores: it inherits those of the thread that starts it.

    A function that the child calls before it runs its program could do the same, and is not safe in
    a process that has threads.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(
    path: str, command: list[str], cwd: str, address: str = '', processes: int = 1, index: int = 0
) -> int:
    """Starts a run, or one process of several, and waits for it: its exit code.

    An interrupt, or a rule of the sweep, makes it save and end.

    Args:
      path: the run directory.
      command: what runs it.
      cwd: where.
      address: 'HOST:PORT' at which the first process listens, where there are several.
      processes: how many.
      index: which one this is.
    """
    if processes > 1:
        command = [*command, f'--distributed={address},{processes},{index}']
    lock = f'launched.{index}' if index else 'launched'
    this = start(pathlib.Path(path), command, cwd=cwd, lock_name=lock)
    try:
        while (code := this.poll()) is None:
            if (pathlib.Path(path) / state.STOPPED).exists():
                this.stop()
            time.sleep(0.2)
        return code
    except KeyboardInterrupt:
        this.stop()
        return this.wait()
    except BaseException:  # whatever it is: a run does not outlive who watches it
        this.stop()
        this.wait()
        raise


def taken(lock: IO[str]) -> bool:
    """Locks a file; tries for a moment, as `launch.state.held` may just be looking."""
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def slot_of(path: pathlib.Path) -> int:
    """The slot of the run that goes on in a directory; −1 if that is not known."""
    told = state.written(path / 'launched')
    return int(told.get('slot', -1)) if told.get('host') == socket.gethostname() else -1


def free_port() -> int:
    """One that is free now; whoever it is for has to be quick."""
    with socket.socket() as probe:
        probe.bind(('', 0))
        return int(probe.getsockname()[1])
