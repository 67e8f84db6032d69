"""Tables for a terminal: the most important columns that fit, and no broken numbers."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import rich.console
import rich.table
import rich.text
from rich.cells import cell_len

from mi.report.tables import Cell, Table

ALWAYS_SHOWN = 2  # columns, whatever the width
LONGEST = 24  # characters of a word; longer words may break
FRAME, GAP = 1, 3  # characters: the left edge; the margins and right edge of a column
MAX_NAMED = 8  # hidden columns that are named


class _Column(NamedTuple):
    """A column with its cells."""

    name: str
    header: Cell
    cells: list[Cell]
    priority: int | None
    wraps: bool

    @property
    def min_width(self) -> int:
        """The fewest characters that break no number, no interval and no word of usual length."""
        parts = [part for cell in self.cells for part in cell[:2]]
        if self.wraps:
            short = [part for part in parts if len(part) <= LONGEST // 2 and part.startswith('(')]
            words = [word for part in parts if part not in short for word in part.split()]
            parts = [*short, *words]
        body = _text_width(parts)
        header = _text_width([*self.header.main.split(), self.header.detail])
        return max(min(LONGEST, body) if self.wraps else body, header)

    @property
    def max_width(self) -> int:
        """The number of characters at which nothing wraps."""
        return _text_width(part for cell in (self.header, *self.cells) for part in cell[:2])


def make_console() -> rich.console.Console:
    """Return a console for stdout.

    It is 160 characters wide unless a terminal or COLUMNS sets the width.
    """
    console = rich.console.Console(soft_wrap=False)
    if not _is_limited(console):
        console.width = 160
    return console


def _is_limited(console: rich.console.Console) -> bool:
    return console.is_terminal or 'COLUMNS' in os.environ


def print_table(console: rich.console.Console, table: Table, title: str, files: str) -> None:
    """Print a table, and name the columns that are hidden.

    Where the output is not a terminal and COLUMNS is not set, all columns but secondary metrics are
    shown, because nothing limits the length of a line.

    Args:
      console: the console.
      table: the table.
      title: a heading for it.
      files: the files that have the hidden columns.
    """
    # Choose the columns that fit.
    limit = console.width if _is_limited(console) else None
    columns = [
        _Column(
            column.name, header, [cells[i] for cells in table.body],
            column.terminal.priority, column.terminal.wraps,
        )
        for i, (column, header) in enumerate(zip(table.columns, table.header, strict=True))
    ]  # fmt: skip
    widths = _choose_widths(columns, limit)
    visible = [column for column in columns if column.name in widths]

    # Lay them out.
    grid = rich.table.Table(title=rich.text.Text(title), title_justify='left')
    for i, column in enumerate(visible):
        grid.add_column(
            rich.text.Text('\n'.join(filter(None, column.header[:2]))),
            justify='left' if i == 0 or column.wraps else 'right',
            width=widths[column.name],
            overflow='fold',
        )
    for number in range(len(table.body)):
        is_best = number in table.best
        grid.add_row(
            *(
                _to_text(column.cells[number], column.name == 'metric' and is_best)
                for column in visible
            )
        )
    width = FRAME + sum(GAP + column_width for column_width in widths.values())
    rich.console.Console(file=console.file, width=max(width, console.width)).print(grid)

    # Name the hidden columns.
    hidden = [
        ' '.join(column.header.main.split()) for column in columns if column.name not in widths
    ]
    if hidden:
        names = hidden[:MAX_NAMED]
        if len(hidden) > MAX_NAMED:
            names.append(f'{len(hidden) - MAX_NAMED} more')
        width_text = f' at {limit} columns' if limit is not None else ''
        console.print(
            f'Not shown{width_text}: {", ".join(names)}; see {files}.',
            markup=False,
            highlight=False,
        )


def _to_text(cell: Cell, bold: bool) -> rich.text.Text:
    main = (cell.main, 'bold' if bold else '')
    if not cell.detail:
        return rich.text.Text.assemble(main)
    return rich.text.Text.assemble(main, '\n', cell.detail)


def _choose_widths(columns: Sequence[_Column], limit: int | None) -> Mapping[str, int]:
    """Return the width of every shown column, by its name."""
    ranked = sorted(
        (column for column in columns if column.priority is not None),
        key=lambda column: column.priority or 0,
    )
    if limit is None:
        return {column.name: column.max_width for column in ranked}

    # Show the columns that fit at their smallest width, in the order of priority.
    widths: dict[str, int] = {}
    spare = limit - FRAME
    for i, column in enumerate(ranked):
        if i < ALWAYS_SHOWN or GAP + column.min_width <= spare:
            widths[column.name] = column.min_width
            spare -= GAP + column.min_width

    # Widen them with what is left, in the same order.
    for column in ranked:
        if column.name in widths:
            added = min(max(spare, 0), column.max_width - widths[column.name])
            widths[column.name] += added
            spare -= added
    return widths


def _text_width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)
