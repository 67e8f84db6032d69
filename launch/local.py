"""Runs a sweep on this machine and writes its report.

    python -m launch.local --sweep=experiments/quickstart.py --workdir=runs/quickstart --parallel=2
    python -m launch.local --sweep=… --workdir=… --gpus=1 --retries=2
    python -m launch.local --sweep=… --workdir=… --dry_run

Finished members are skipped and interrupted ones continued, so the same command can be given again
at any time, after a `kill -9` of this one too: members that it left running are waited for. A
member that fails does not stop the others; the exit code is 1 then. Ctrl-C or SIGTERM lets the
running members save, and exits with 143.
"""

import contextlib
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import rich.console
import rich.live

from launch import engine, process, state
from launch.devices import Devices
from launch.engine import Commands, Resources, Rule, States
from mi.config import UserError
from mi.training.run_dir import PREEMPTED

TICK = 0.2  # seconds between two looks at the members
SHARE = 20  # a look at them all is followed by a pause of so many times what it took
LINE = 30.0  # seconds between two lines of how far they are, where no terminal is


class Stop(BaseException):
    """SIGTERM or SIGINT came."""


@contextlib.contextmanager
def heeding_signals() -> Iterator[Callable[[], None]]:
    """Within, SIGTERM and SIGINT are kept for the function it gives, which then raises `Stop`.

    So that none comes in the middle of starting a member. What comes after ends the launcher at
    once.
    """
    asked: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        asked.append(number)

    def heed() -> None:
        if asked:
            raise Stop

    before = {each: signal.signal(each, on_signal) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield heed
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def supervising(watch: 'Watch', stop: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Within, members run; none of them outlives a launcher that ends otherwise than it should.

    Whatever is raised within, the members are asked to save and are waited for before it goes on
    upward. Gives what `heeding_signals` gives; `Stop` ends the launcher as one that was stopped.

    Args:
      watch: shows them.
      stop: asks all members that run to save, and waits for them.
    """
    try:
        with watch, heeding_signals() as heed:
            yield heed
    except BaseException as error:
        with contextlib.suppress(Exception):  # a screen that is gone must not keep them running
            why = '' if isinstance(error, Stop) else f'{type(error).__name__}: '
            watch.say(f'{why}stopping: waiting for the running members to save')
        stop()
        if isinstance(error, Stop):
            sys.exit(PREEMPTED)
        raise


def stop_all(running: Iterable[process.Process | process.Elsewhere]) -> None:
    """Asks them to save, and waits until they have."""
    members = list(running)
    for member in members:
        member.stop()
    for member in members:
        member.wait()


def submit(commands: Commands, resources: Resources, rule: Rule | None = None) -> States:
    """Runs them to their ends, some at once; returns what became of each."""
    slots, attempts = Slots(resources), engine.Attempts(resources.retries)
    waiting, states = list(commands), States()
    running: dict[pathlib.Path, process.Process | process.Elsewhere] = {}
    taken: dict[pathlib.Path, int] = {}
    watch = Watch(list(commands))
    for path in commands:  # what a launcher that was killed has left
        if state.is_locked(path / 'launched'):
            running[path] = process.Elsewhere(path / 'launched')
            taken[path] = process.slot_of(path)
            waiting.remove(path)
    with supervising(watch, lambda: stop_all(running.values())) as heed:
        while waiting or running:
            heed()
            while waiting and (slot := slots.free(taken.values())) is not None:
                heed()
                path = waiting.pop(0)
                if state.done(path):  # by another launcher
                    states[path] = state.read(path).word
                    continue
                running[path], taken[path] = slots.start(slot, path, commands[path]), slot
            time.sleep(TICK)
            for path, member in list(running.items()):
                if (path / state.STOPPED).exists():
                    member.stop()
                if (code := member.poll()) is None:
                    continue
                del running[path], taken[path]
                states[path], again, said = attempts.ended(path, code)
                if said:
                    watch.say(said)
                if again:
                    waiting.append(path)
            watch.update(rule)
    return states


class Slots:
    """The parts of this machine that members take: a share of the cores, and GPUs of their own.

    Raises:
      UserError: if the machine has not as many GPUs as one member is to have.
    """

    def __init__(self, resources: Resources):
        self._resources = resources
        self._gpus = gpus() if resources.gpus else []
        each = resources.gpus * resources.processes
        if each > len(self._gpus):
            raise UserError(
                f'--gpus={resources.gpus}: {resources.processes} process(es) of a member need '
                f'{each}, and this machine has {len(self._gpus)}; give fewer, or --gpus=0'
            )
        fitting = len(self._gpus) // each if each else 1
        self.number = resources.parallel or fitting
        if each and self.number > fitting:
            raise UserError(
                f'--parallel={self.number}: the {len(self._gpus)} GPUs of this machine are enough '
                f'for {fitting} at once'
            )

    def free(self, taken: Any) -> int | None:
        """The first that is free, None if none is; a member that has an unknown one counts."""
        left = set(range(self.number)) - set(taken)
        return min(left) if left and len(taken) < self.number else None

    def start(
        self, slot: int, path: pathlib.Path, command: list[str]
    ) -> process.Process | process.Elsewhere:
        """Starts a member there."""
        count, each = self._resources.processes, self._resources.gpus
        environments: list[dict[str, str]] = [{'PYTHONUNBUFFERED': '1'} for _ in range(count)]
        for i, environment in enumerate(environments):
            first = (slot * count + i) * each
            if each:
                environment['CUDA_VISIBLE_DEVICES'] = ','.join(self._gpus[first : first + each])
        cores = self._cores(slot)
        return process.start(
            path, command, processes=count, environments=environments, cores=cores, slot=slot
        )

    def _cores(self, slot: int) -> set[int]:
        """Small programs run best on few cores of their own."""
        cores = sorted(os.sched_getaffinity(0))
        if self._resources.cores:
            count = self._resources.cores * self._resources.processes
            return {cores[(slot * count + i) % len(cores)] for i in range(count)}
        return set(cores[slot :: self.number]) or set(cores)


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member: its GPUs, or all that its processes see."""
    each = resources.gpus or len(gpus()) or jax.local_device_count()
    return Devices(resources.processes * each, resources.processes)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [name for name in visible.split(',') if name]
    found = pathlib.Path('/dev').glob('nvidia[0-9]*')
    return sorted((match[0] for p in found if (match := re.search(r'\d+$', p.name))), key=int)


class Watch(contextlib.AbstractContextManager['Watch']):
    """A table of the members on a terminal; elsewhere a line when one starts or ends.

    Args:
      paths: of the members.
      every: seconds between two looks. Where a look takes long there are fewer, so that all of them
        take a twentieth of the time at most.
    """

    def __init__(self, paths: list[pathlib.Path], every: float = 1.0):
        self._paths, self._every = paths, every
        self._reader = state.Reader(_metric(paths[0].parent) if paths else '')
        self._console = rich.console.Console(stderr=True)
        self._start, self._next, self._next_line = time.monotonic(), 0.0, 0.0
        self._said: dict[str, str] = {}
        self._live: rich.live.Live | None = None
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._live.start()

    def follow(self, paths: list[pathlib.Path]) -> None:
        """Shows these from now on."""
        self._paths = paths

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, rule: Rule | None = None, *, last: bool = False) -> None:
        """Shows how they stand and applies the rule, once in a while."""
        if time.monotonic() < self._next and not last:
            return
        began = time.monotonic()
        if rule is not None:
            rule(self._paths)
        states = {path.name: self._reader.read(path) for path in self._paths}
        self._show(states, last)
        took = time.monotonic() - began
        self._next = began + max(self._every, SHARE * took)

    def _show(self, states: dict[str, state.State], last: bool) -> None:
        minutes = f'{(time.monotonic() - self._start) / 60:.1f} min'
        if self._live is not None:
            self._live.update(state.Table(minutes, states), refresh=True)
            return
        now = {name: of.word for name, of in states.items()}
        changed = {name for name in now if now[name] != self._said.get(name, 'waiting')}
        if not changed and time.monotonic() < self._next_line and not last:
            return
        self._next_line, self._said = time.monotonic() + LINE, now
        shown = [name for name in now if name in changed or now[name] == 'running']
        lines = [' '.join(filter(None, state.cells(name, states[name])[:3])) for name in shown]
        if lines:
            self.say(f'[{minutes:>9}] {"; ".join(lines)}')

    def __exit__(self, *exception: object) -> None:
        self.update(last=True)
        if self._live is not None:
            self._live.stop()


def _metric(workdir: pathlib.Path) -> str:
    """What the sweep of a directory compares; '' if it is not that of a sweep."""
    if not (workdir / 'sweep.json').exists():
        return ''
    return str(state.described(workdir, {'metric': str})['metric'])


if __name__ == '__main__':
    from launch import cli

    cli.main('local', submit, find_devices, watches=True)
