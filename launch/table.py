"""Terminal tables of a sweep's members."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import rich.console
import rich.markup
import rich.table

from launch.state import MemberState
from mi.training.io import format_duration

MAX_REASON = 80  # characters of a reason in a table that has to fit a screen
COLUMNS = ('run', 'state', 'step', 'rate', 'left', 'metric', 'reason')
# Columns that fit 80 characters. Without its column, a reason takes the place of the metric.
SHORT_COLUMNS = ('run', 'state', 'step', 'left', 'metric')
# Phases in the order in which a reader wants to see them.
PHASES = ('running', 'failed', 'died', 'preempted', 'queued', 'waiting', 'stopped', 'done')


def build_table(
    title: str,
    states: Mapping[str, MemberState],
    max_rows: int | None = None,
    columns: Sequence[str] = COLUMNS,
) -> rich.table.Table:
    """Return a table of members, with counts in the title and running and failed members first.

    Args:
      title: text before the counts.
      states: label → state.
      max_rows: maximum number of rows, in which long reasons are cut, or None for all. The caption
        counts the other members.
      columns: `COLUMNS` or `SHORT_COLUMNS`.
    """
    # Sort the members by phase.
    rank = {phase: index for index, phase in enumerate(PHASES)}
    labeled_states = sorted(states.items(), key=lambda item: rank.get(item[1].phase, len(PHASES)))
    shown_states = labeled_states if max_rows is None else labeled_states[:max_rows]
    heading = ', '.join([title, count_phases(states.values())])

    # Add the columns.
    table = rich.table.Table(title=heading, box=None)
    for name in columns:
        is_number = name in ('step', 'rate', 'left')
        table.add_column(name, justify='right' if is_number else 'left', overflow='fold')

    # Add the rows, and a caption for those that do not fit.
    for label, state in shown_states:
        cells = dict(zip(COLUMNS, format_row(label, state), strict=True))
        if max_rows is not None and len(state.reason) > MAX_REASON:
            cells['reason'] = f'{state.reason[:MAX_REASON]}…'
        if 'reason' not in columns and state.reason:
            cells['metric'] = cells['reason']
        table.add_row(*(rich.markup.escape(cells[name]) for name in columns))
    if hidden_states := [state for _, state in labeled_states[len(shown_states) :]]:
        table.caption = f'and {len(hidden_states)} more: {count_phases(hidden_states)}'
        table.caption_justify = 'left'
    return table


def format_row(label: str, state: MemberState) -> tuple[str, ...]:
    """Return the cells of a member in the table from `build_table`."""
    steps = f'{state.step}/{state.num_steps}' if state.num_steps else ''
    time_left = '' if state.seconds_left is None else format_duration(state.seconds_left)
    return label, state.phase, steps, state.rate, time_left, state.metric, state.reason


class FittedTable:
    """The table from `build_table` with as many rows as fit on the screen.

    Args:
      title: text before the counts.
      states: label → state.
      columns: see `build_table`.
    """

    def __init__(
        self,
        title: str,
        states: Mapping[str, MemberState],
        columns: Sequence[str] = COLUMNS,
    ):
        self._title, self._states, self._columns = title, states, columns

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        options = options.update(height=None)  # with a height, rich pads every table to it
        height = console.height

        def fits(max_rows: int) -> bool:
            table = build_table(self._title, self._states, max_rows, self._columns)
            return len(console.render_lines(table, options, pad=False)) <= height

        # Find the largest number of rows that fits by bisection.
        low, high = 0, min(len(self._states), height)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        yield build_table(self._title, self._states, low, self._columns)


def count_phases(states: Iterable[MemberState]) -> str:
    """Return the number of members in each phase as text, such as '2 running, 1 failed'."""
    counts = Counter(state.phase for state in states)
    known_phases = [phase for phase in PHASES if phase in counts]
    phases = [*known_phases, *(counts.keys() - {*known_phases})]
    return ', '.join(f'{counts[phase]} {phase}' for phase in phases)
