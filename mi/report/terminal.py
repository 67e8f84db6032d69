"""Tables for a terminal, with at most five columns and no line breaks inside numbers."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text
from rich.cells import cell_len

from mi.report.tables import Cell, Table

WIDTH = 80  # characters of a usual terminal: columns that do not fit into it are left out
MAX_COLUMNS = 5
ALWAYS_SHOWN = 2  # columns, whatever the width
LONGEST = 24  # characters of a word; longer words may break
GAP = 3  # characters: the margins of a column and the line between two
LAYOUT = rich.box.HEAVY_HEAD


class _Column(NamedTuple):
    """A column of a table with its cells."""

    name: str
    header: Cell
    cells: list[Cell]
    priority: int | None
    wraps: bool

    @property
    def min_width(self) -> int:
        """The smallest width that does not break numbers, intervals or words of usual length."""
        texts = [text for cell in self.cells for text in cell[:2]]
        if self.wraps:
            remarks = [text for text in texts if len(text) <= LONGEST // 2 and text.startswith('(')]
            words = [word for text in texts if text not in remarks for word in text.split()]
            texts = [*remarks, *words]
        body_width = _text_width(texts)
        header_width = _text_width([*self.header.main.split(), self.header.detail])
        return max(min(LONGEST, body_width) if self.wraps else body_width, header_width)

    @property
    def max_width(self) -> int:
        """The width at which nothing wraps."""
        return _text_width(text for cell in (self.header, *self.cells) for text in cell[:2])


def make_console() -> rich.console.Console:
    """Return a console for stdout, 160 characters wide unless a terminal or COLUMNS sets it."""
    console = rich.console.Console(soft_wrap=False)
    if not _is_limited(console):
        console.width = 160
    return console


def _is_limited(console: rich.console.Console) -> bool:
    return console.is_terminal or 'COLUMNS' in os.environ


def print_table(console: rich.console.Console, table: Table, title: str) -> None:
    """Print a title and the most important columns of a table, at most `MAX_COLUMNS`.

    The columns are those that fit into `WIDTH` characters, or into a narrower terminal. A wider
    terminal shows the same columns with fewer line breaks. Output to a file has no line breaks,
    unless COLUMNS is set.

    Args:
      console: the console.
      table: the table.
      title: heading of the table.
    """
    # Choose the columns that fit.
    columns = [
        _Column(
            column.name, table.header[column_index], [cells[column_index] for cells in table.body],
            column.terminal.priority, column.terminal.wraps,
        )
        for column_index, column in enumerate(table.columns)
    ]  # fmt: skip
    widths = _choose_widths(columns, console.width if _is_limited(console) else None)
    visible = [column for column in columns if column.name in widths]

    # Lay them out.
    grid = rich.table.Table(box=LAYOUT, show_edge=False)
    for column_index, column in enumerate(visible):
        grid.add_column(
            rich.text.Text('\n'.join(filter(None, column.header[:2]))),
            justify='left' if column_index == 0 or column.wraps else 'right',
            width=widths[column.name],
            overflow='fold',
        )
    for row_index in range(len(table.body)):
        is_best = row_index in table.best
        grid.add_row(
            *(
                _to_text(column.cells[row_index], column.name == 'metric' and is_best)
                for column in visible
            )
        )
    console.print(title, style='bold', markup=False, highlight=False)
    table_width = sum(GAP + column_width for column_width in widths.values())
    rich.console.Console(file=console.file, width=max(table_width, console.width)).print(grid)


def _to_text(cell: Cell, bold: bool) -> rich.text.Text:
    main = (cell.main, 'bold' if bold else '')
    if not cell.detail:
        return rich.text.Text.assemble(main)
    return rich.text.Text.assemble(main, '\n', cell.detail)


def _choose_widths(columns: Sequence[_Column], width_limit: int | None) -> Mapping[str, int]:
    """Choose the columns to show, and return their widths by name."""
    ranked = sorted(
        (column for column in columns if column.priority is not None),
        key=lambda column: column.priority or 0,
    )

    # Show the columns that fit at their smallest width, in the order of priority.
    widths: dict[str, int] = {}
    spare_width = min(width_limit or WIDTH, WIDTH)
    for rank, column in enumerate(ranked):
        fits = len(widths) < MAX_COLUMNS and GAP + column.min_width <= spare_width
        if rank < ALWAYS_SHOWN or fits:
            widths[column.name] = column.min_width
            spare_width -= GAP + column.min_width

    # Widen them with the rest of the line, in the same order.
    if width_limit is None:
        return {column.name: column.max_width for column in ranked if column.name in widths}
    spare_width += max(width_limit - WIDTH, 0)
    for column in ranked:
        if column.name in widths:
            widening = min(max(spare_width, 0), column.max_width - widths[column.name])
            widths[column.name] += widening
            spare_width -= widening
    return widths


def _text_width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)
