"""The processes of a run on this machine, with its log and the lock that they hold.

The launcher locks the file `launched` in the run directory before it starts the processes, which
inherit the lock. The lock is therefore held as long as the run is alive, whatever happens to the
launcher, and a restarted launcher can tell which runs are still alive.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import IO

from launch import state
from mi.training.lock import is_locked
from mi.training.run_state import PREEMPTED, STOP_MARK, read_object, read_run_state

SAVE_TIMEOUT = 120.0  # seconds for the other processes to save and end after one was stopped
DEATH_TIMEOUT = 10.0  # seconds for them to end after one died: without it they cannot save
POLL_INTERVAL = 0.1  # seconds


class Process:
    """A run that this launcher has started with `start`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]):
        self._processes = processes
        self._first_exit_time: float | None = None  # when the first of several had ended
        self._is_stopping = False

    def poll(self) -> int | None:
        """Return the exit code, or None while the run is in progress.

        If there are several processes and one has failed, return its exit code. When one process
        has ended, the others must end soon, and are killed if they do not.
        """
        poll_results = [process.poll() for process in self._processes]
        exit_codes = [exit_code for exit_code in poll_results if exit_code is not None]
        if len(exit_codes) == len(self._processes):
            bad_codes = [exit_code for exit_code in exit_codes if exit_code]
            failures = (exit_code for exit_code in bad_codes if exit_code != PREEMPTED)
            return next(failures, max(bad_codes, default=0))
        if exit_codes:
            now = time.monotonic()
            self._first_exit_time = self._first_exit_time or now
            is_clean = all(exit_code in (0, PREEMPTED) for exit_code in exit_codes)
            if now - self._first_exit_time > (SAVE_TIMEOUT if is_clean else DEATH_TIMEOUT):
                self.kill()
        return None

    def stop(self) -> None:
        """Ask the run to save and end. Send only one signal, because a second one would kill it."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the run without saving."""
        self._send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until the run has ended and return its exit code."""
        while (exit_code := self.poll()) is None:
            time.sleep(POLL_INTERVAL)
        return exit_code

    def _send_signal(self, signal_number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal_number)


class AdoptedProcess:
    """A run in progress that another launcher has started."""

    def __init__(self, lock: pathlib.Path):
        self._lock = lock
        self._run_dir = lock.parent
        self._is_stopping = False

    def poll(self) -> int | None:
        """Return the exit code that the run directory implies, or None during the run."""
        if is_locked(self._lock):
            return None
        return {'done': 0, 'preempted': PREEMPTED}.get(read_run_state(self._run_dir).phase, 1)

    def stop(self) -> None:
        """Ask the run to save and end, if its status names a process on this machine."""
        status = state.read_status(self._run_dir)
        is_local = status.get('host') == socket.gethostname() and status.get('state') == 'running'
        if is_local and not self._is_stopping and is_locked(self._run_dir / 'lock'):
            # It may have just ended, or belong to another user.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(status['pid']), signal.SIGTERM)
                self._is_stopping = True

    def wait(self) -> int:
        """Wait for a run that was asked to stop, and return immediately for any other."""
        while (exit_code := self.poll()) is None:
            if not self._is_stopping:
                return PREEMPTED
            time.sleep(POLL_INTERVAL)
        return exit_code


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Options for starting the processes of a run.

    Attributes:
      processes: number of processes. If there are several, each one also gets --distributed with
        its index.
      environments: environment variables to add for each process.
      cores: CPU cores to run on, or () for all.
      slot: the slot that the run occupies, for `read_slot` in a later launcher.
      cwd: working directory, or None for the current one.
      lock_name: name of the lock file. Processes of a run that are started separately need
        different names.
    """

    processes: int = 1
    environments: Sequence[Mapping[str, str]] = ({},)
    cores: Collection[int] = ()
    slot: int = 0
    cwd: str | None = None
    lock_name: str = 'launched'


ONE_PROCESS = ProcessOptions()  # on all cores, in the current directory


def start(
    run_dir: pathlib.Path, command: Sequence[str], options: ProcessOptions = ONE_PROCESS
) -> Process | AdoptedProcess:
    """Start a run, unless it is already running."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock_path = run_dir / options.lock_name
    with open(lock_path, 'a+') as lock_file, open(run_dir / 'log.txt', 'ab') as log_file:
        # Take the lock, and note who holds it.
        if not try_lock(lock_file):
            return AdoptedProcess(lock_path)
        lock_file.truncate(0)
        lock_file.write(json.dumps({'slot': options.slot, 'host': socket.gethostname()}))
        lock_file.flush()

        # Start the processes, which inherit the lock.
        started: list[subprocess.Popen[bytes]] = []
        num_processes, environments = options.processes, options.environments
        address = f'localhost:{find_free_port()}' if num_processes > 1 else ''
        with _pin_to_cores(options.cores), _kill_on_error(started):
            for index in range(num_processes):
                peers = f'{address},{num_processes},{index}'
                process = subprocess.Popen(
                    [*command, *([f'--distributed={peers}'] if address else [])],
                    stdout=log_file,
                    stderr=log_file,
                    stdin=subprocess.DEVNULL,
                    cwd=options.cwd,
                    env={**os.environ, **environments[index % len(environments)]},
                    # In a group of its own, Ctrl-C reaches only the launcher, which then asks the
                    # runs to save.
                    process_group=0,
                    pass_fds=[lock_file.fileno()],
                )
                started.append(process)
    return Process(started)


@contextlib.contextmanager
def _kill_on_error(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Kill the started processes if the others cannot be started, because nothing else would."""
    try:
        yield
    except BaseException:  # including Ctrl-C: no process may be left behind; it is raised again
        for process in started:
            process.kill()
            process.wait()
        raise


@contextlib.contextmanager
def _pin_to_cores(cores: Collection[int]) -> Iterator[None]:
    """Pin processes that are started in the block to these cores, except on macOS.

    The processes inherit the cores of the thread that starts them. It is not safe to set the cores
    in the child with `preexec_fn` if the parent has threads.
    """
    if not hasattr(os, 'sched_setaffinity'):
        yield
        return
    initial_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or initial_cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, initial_cores)


def run(
    path: str, command: list[str], cwd: str, address: str = '', processes: int = 1, index: int = 0
) -> int:
    """Start a run, or one of its processes. Wait for it and return the exit code.

    After an interrupt or a stop mark, the run saves and ends.

    Args:
      path: the run directory.
      command: command of the run.
      cwd: working directory of the command.
      address: 'HOST:PORT' at which the first of several processes listens.
      processes: number of processes.
      index: index of this process.
    """
    # Start the process.
    run_dir = pathlib.Path(path)
    if processes > 1:
        command = [*command, f'--distributed={address},{processes},{index}']
    lock_name = f'launched.{index}' if index else 'launched'
    options = ProcessOptions(cwd=cwd, lock_name=lock_name)
    with _note_interrupts() as is_interrupted:
        process = start(run_dir, command, options)

        # Wait for it, and stop it if it is marked or this process is interrupted.
        try:
            while (exit_code := process.poll()) is None:
                if is_interrupted.is_set() or (run_dir / STOP_MARK).exists():
                    process.stop()
                time.sleep(2 * POLL_INTERVAL)
            return exit_code
        except BaseException:  # raised again: a run must not outlive its watcher
            process.stop()
            process.wait()
            raise


@contextlib.contextmanager
def _note_interrupts() -> Iterator[threading.Event]:
    """Record interrupts in an event instead of raising KeyboardInterrupt.

    Ray repeats its cancellations, and users press Ctrl-C twice. An exception could end this process
    at any statement, before the run has saved.
    """
    is_interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only it gets signals
        yield is_interrupted
        return
    handler = signal.signal(signal.SIGINT, lambda *_: is_interrupted.set())
    try:
        yield is_interrupted
    finally:
        signal.signal(signal.SIGINT, handler)


def try_lock(lock: IO[str]) -> bool:
    """Try to lock a file for half a second, and return whether this succeeded.

    One attempt is not enough, because `mi.training.lock.is_locked` briefly takes the lock to test
    it.
    """
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def read_slot(run_dir: pathlib.Path) -> int:
    """Return the slot of a run in progress, or −1 if it is unknown or on another machine."""
    lock_note = read_object(run_dir / 'launched')
    is_local = lock_note.get('host') == socket.gethostname()
    return int(lock_note.get('slot', -1)) if is_local else -1


def find_free_port() -> int:
    """Return a free port, which another process may take before it is used."""
    with socket.socket() as probe:
        probe.bind(('', 0))
        return int(probe.getsockname()[1])
