"""The loop that runs the members of a sweep to completion, and stops them on an interrupt."""

import contextlib
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from launch import state
from launch.engine import Attempts, Commands, Rule
from launch.watch import Watch
from mi.training.run_state import PREEMPTED, STOP_MARK, read_run_state

TICK = 0.2  # seconds between two polls of the members


class Running(Protocol):
    """A running member."""

    def poll(self) -> int | None:
        """Return the exit code, or None while the member is running."""

    def stop(self) -> None:
        """Ask the member to save and end. Further calls do nothing."""


class Members(Protocol):
    """The members that `supervise` runs, identified by name."""

    def names(self) -> list[str]:
        """Return the names of the members, in the order in which they start."""

    def run_dir(self, name: str) -> pathlib.Path:
        """Return the run directory of a member, which must not change while the member runs."""

    def command(self, name: str) -> list[str]:
        """Return the command that starts or continues a member."""

    def prepare(self, name: str) -> None:
        """Prepare a member before it starts, which may change its run directory."""

    def should_stop(self, name: str) -> bool:
        """Return whether a running member must save and end."""

    def handle_exit(self, name: str, phase: str, had_to_stop: bool) -> None:
        """Handle the end of a member, which may change its run directory.

        Args:
          name: name of the member.
          phase: phase in which the member ended.
          had_to_stop: last value of `should_stop`.
        """


class Places(Protocol):
    """The places where members run."""

    def has_room(self) -> bool:
        """Return whether another member can start."""

    def adopt(self, run_dir: pathlib.Path) -> Running | None:
        """Return the member if a killed launcher has left it running, otherwise None."""

    def start(self, run_dir: pathlib.Path, command: list[str]) -> Running:
        """Start a member."""

    def release(self, run_dir: pathlib.Path) -> None:
        """Free the place of a member that has ended."""

    def stop_all(self) -> None:
        """Ask all running members to save, and wait until they have ended."""


class SweepMembers:
    """The members of a sweep, each with a fixed command and run directory.

    Args:
      commands: run directory → command. The names of the run directories must differ.
    """

    def __init__(self, commands: Commands):
        self._commands = commands
        self._run_dirs = {run_dir.name: run_dir for run_dir in commands}

    def names(self) -> list[str]:
        return list(self._run_dirs)

    def run_dir(self, name: str) -> pathlib.Path:
        return self._run_dirs[name]

    def command(self, name: str) -> list[str]:
        return self._commands[self._run_dirs[name]]

    def prepare(self, name: str) -> None:
        pass

    def should_stop(self, name: str) -> bool:
        return (self._run_dirs[name] / STOP_MARK).exists()

    def handle_exit(self, name: str, phase: str, had_to_stop: bool) -> None:
        pass


def supervise(
    members: Members, places: Places, retries: int, rule: Rule | None = None
) -> dict[str, str]:
    """Run members to completion, several at a time, and return name → phase.

    Args:
      members: the members.
      places: places for the members to run.
      retries: number of restarts of a member that fails.
      rule: function that marks members to be stopped for good.
    """
    names, attempts = members.names(), Attempts(retries)
    waiting, phases = list(names), dict[str, str]()
    running: dict[str, Running] = {}
    watch = Watch([members.run_dir(name) for name in names])

    # Adopt the members that a killed launcher has left running.
    for name in names:
        if (member := places.adopt(members.run_dir(name))) is not None:
            running[name] = member
            waiting.remove(name)

    with stop_on_error(watch, places.stop_all) as check_signals:
        while waiting or running:
            # Start members while slots are free.
            check_signals()
            while waiting and places.has_room():
                check_signals()
                name = waiting.pop(0)
                if state.is_finished(members.run_dir(name)):  # by another launcher
                    phases[name] = read_run_state(members.run_dir(name)).phase
                    continue
                members.prepare(name)
                running[name] = places.start(members.run_dir(name), members.command(name))
            time.sleep(TICK)

            # Handle the members that have to stop, and those that have ended.
            for name, member in list(running.items()):
                run_dir, should_stop = members.run_dir(name), members.should_stop(name)
                if should_stop:
                    member.stop()
                if (exit_code := member.poll()) is None:
                    continue
                del running[name]
                places.release(run_dir)
                phases[name], is_restarted, message = attempts.end(run_dir, exit_code)
                if message:
                    watch.print(message)
                members.handle_exit(name, phases[name], should_stop)
                watch.follow([members.run_dir(name) for name in names])
                if is_restarted:
                    waiting.append(name)
            watch.update(rule)
    return phases


class Stop(BaseException):
    """Raised when SIGTERM or SIGINT was received."""


@contextlib.contextmanager
def stop_on_error(watch: Watch, stop_all: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Stop all members and wait for them if the block raises an exception.

    Yields the function from `defer_signals`. After `Stop`, the launcher exits with code 143. Other
    exceptions are raised again.

    Args:
      watch: display of the members.
      stop_all: function that asks all running members to save, and waits for them.
    """
    try:
        with watch, defer_signals() as check_signals:
            yield check_signals
    except BaseException as error:  # no member may outlive its launcher; raised again
        with contextlib.suppress(Exception):  # a broken display must not keep members running
            cause = '' if isinstance(error, Stop) else f'{type(error).__name__}: '
            watch.print(f'{cause}stopping: waiting for the running members to save')
        stop_all()
        if isinstance(error, Stop):
            sys.exit(PREEMPTED)
        raise


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], None]]:
    """Defer SIGTERM and SIGINT in the block, so that they do not interrupt the start of a member.

    Yields a function that raises `Stop` if a signal was received. After the block, signals end the
    launcher immediately.
    """
    received_signals: list[int] = []

    def on_signal(signal_number: int, frame: FrameType | None) -> None:
        received_signals.append(signal_number)

    def check_signals() -> None:
        if received_signals:
            raise Stop

    signal_numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {
        signal_number: signal.signal(signal_number, on_signal) for signal_number in signal_numbers
    }
    try:
        yield check_signals
    finally:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)
