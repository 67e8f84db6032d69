"""A display of a sweep's members while they are running."""

import contextlib
import pathlib
import time

import rich.console
import rich.live

from launch import state, table
from launch.engine import Rule

PAUSE_RATIO = 20  # each update is followed by a pause of this many times its duration
LINE_INTERVAL = 30.0  # seconds between two lines of progress without a terminal


class Watch(contextlib.AbstractContextManager['Watch']):
    """A live table of the members on a terminal, or a line when a member starts or ends.

    When all members are done, a single line replaces the table, so that the output after it fits on
    the screen.

    Args:
      run_dirs: run directories of the members.
      interval: seconds between two updates. If updates are slow, there are fewer of them, so that
        they take at most a twentieth of the time.
    """

    def __init__(self, run_dirs: list[pathlib.Path], interval: float = 1.0):
        self._run_dirs, self._interval = run_dirs, interval
        self._reader = state.StateReader(_read_metric(run_dirs[0].parent) if run_dirs else '')
        self._console = rich.console.Console(stderr=True)
        self._start_time = time.monotonic()
        self._next_update, self._next_line = 0.0, 0.0
        self._shown_phases: dict[str, str] = {}
        self._summary, self._is_done = '', False
        self._live: rich.live.Live | None = None
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._live.start()

    def follow(self, run_dirs: list[pathlib.Path]) -> None:
        """Change the run directories to show."""
        self._run_dirs = run_dirs

    def print(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, rule: Rule | None = None, *, is_last: bool = False) -> None:
        """Apply the rule and show the members, unless the last update was very recent."""
        start_time = time.monotonic()
        if start_time < self._next_update and not is_last:
            return
        if rule is not None:
            rule(self._run_dirs)
        states = {run_dir.name: self._reader.read(run_dir) for run_dir in self._run_dirs}
        self._show(states, is_last)
        duration = time.monotonic() - start_time
        self._next_update = start_time + max(self._interval, PAUSE_RATIO * duration)

    def _show(self, states: dict[str, state.MemberState], is_last: bool) -> None:
        minutes = f'{(time.monotonic() - self._start_time) / 60:.1f} min'
        self._summary = f'{minutes}, {table.count_phases(states.values())}'
        self._is_done = all(member_state.phase == 'done' for member_state in states.values())
        if self._live is not None:
            fitted_table = table.FittedTable(minutes, states, table.SHORT_COLUMNS)
            self._live.update(fitted_table, refresh=True)
            return
        phases = {name: member_state.phase for name, member_state in states.items()}
        changed_names = {
            name
            for name, phase in phases.items()
            if phase != self._shown_phases.get(name, 'waiting')
        }
        if not changed_names and time.monotonic() < self._next_line and not is_last:
            return
        self._next_line, self._shown_phases = time.monotonic() + LINE_INTERVAL, phases
        rows = [
            ' '.join(filter(None, table.format_row(name, states[name])[:3]))
            for name, phase in phases.items()
            if name in changed_names or phase == 'running'
        ]
        if rows:
            self.print(f'[{minutes:>9}] {"; ".join(rows)}')

    def __exit__(self, *exception: object) -> None:
        self.update(is_last=True)
        if self._live is None:
            return
        self._live.transient = self._is_done
        self._live.stop()
        if self._is_done and self._run_dirs:
            self.print(self._summary)


def _read_metric(workdir: pathlib.Path) -> str:
    """Return the metric of a sweep, or '' if the directory does not hold a sweep."""
    if not (workdir / 'sweep.json').exists():
        return ''
    return str(state.read_sweep_file(workdir, {'metric': str})['metric'])
