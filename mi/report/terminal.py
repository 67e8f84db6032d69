"""Tables for a screen: the most important columns that fit, and no number broken in two."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import rich.console
import rich.table
import rich.text
from rich.cells import cell_len

from mi.report.tables import METRIC, Cell, Table

WORDS = ('arm', 'verdict', 'state')  # columns that may be wrapped, between words
# Columns from the most important one. The first of these that a table has are always shown.
PRIORITY = (
    *('arm', 'metric', 'baseline', 'candidate', 'difference', 'verdict', 'p', 'parameters'),
    *('seconds', 'iqm', 'improvement', 'median', 'equal_time', 'flops', 'rate', 'seeds', 'state'),
)
ALWAYS = 2
LONGEST = 24  # characters of a word; what is longer may be broken
FRAME, GAP = 1, 3  # characters: the left edge; the margins and right edge of a column
NAMED = 8  # columns that are not shown and named


class Column(NamedTuple):
    """A column of a table, by what it is called in `Table.columns`."""

    name: str
    head: Cell
    cells: list[Cell]

    @property
    def least(self) -> int:
        """The fewest characters that break no number, no interval and no word of usual length."""
        parts = [part for cell in self.cells for part in cell[:2]]
        if self.name in WORDS:
            short = [part for part in parts if len(part) <= LONGEST // 2 and part.startswith('(')]
            words = [word for part in parts if part not in short for word in part.split()]
            parts = [*short, *words]
        heads = [*self.head.main.split(), self.head.detail]
        cells = _width(parts)
        return max(min(LONGEST, cells) if self.name in WORDS else cells, _width(heads))

    @property
    def most(self) -> int:
        """The characters in which nothing is wrapped."""
        return _width(part for cell in (self.head, *self.cells) for part in cell[:2])


def console() -> rich.console.Console:
    """The standard output; lines of 160 characters where nothing says how long they are."""
    found = rich.console.Console(soft_wrap=False)
    if not _is_limited(found):
        found.width = 160
    return found


def _is_limited(console: rich.console.Console) -> bool:
    return console.is_terminal or 'COLUMNS' in os.environ


def show(console: rich.console.Console, table: Table, title: str, files: str) -> None:
    """Prints a table, and which columns it leaves out.

    All columns but secondary metrics are shown where the output is no terminal and COLUMNS is not
    set, as nothing limits a line there.

    Args:
      files: what has the columns that are left out.
    """
    limit = console.width if _is_limited(console) else None
    columns = [
        Column(name, table.header[i], [line[i] for line in table.body])
        for i, name in enumerate(table.columns)
    ]
    shown = _widths(columns, limit)
    drawn = rich.table.Table(title=rich.text.Text(title), title_justify='left')
    kept = [column for column in columns if column.name in shown]
    for i, column in enumerate(kept):
        drawn.add_column(
            rich.text.Text('\n'.join(filter(None, column.head[:2]))),
            justify='left' if i == 0 or column.name in WORDS else 'right',
            width=shown[column.name],
            overflow='fold',
        )
    for number in range(len(table.body)):
        cells = [(column.name, column.cells[number]) for column in kept]
        drawn.add_row(*(_text(cell, name == 'metric' and number in table.best)
                        for name, cell in cells))  # fmt: skip
    width = FRAME + sum(GAP + each for each in shown.values())
    wide = rich.console.Console(file=console.file, width=max(width, console.width))
    wide.print(drawn)
    hidden = [' '.join(column.head.main.split()) for column in columns if column.name not in shown]
    if hidden:
        more = [f'{len(hidden) - NAMED} more'] if len(hidden) > NAMED else []
        named = ', '.join([*hidden[:NAMED], *more])
        at = f' at {limit} columns' if limit is not None else ''
        console.print(f'Not shown{at}: {named}; see {files}.', markup=False, highlight=False)


def _text(cell: Cell, bold: bool) -> rich.text.Text:
    return rich.text.Text.assemble(
        (cell.main, 'bold' * bold), '\n' * bool(cell.detail), cell.detail
    )


def _widths(columns: Sequence[Column], limit: int | None) -> Mapping[str, int]:
    """The width of every column that is shown, by its name."""
    rank = {name: float(i) for i, name in enumerate(PRIORITY)}
    if any(cell.main != 'done' for c in columns if c.name == 'state' for cell in c.cells):
        rank['state'] = rank['metric'] + 0.5  # what is not done explains what is missing
    order = sorted(
        (column for column in columns if not column.name.startswith(METRIC)),
        key=lambda column: rank[column.name],
    )
    if limit is None:
        return {column.name: column.most for column in order}
    shown: dict[str, int] = {}
    left = limit - FRAME
    for i, column in enumerate(order):
        if i < ALWAYS or GAP + column.least <= left:
            shown[column.name] = column.least
            left -= GAP + column.least
    for column in order:
        if column.name in shown:
            more = min(max(left, 0), column.most - shown[column.name])
            shown[column.name] += more
            left -= more
    return shown


def _width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)
