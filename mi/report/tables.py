"""One row per arm, as CSV with every digit and as Markdown, LaTeX and text with those that count.

`cells` puts the numbers in words; what writes a format only escapes and lays out these cells.
"""

import collections
import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from mi.report import analysis, statistics
from mi.report.analysis import Row
from mi.report.runs import Sweep
from mi.report.statistics import Estimate, Test

NONE = '—'
METRIC = 'metric/'  # of the names of columns, before that of a secondary metric
PREFIX = {12: ' T', 9: ' G', 6: ' M', 3: ' k', 0: ''}


class Cell(NamedTuple):
    """A number or word, what stands smaller beside or under it, and what a column is sorted by."""

    main: str
    detail: str = ''
    value: float | None = None

    def __str__(self) -> str:
        return f'{self.main} {self.detail}'.strip()


class Table(NamedTuple):
    """A table in words.

    Attributes:
      columns: the name of each column, which a program tells it by; metrics by METRIC/NAME.
      header, body: its cells.
      best: the indices of the rows with the best mean.
    """

    columns: list[str]
    header: list[Cell]
    body: list[list[Cell]]
    best: set[int]


def notes(sweep: Sweep, rows: list[Row]) -> list[str]:
    """What has to be read with the table, in every format."""
    counts = sorted({row.metric.n for row in rows if row.metric is not None})
    if len(counts) == 1:
        seeds = f'{counts[0]} {"seed" if counts == [1] else "seeds"} per arm.'
    elif counts:
        each = (f'{r.arm.label} {r.metric.n}' for r in rows if r.metric is not None)
        seeds = f'The arms differ in their number of seeds: {", ".join(each)}.'
    else:
        seeds = 'No arm has a final record yet.'
    standing = [f'{seeds} {statistics.CAUTION}' + ' One seed has no interval.' * (1 in counts)]
    if sweep.baseline is not None:
        standing.append(
            f'Differences are arm − {sweep.baseline}, paired by seed; better and worse say '
            'that their interval excludes zero.'
        )
        standing += _of_tests(rows)
    of_tasks, equal_time = _optional(rows)
    if of_tasks:
        own_runs = any(row.tasks.own_runs for row in rows if row.tasks)
        drawn = (
            'All intervals of this table draw the runs of each task on their own: every task was '
            'learnt by runs of its own (stratified bootstrap)'
            if own_runs
            else 'Their intervals draw whole seeds with all their tasks, which one agent learns'
        )
        improvement = (
            f'P(improvement): how probably a seed of this arm beats a seed of {sweep.baseline} on '
            'a task, ties counted half; 0.5 means neither. '
            if sweep.baseline is not None
            else ''
        )
        standing.append(
            'Means are over tasks and seeds. Median: over tasks, of their means over seeds. IQM: '
            f'the mean of the middle half of all scores of tasks and seeds. {improvement}{drawn}.'
        )
    if equal_time:
        standing.append(
            f'At equal time: the last {sweep.curves} record that an arm had reached when the '
            f'quickest was done, {_seconds(analysis.quickest(sweep))} s of training.'
        )
    standing.append(
        'Parameters and FLOPs: the whole model / the fusion alone. FLOPs per '
        f'{sweep.unit}: forward, matrix products only, a multiply-add counts as two. Seconds and '
        f'{sweep.unit}s/s: training, all seeds of the run together.'
    )
    if len(rows) > 1:
        of_what = ' of each problem' if len(sweep.by_problem()) > 1 else ''
        standing.append(f'Bold marks the best mean{of_what} and claims no significance.')
    return [*standing, *(remark for row in rows for remark in row.remarks), *sweep.notes]


def _of_tests(rows: list[Row]) -> list[str]:
    tests = [row.test for row in rows if row.test is not None]
    if not tests:
        return []
    corrected = (
        f', corrected by Holm for the {len(tests)} arms; the intervals are not'
        if len(tests) > 1
        else ''
    )
    what = (
        'p: how probably differences of these sizes have a mean so far from zero if each sign is '
        f'chance, an exact two-sided permutation test{corrected}.'
    )
    warning = statistics.too_few([row.test for row in rows])
    return [what, *([warning] if warning else [])]


def words(name: str) -> str:
    """bits_per_byte → bits per byte."""
    return name.replace('_', ' ')


def cells(sweep: Sweep, rows: list[Row]) -> Table:
    """The table in words, the same for every format but CSV."""
    places = digits([row.metric for row in rows], [row.difference for row in rows])
    arrow = (' ↓' if sweep.lower_is_better else ' ↑') if len(rows) > 1 else ''
    compared = sweep.baseline is not None
    of_tasks, equal_time = _optional(rows)

    # Each column: its name, its head, and its cell of a row.
    columns: list[tuple[str, Cell, Callable[[Row], Cell]]] = []

    def add(name: str, head: Cell, cell: Callable[[Row], Cell]) -> None:
        columns.append((name, head, cell))

    add('arm', Cell('arm'), lambda row: Cell(row.arm.label))
    head = Cell(f'{words(sweep.metric)}{arrow}', '[95 %]')
    add('metric', head, lambda row: interval(row.metric, places))
    if compared:
        head = Cell(f'difference to {sweep.baseline}', '[95 %]')
        add('difference', head, lambda row: interval(row.difference, places, '+'))
        add('verdict', Cell('verdict'), lambda row: _verdict(sweep, row))
        holm = sum(row.test is not None for row in rows) > 1
        add('p', Cell('p', 'Holm' if holm else ''), lambda row: tested(row.test))
    if of_tasks:
        for name, word in (('median', 'median'), ('iqm', 'IQM')):
            add(name, Cell(f'{word}{arrow}', '[95 %]'), _of_tasks_cell(name, places))
        if compared:
            add('improvement', Cell('P(improvement)', '[95 %]'), _of_tasks_cell('improvement', 2))
    if equal_time:
        head = Cell(f'{sweep.curves} after {_seconds(analysis.quickest(sweep))} s{arrow}', '[95 %]')
        add('equal_time', head, lambda row: interval(row.equal_time, places))
    secondary = len(columns)
    add('parameters', Cell('parameters', '/ fusion'), _parameters)
    add('flops', Cell(f'FLOPs per {sweep.unit}', '/ fusion'), lambda row: _flops(row, sweep.unit))
    head = Cell('train seconds')
    add('seconds', head, lambda row: Cell(_seconds(row.seconds), value=row.seconds))
    head = Cell(f'{sweep.unit}s/s')
    add('rate', head, lambda row: Cell(_short(row.rate), value=row.rate))
    add('seeds', Cell('seeds'), _seeds)
    add('state', Cell('state'), _state)
    heads = [column[1].main.removesuffix(arrow) for column in columns]
    columns[secondary:secondary] = [
        (f'{METRIC}{name}', Cell(heading), _secondary_cell(name))
        for name, heading in _headings(_secondary(rows), heads, sweep.split).items()
    ]
    names, header, cell_of = (list(part) for part in zip(*columns, strict=True))
    body = [[cell(row) for cell in cell_of] for row in rows]
    best: set[int] = set()
    for of_problem in sweep.by_problem().values():
        labels = {arm.label for arm in of_problem}
        means = {
            i: row.metric.mean
            for i, row in enumerate(rows)
            if row.metric is not None and row.arm.label in labels and sweep.compares(row.arm)
        }
        target = (min if sweep.lower_is_better else max)(means.values(), default=None)
        best |= {i for i, mean in means.items() if mean == target and len(labels) > 1}
    return Table(names, header, body, best)


def _verdict(sweep: Sweep, row: Row) -> Cell:
    if row.verdict and row.difference:
        return Cell(row.verdict, f'(n = {row.difference.n})')
    return Cell('baseline' if row.arm.label == sweep.baseline else row.verdict or NONE)


def _of_tasks_cell(name: str, places: int) -> Callable[[Row], Cell]:
    return lambda row: interval(getattr(row.tasks, name) if row.tasks else None, places)


def _secondary_cell(name: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(_significant(row.secondary.get(name)), value=row.secondary.get(name))


def _parameters(row: Row) -> Cell:
    counts = [row.arm.counted('parameters', part) for part in ('model', 'fusion')]
    return _pair([NONE if count is None else f'{count:,}' for count in counts], counts[0])


def _flops(row: Row, unit: str) -> Cell:
    counts = [row.arm.counted(f'flops_per_{unit}', part) for part in ('model', 'fusion')]
    return _pair([_short(count) for count in counts], counts[0])


def _seeds(row: Row) -> Cell:
    have, asked = len(row.final), len(row.arm.seeds)
    return Cell(f'{have}' if have == asked else f'{have} of {asked}', value=have)


def _state(row: Row) -> Cell:
    return Cell(row.arm.state, f'({one_line(row.arm.reason)})' if row.arm.reason else '')


def _headings(names: Iterable[str], taken: Collection[str], split: str) -> dict[str, str]:
    """Words over the columns of metrics; one that another column has is told apart by its split."""
    names = list(names)
    uses = collections.Counter([*map(words, names), *taken])
    return {name: words(name) if uses[words(name)] == 1 else f'{name} ({split})' for name in names}


def to_csv(sweep: Sweep, rows: list[Row]) -> str:
    """Every digit, one name per column, empty where there is no value.

    A metric with the name of another column is called SPLIT/NAME.
    """
    estimate = ('mean', 'low', 'high')
    before, metrics, after = [], [], []
    for row in rows:
        line: dict[str, object] = {'arm': row.arm.label, 'state': row.arm.state}
        line |= {'reason': row.arm.reason, 'split': sweep.split, 'metric': sweep.metric}
        for name, e in (('', row.metric), ('difference_', row.difference)):
            line |= {f'{name}{key}': getattr(e, key, None) for key in estimate}
        line |= {'p': row.test and row.test.p, 'p_holm': row.test and row.test.holm}
        for name in ('median', 'iqm', 'improvement'):
            e = getattr(row.summary, name, None)
            line |= {f'{name}_{key}': getattr(e, key, None) for key in estimate}
        line |= {f'equal_time_{key}': getattr(row.equal_time, key, None) for key in estimate}
        pairs = row.test.pairs if row.test else row.difference and row.difference.n
        before.append(line | {'difference_pairs': pairs, 'verdict': row.verdict})
        metrics.append({name: row.secondary.get(name) for name in _secondary(rows)})
        line = {}
        for what in ('parameters', f'flops_per_{sweep.unit}'):
            line |= {f'{what}_{part}': row.arm.counted(what, part) for part in ('model', 'fusion')}
        line |= {'train_seconds': row.seconds, f'{sweep.unit}s_per_second': row.rate}
        line |= {'seeds': len(row.final), 'seeds_asked': len(row.arm.seeds)}
        after.append(line | {'remarks': '; '.join(row.remarks)})
    fixed = before[0].keys() | after[0].keys()
    names = [f'{sweep.split}/{name}' if name in fixed else name for name in metrics[0]]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow([*before[0], *names, *after[0]])
    for parts in zip(before, metrics, after, strict=True):
        writer.writerow([value for part in parts for value in part.values()])
    return file.getvalue()


def tasks_to_csv(rows: list[Row]) -> str:
    """Every final score of a task, in the order of the seeds that have all of them."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['arm', 'task', 'number', 'score'])
    for row in rows:
        for i, task in enumerate(row.tasks.tasks if row.tasks else ()):
            assert row.tasks is not None
            for number, value in enumerate(row.tasks.scores[:, i]):
                writer.writerow([row.arm.label, task, number, value])
    return file.getvalue()


def to_markdown(sweep: Sweep, rows: list[Row]) -> str:
    _, header, body, best = cells(sweep, rows)
    text = [[escaped(str(cell)) for cell in line] for line in body]
    for i in best:
        mean, detail, _ = body[i][1]
        text[i][1] = f'**{escaped(mean)}** {escaped(detail)}'.strip()
    table = _grid([escaped(str(cell)) for cell in header], text)
    listed = '\n'.join(f'- {escaped(note)}' for note in notes(sweep, rows))
    return f'### {escaped(sweep.title)}\n\n{table}\n\n{listed}\n'


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of plain words, the first column to the left and the others to the right."""
    return _grid(list(map(escaped, header)), [list(map(escaped, line)) for line in body])


def _grid(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *body]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _optional(rows: list[Row]) -> tuple[bool, bool]:
    """Whether there are columns for scores of tasks, and for equal time."""
    return any(row.tasks for row in rows), any(row.equal_time for row in rows)


def _secondary(rows: list[Row]) -> list[str]:
    return list({name: None for row in rows for name in row.secondary})


def digits(means: Sequence[Estimate | None], *others: Sequence[Estimate | None]) -> int:
    """Digits after the point, of means and differences alike, so that they add up for the eye.

    Two digits of the typical interval of whichever column is narrowest, at most five of the largest
    of the first column.
    """
    size = max((abs(e.mean) for e in means if e), default=0.0) or 1.0
    most = 4 - math.floor(math.log10(size))
    wanted = []
    for column in (means, *others):
        widths = sorted(e.width for e in column if e and e.width > 0)
        if widths:
            wanted.append(1 - math.floor(math.log10(widths[len(widths) // 2])))
    return max(0, min(max(wanted, default=most - 1), most))


def interval(estimate: Estimate | None, digits: int, sign: str = '') -> Cell:
    """mean and [low, high] in so many digits after the point, or by powers of ten if all are 0."""
    if estimate is None:
        return Cell(NONE)
    known = [x for x in (estimate.mean, estimate.low, estimate.high) if x is not None]
    vanishes = 0 < max(map(abs, known)) < 0.5 * 10**-digits
    form = f'{sign}.0e' if vanishes else f'{sign}z.{digits}f'
    mean, low, high = (
        NONE if x is None else f'{x:{form}}'.replace('-', '−')
        for x in (estimate.mean, estimate.low, estimate.high)
    )
    detail = '' if estimate.low is None else f'[{low}, {high}]'
    return Cell(mean, detail, estimate.mean)


def tested(test: Test | None) -> Cell:
    if test is None:
        return Cell(NONE)
    return Cell(statistics.words_of_p(test.holm), '' if test.can_tell else 'too few', test.holm)


def _pair(values: list[str], value: float | None) -> Cell:
    model, fusion = values
    return Cell(NONE) if model == fusion == NONE else Cell(model, f'/ {fusion}', value)


def _significant(value: float | None) -> str:
    """Four significant digits without an exponent, unless it would be mostly zeros."""
    if value is None:
        return NONE
    if value and not 1e-4 <= abs(value) < 1e7:
        return f'{value:.3e}'.replace('-', '−')
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f'{value:,.{max(0, digits)}f}'.replace('-', '−')


def _short(value: float | None) -> str:
    """Three significant digits with a unit's prefix: 2400000 → 2.40 M."""
    if value is None:
        return NONE
    power = next((p for p in (12, 9, 6, 3) if abs(value) >= 0.9995 * 10**p), 0)
    scaled = abs(value) / 10**power
    digits = 0 if scaled >= 99.95 or scaled == abs(value) == int(scaled) else 1 + (scaled < 9.995)
    return f'{value / 10**power:.{digits}f}{PREFIX[power]}'


def _seconds(value: float | None) -> str:
    return NONE if value is None else f'{value:,.1f}' if value < 100 else f'{value:,.0f}'


def one_line(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder='…')


def escaped(text: str) -> str:
    """A text in Markdown, on one line."""
    # A bracket makes a link only before one of ([: and is left alone elsewhere: [2.1, 2.3].
    text = re.sub(r'[\\|*_`~$]|\](?=[(\[:])', r'\\\g<0>', text)
    return ' '.join(text.replace('&', '&amp;').replace('<', '&lt;').split())
