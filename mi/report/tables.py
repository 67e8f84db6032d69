"""The table of results, with one row per arm and only the significant digits of each number.

`make_table` formats the numbers. The writers of Markdown, LaTeX, HTML and terminal tables only
escape its cells and lay them out. `mi.report.csv` writes numbers in full precision.
"""

import collections
import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from mi.report import analysis, statistics
from mi.report.analysis import ArmResult
from mi.report.arms import Sweep
from mi.report.statistics import Estimate, SignFlipTest

NONE = '—'
INTERVAL = '[95 %]'
METRIC = 'metric/'  # prefix of the column names of secondary metrics
PREFIX = {12: ' T', 9: ' G', 6: ' M', 3: ' k', 0: ''}

Item = TypeVar('Item')


class Cell(NamedTuple):
    """A cell, with its text, a smaller detail, and its sort key."""

    main: str
    detail: str = ''
    value: float | None = None

    def __str__(self) -> str:
        return f'{self.main} {self.detail}'.strip()


@dataclasses.dataclass(frozen=True)
class Terminal:
    """Options of a column in a terminal.

    Attributes:
      priority: rank of the column, with the smallest shown first, or None if it is never shown.
      wraps: whether text may break between words, which numbers never do.
    """

    priority: int | None = None
    wraps: bool = False


@dataclasses.dataclass(frozen=True)
class Column(Generic[Item]):
    """A column of a table.

    Attributes:
      name: identifier of the column, or 'metric/NAME' for a secondary metric.
      title, detail: text of the header.
      cell: function that formats the cell of an item.
      shown_if: whether to show the column.
      terminal: options of the column in a terminal.
    """

    name: str
    title: str
    detail: str
    cell: Callable[[Item], Cell]
    shown_if: bool = True
    terminal: Terminal = Terminal()


class Table(NamedTuple):
    """A formatted table.

    Attributes:
      columns: columns to show.
      body: cells of each row.
      best: indices of the rows with the best mean.
    """

    columns: Sequence[Column[Any]]
    body: list[list[Cell]]
    best: set[int]

    @property
    def header(self) -> list[Cell]:
        """The header cells."""
        return [Cell(column.title, column.detail) for column in self.columns]


def make_body(columns: Sequence[Column[Item]], items: Iterable[Item]) -> list[list[Cell]]:
    """Format a row of cells for each item."""
    return [[column.cell(item) for column in columns] for item in items]


def humanize(name: str) -> str:
    """Replace underscores in a name with spaces: bits_per_byte → bits per byte."""
    return name.replace('_', ' ')


def make_table(sweep: Sweep, results: list[ArmResult]) -> Table:
    """Make the formatted table that all formats except CSV share."""
    columns = _make_columns(sweep, results)
    best: set[int] = set()
    # Arms of different problems are not ranked with each other.
    for problem_arms in sweep.group_by_problem().values():
        labels = {arm.label for arm in problem_arms}
        means = {
            row_index: result.metric.mean
            for row_index, result in enumerate(results)
            if result.metric and result.arm.label in labels and sweep.is_comparable(result.arm)
        }
        best_mean = (min if sweep.lower_is_better else max)(means.values(), default=None)
        if len(labels) > 1:
            best |= {row_index for row_index, mean in means.items() if mean == best_mean}
    return Table(columns, make_body(columns, results), best)


def _make_columns(sweep: Sweep, results: list[ArmResult]) -> list[Column[ArmResult]]:
    arrow = ''
    if len(results) > 1:
        arrow = ' ↓' if sweep.lower_is_better else ' ↑'
    leading = [column for column in _score_columns(sweep, results, arrow) if column.shown_if]
    trailing = _cost_columns(sweep, results)
    # A secondary metric whose title is taken by another column is qualified by its split.
    taken_titles = [column.title.removesuffix(arrow) for column in (*leading, *trailing)]
    titles = _disambiguate(secondary_names(results), taken_titles, sweep.split)
    secondary = [
        Column(f'{METRIC}{metric_name}', title, '', _secondary_cell(metric_name))
        for metric_name, title in titles.items()
    ]
    return [*leading, *secondary, *trailing]


def _score_columns(sweep: Sweep, results: list[ArmResult], arrow: str) -> list[Column[ArmResult]]:
    """Return the columns of the compared metric."""
    decimals = count_decimals(
        [result.metric for result in results], [result.difference for result in results]
    )
    # Columns without content are left out: those of differences, tests and tasks.
    has_baseline, is_multitask = sweep.baseline is not None, has_tasks(results)
    num_tests = sum(result.test is not None for result in results)
    # The equal-time column names the time, so its title is computed here.
    equal_time = f'{sweep.curves} after {format_seconds(analysis.find_equal_time(sweep))} s{arrow}'
    return [
        Column(
            'arm', 'arm', '', lambda result: Cell(result.arm.label),
            terminal=Terminal(priority=0, wraps=True),
        ),
        Column(
            'metric', f'{sweep.metric_title}{arrow}', INTERVAL,
            lambda result: format_interval(result.metric, decimals),
            terminal=Terminal(priority=1),
        ),
        Column(
            'difference', f'difference to {sweep.baseline}', INTERVAL,
            lambda result: format_interval(result.difference, decimals, '+'),
            shown_if=has_baseline, terminal=Terminal(priority=3),
        ),
        Column(
            'verdict', 'verdict', '', lambda result: _verdict_cell(sweep, result),
            shown_if=has_baseline, terminal=Terminal(priority=7, wraps=True),
        ),
        Column(
            'p', 'p', 'Holm' if num_tests > 1 else '', lambda result: format_test(result.test),
            shown_if=has_baseline, terminal=Terminal(priority=4),
        ),
        Column(
            'median', f'median{arrow}', INTERVAL, _task_cell('median', decimals),
            shown_if=is_multitask, terminal=Terminal(priority=10),
        ),
        Column(
            'iqm', f'IQM{arrow}', INTERVAL, _task_cell('iqm', decimals),
            shown_if=is_multitask, terminal=Terminal(priority=8),
        ),
        Column(
            'improvement', 'P(improvement)', INTERVAL, _task_cell('improvement', 2),
            shown_if=is_multitask and has_baseline, terminal=Terminal(priority=9),
        ),
        Column(
            'equal_time', equal_time, INTERVAL,
            lambda result: format_interval(result.equal_time, decimals),
            shown_if=has_equal_time(results), terminal=Terminal(priority=11),
        ),
    ]  # fmt: skip


def _cost_columns(sweep: Sweep, results: list[ArmResult]) -> list[Column[ArmResult]]:
    """Return the columns of costs, and the columns that describe the runs."""
    unit = sweep.unit
    # A state that is not done explains missing numbers, so it comes right after the metric.
    is_done = all(result.arm.state == 'done' for result in results)
    return [
        Column(
            'parameters', 'parameters', '/ fusion', _parameters_cell,
            terminal=Terminal(priority=5),
        ),
        Column(
            'flops', f'FLOPs per {unit}', '/ fusion', lambda result: _flops_cell(result, unit),
            terminal=Terminal(priority=12),
        ),
        Column(
            'seconds', 'train seconds', '',
            lambda result: Cell(format_seconds(result.seconds), value=result.seconds),
            terminal=Terminal(priority=6),
        ),
        Column(
            'rate', f'{unit}s/s', '',
            lambda result: Cell(_format_short(result.rate), value=result.rate),
            terminal=Terminal(priority=13),
        ),
        Column('seeds', 'seeds', '', _seeds_cell, terminal=Terminal(priority=14)),
        Column(
            'state', 'state', '', _state_cell,
            terminal=Terminal(priority=15 if is_done else 2, wraps=True),
        ),
    ]  # fmt: skip


def _verdict_cell(sweep: Sweep, result: ArmResult) -> Cell:
    if result.verdict and result.difference:
        return Cell(result.verdict, f'(n = {result.difference.num_seeds})')
    return Cell('baseline' if result.arm.label == sweep.baseline else result.verdict or NONE)


def _task_cell(statistic: str, decimals: int) -> Callable[[ArmResult], Cell]:
    def format_cell(result: ArmResult) -> Cell:
        estimate = getattr(result.task_summary, statistic) if result.task_summary else None
        return format_interval(estimate, decimals)

    return format_cell


def _secondary_cell(metric_name: str) -> Callable[[ArmResult], Cell]:
    def format_cell(result: ArmResult) -> Cell:
        metric_mean = result.secondary.get(metric_name)
        return Cell(_format_significant(metric_mean), value=metric_mean)

    return format_cell


def _parameters_cell(result: ArmResult) -> Cell:
    counts = [result.arm.get_cost('parameters', component) for component in ('model', 'fusion')]
    return _pair_cell([NONE if count is None else f'{count:,}' for count in counts], counts[0])


def _flops_cell(result: ArmResult, unit: str) -> Cell:
    quantity = f'flops_per_{unit}'
    counts = [result.arm.get_cost(quantity, component) for component in ('model', 'fusion')]
    return _pair_cell([_format_short(count) for count in counts], counts[0])


def _seeds_cell(result: ArmResult) -> Cell:
    num_final, num_seeds = len(result.final), len(result.arm.seeds)
    text = f'{num_final}' if num_final == num_seeds else f'{num_final} of {num_seeds}'
    return Cell(text, value=num_final)


def _state_cell(result: ArmResult) -> Cell:
    return Cell(result.arm.state, f'({shorten(result.arm.reason)})' if result.arm.reason else '')


def _disambiguate(
    metric_names: Iterable[str], taken_titles: Collection[str], split: str
) -> dict[str, str]:
    """Return {metric: title}, where titles that are not unique include the split."""
    metric_names = list(metric_names)
    uses = collections.Counter([*map(humanize, metric_names), *taken_titles])
    return {
        name: humanize(name) if uses[humanize(name)] == 1 else f'{name} ({split})'
        for name in metric_names
    }


def to_markdown(sweep: Sweep, results: list[ArmResult], notes: list[str]) -> str:
    table = make_table(sweep, results)
    body = [[escape_markdown(str(cell)) for cell in cells] for cells in table.body]
    for row_index in table.best:
        mean, detail, _ = table.body[row_index][1]
        body[row_index][1] = f'**{escape_markdown(mean)}** {escape_markdown(detail)}'.strip()
    grid = _join_grid([escape_markdown(str(cell)) for cell in table.header], body)
    note_items = '\n'.join(f'- {escape_markdown(note)}' for note in notes)
    return f'### {escape_markdown(sweep.title)}\n\n{grid}\n\n{note_items}\n'


def format_markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Format plain text as a Markdown table, with all but the first column right-aligned."""
    escaped_body = [[escape_markdown(text) for text in cells] for cells in body]
    return _join_grid([escape_markdown(text) for text in header], escaped_body)


def _join_grid(header: list[str], body: list[list[str]]) -> str:
    grid = [header, ['---'] + ['---:'] * (len(header) - 1), *body]
    return '\n'.join(f'| {" | ".join(line)} |' for line in grid)


def has_tasks(results: list[ArmResult]) -> bool:
    return any(result.task_summary for result in results)


def has_equal_time(results: list[ArmResult]) -> bool:
    return any(result.equal_time for result in results)


def secondary_names(results: list[ArmResult]) -> list[str]:
    """Return the names of the secondary metrics in all rows, in order of appearance."""
    return list({metric_name: None for result in results for metric_name in result.secondary})


def count_decimals(
    means: Sequence[Estimate | None], *differences: Sequence[Estimate | None]
) -> int:
    """Return the number of decimals of means and differences.

    Both have the same number, so that they visibly add up. It shows two digits of the typical
    interval width in the column with the narrowest intervals, and at most five digits of the
    largest mean.
    """
    # The largest mean limits the decimals.
    largest = max((abs(estimate.mean) for estimate in means if estimate), default=0.0) or 1.0
    max_decimals = 4 - math.floor(math.log10(largest))
    # The median width of the intervals of each column asks for two digits.
    decimals = []
    for column in (means, *differences):
        widths = sorted(estimate.width for estimate in column if estimate and estimate.width > 0)
        if widths:
            decimals.append(1 - math.floor(math.log10(widths[len(widths) // 2])))
    return max(0, min(max(decimals, default=max_decimals - 1), max_decimals))


def format_interval(estimate: Estimate | None, decimals: int, sign: str = '') -> Cell:
    """Format the mean and [low, high], in scientific notation if all decimals would be zero."""
    if estimate is None:
        return Cell(NONE)
    bounds = [bound for bound in (estimate.mean, estimate.low, estimate.high) if bound is not None]
    # A number whose digits would all be zeros is written as a power of ten.
    vanishes = 0 < max(map(abs, bounds)) < 0.5 * 10**-decimals
    number_format = f'{sign}.0e' if vanishes else f'{sign}z.{decimals}f'
    mean, low, high = (
        NONE if bound is None else f'{bound:{number_format}}'.replace('-', '−')
        for bound in (estimate.mean, estimate.low, estimate.high)
    )
    detail = '' if estimate.low is None else f'[{low}, {high}]'
    return Cell(mean, detail, estimate.mean)


def format_test(test: SignFlipTest | None) -> Cell:
    if test is None:
        return Cell(NONE)
    detail = '' if test.can_be_significant else 'too few'
    return Cell(statistics.format_p(test.p_holm), detail, test.p_holm)


def _pair_cell(values: list[str], value: float | None) -> Cell:
    model, fusion = values
    return Cell(NONE) if model == fusion == NONE else Cell(model, f'/ {fusion}', value)


def _format_significant(value: float | None) -> str:
    """Format four significant digits, with an exponent only if most digits would be zeros."""
    if value is None:
        return NONE
    if value and not 1e-4 <= abs(value) < 1e7:
        return f'{value:.3e}'.replace('-', '−')
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f'{value:,.{max(0, decimals)}f}'.replace('-', '−')


def _format_short(value: float | None) -> str:
    """Format three significant digits with a unit prefix: 2400000 → 2.40 M."""
    if value is None:
        return NONE
    exponent = next((power for power in (12, 9, 6, 3) if abs(value) >= 0.9995 * 10**power), 0)
    # Three digits before the point, or a small whole number, need no decimals.
    scaled = abs(value) / 10**exponent
    if scaled >= 99.95 or scaled == abs(value) == int(scaled):
        decimals = 0
    else:
        decimals = 2 if scaled < 9.995 else 1
    return f'{value / 10**exponent:.{decimals}f}{PREFIX[exponent]}'


def format_seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f'{value:,.1f}' if value < 100 else f'{value:,.0f}'


def shorten(text: str) -> str:
    """Shorten a text to one line of at most 80 characters."""
    return textwrap.shorten(text, 80, placeholder='…')


def escape_markdown(text: str) -> str:
    """Escape a text for Markdown, on one line."""
    # A bracket makes a link only before one of ([: and stays unescaped elsewhere: [2.1, 2.3].
    text = re.sub(r'[\\|*_`~$]|\](?=[(\[:])', r'\\\g<0>', text)
    return ' '.join(text.replace('&', '&amp;').replace('<', '&lt;').split())
