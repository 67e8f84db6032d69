"""Runs a sweep on this machine and writes its report.

    python -m launch.local --sweep=experiments/quickstart.py --workdir=runs/quickstart

Finished members are skipped and interrupted ones continued, so the same command can be given again
at any time. A member that fails does not stop the others; the exit code is 1 then. Ctrl-C or
SIGTERM lets the running members save, and exits with 143.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.live
import rich.table
from absl import app, flags

from launch import sweep
from mi import report
from mi.config import UserError
from mi.run import PREEMPTED

RATE = '_per_second'  # how the rates in timing.jsonl end

SWEEP = flags.DEFINE_string('sweep', None, 'Sweep file, such as experiments/quickstart.py.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Sweep directory, made or continued.')
PARALLEL = flags.DEFINE_integer(
    'parallel', 1, 'Members at once, each on its share of the cores.', lower_bound=1
)


class _Stop(BaseException):
    """SIGTERM or SIGINT came."""


def _on_signal(number: int, frame: Any) -> None:
    raise _Stop


def run(members: Sequence[sweep.Member], workdir: pathlib.Path, parallel: int) -> list[str]:
    """Runs the unfinished members, `parallel` at once; returns the names of those that failed."""
    waiting = [m for m in members if _status(workdir / m.name).get('state') != 'done']
    running: dict[str, subprocess.Popen[bytes]] = {}
    slots: dict[str, int] = {}
    failed: list[str] = []
    watch = _Watch(members, workdir)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                member = waiting.pop(0)
                slots[member.name] = min(set(range(parallel)) - {slots[name] for name in running})
                running[member.name] = _start(
                    member, workdir / member.name, _share(slots[member.name], parallel)
                )
            time.sleep(0.5)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code:
                    failed.append(name)
                    watch.say(f'{name} failed: {_reason(workdir / name, code)}')
            watch.update(running, waiting)
    except _Stop:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        watch.say('stopping: waiting for the running members to save')
        for process in running.values():
            process.wait()
        raise
    finally:
        watch.close()
    return failed


def _share(slot: int, parallel: int) -> set[int]:
    """The cores of one of so many members: small programs run best on few cores of their own."""
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[slot::parallel]) or set(cores)


def _start(member: sweep.Member, path: pathlib.Path, cores: set[int]) -> subprocess.Popen[bytes]:
    path.mkdir(parents=True, exist_ok=True)
    with open(path / 'log.txt', 'ab') as log:
        # A group of its own: Ctrl-C reaches the launcher alone, which then asks members to save.
        return subprocess.Popen(
            member.command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )


def _status(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / 'status.json').read_text()))
    except FileNotFoundError:
        return {}


def _reason(path: pathlib.Path, code: int) -> str:
    """The last line that the member wrote, and its exit code."""
    lines = (path / 'log.txt').read_text(errors='replace').split('\n')
    last = next((line for line in reversed(lines) if line.strip()), 'no output')
    return f'exit code {code}: {last} ({path / "log.txt"})'


class _Watch:
    """A table of the members on a terminal; elsewhere a line when something changes."""

    def __init__(self, members: Sequence[sweep.Member], workdir: pathlib.Path):
        self._members, self._workdir = members, workdir
        self._console = rich.console.Console(stderr=True)
        self._start = time.monotonic()
        self._said = ''
        self._live: rich.live.Live | None = None
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._live.start()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, running: dict[str, Any], waiting: Sequence[sweep.Member]) -> None:
        del waiting
        rows = [(m.label, *self._row(m, m.name in running)) for m in self._members]
        minutes = (time.monotonic() - self._start) / 60
        if self._live is not None:
            table = rich.table.Table(title=f'{self._workdir}, {minutes:.1f} min', box=None)
            for heading in ('member', 'state', 'step', 'rate', 'left'):
                table.add_column(heading, justify='left' if heading == 'member' else 'right')
            for row in rows:
                table.add_row(*row)
            self._live.update(table, refresh=True)
            return
        now = '; '.join(f'{label} {state} {step}' for label, state, step, *_ in rows if state)
        if now != self._said:
            self.say(f'[{minutes:5.1f} min] {now}')
            self._said = now

    def _row(self, member: sweep.Member, running: bool) -> tuple[str, str, str, str]:
        path = self._workdir / member.name
        state = 'running' if running else _status(path).get('state', '')
        timing = path / 'timing.jsonl'
        if not timing.exists() or not (path / 'cost.json').exists():
            return state, '', '', ''
        lines = timing.read_text().splitlines()
        if not lines:
            return state, '', '', ''
        last = json.loads(lines[-1])
        steps = json.loads((path / 'cost.json').read_text())['steps']
        every = last['step'] - json.loads(lines[-2])['step'] if len(lines) > 1 else last['step']
        left = (steps - last['step']) * last['seconds'] / max(1, every)
        return (
            state,
            f'{last["step"]}/{steps}',
            ', '.join(
                f'{v:,.0f} {k.removesuffix(RATE)}/s' for k, v in last.items() if k.endswith(RATE)
            ),
            f'{left:.0f} s' if running else '',
        )

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}; flags are --NAME=VALUE')
    if not SWEEP.value or not WORKDIR.value:
        raise UserError('--sweep=FILE and --workdir=DIRECTORY are both needed')
    workdir = pathlib.Path(WORKDIR.value)
    members = sweep.load(SWEEP.value, workdir)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        failed = run(members, workdir, PARALLEL.value)
    except _Stop:
        sys.exit(PREEMPTED)
    report.write(workdir)
    sweep.report(SWEEP.value, workdir)
    if failed:
        sys.exit(f'error: {len(failed)} of {len(members)} members failed: {", ".join(failed)}')


if __name__ == '__main__':
    os.environ.setdefault('PYTHONUNBUFFERED', '1')
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f'error: {error}')
