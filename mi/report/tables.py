"""One row per arm, as CSV with every digit and as Markdown, LaTeX and text with those that count.

`cells` puts the numbers in words; what writes a format only escapes and lays out these cells.
"""

import csv
import io
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import rich.table
import rich.text

from mi.report import arms, statistics
from mi.report.arms import Row
from mi.report.runs import Sweep
from mi.report.statistics import Estimate, Test

NONE = '—'
PREFIX = {12: ' T', 9: ' G', 6: ' M', 3: ' k', 0: ''}


class Cell(NamedTuple):
    """A number or word, what stands smaller beside or under it, and what a column is sorted by."""

    main: str
    detail: str = ''
    value: float | None = None

    def __str__(self) -> str:
        return f'{self.main} {self.detail}'.strip()


class Table(NamedTuple):
    """Cells of the header and of the rows, and the indices of the rows with the best mean."""

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
            f'quickest was done, {_seconds(arms.quickest(sweep))} s of training.'
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
    return [what, *([warning] if (warning := too_few(rows)) else [])]


def too_few(rows: list[Row]) -> str | None:
    """A warning where no difference could be significant, however large; None where one could."""
    tests = [row.test for row in rows if row.test is not None]
    if not tests or any(test.can_tell for test in tests):
        return None
    pairs = max(row.difference.n for row in rows if row.difference is not None)
    best = min(tests, key=lambda test: test.least_holm)
    holm = f', {_p(best.least_holm)} after Holm for {len(tests)} arms' if len(tests) > 1 else ''
    return (
        f'Too few seeds to call any difference significant: with {pairs} pairs even differences '
        f'that all agree in sign have p = {_p(best.least)}{holm}. '
        f'{statistics.seeds_needed(len(tests))} seeds are the fewest '
        f'that can reach {statistics.ALPHA}.'
    )


def words(name: str) -> str:
    """bits_per_byte → bits per byte."""
    return name.replace('_', ' ')


def cells(sweep: Sweep, rows: list[Row]) -> Table:
    """The table in words, the same for every format but CSV."""
    places = digits([row.metric for row in rows], [row.difference for row in rows])
    several = len(rows) > 1
    arrow = (' ↓' if sweep.lower_is_better else ' ↑') if several else ''
    secondary = _secondary(rows)
    header = [Cell('arm'), Cell(f'{words(sweep.metric)}{arrow}', '[95 %]')]
    if sweep.baseline is not None:
        header += [Cell(f'difference to {sweep.baseline}', '[95 %]'), Cell('verdict')]
        holm = sum(row.test is not None for row in rows) > 1
        header += [Cell('p', 'Holm' if holm else '')]
    of_tasks, equal_time = _optional(rows)
    if of_tasks:
        header += [Cell(f'median{arrow}', '[95 %]'), Cell(f'IQM{arrow}', '[95 %]')]
        if sweep.baseline is not None:
            header += [Cell('P(improvement)', '[95 %]')]
    if equal_time:
        seconds = _seconds(arms.quickest(sweep))
        header += [Cell(f'{sweep.curves} after {seconds} s{arrow}', '[95 %]')]
    header += [Cell(words(name)) for name in secondary]
    header += [Cell('parameters', '/ fusion'), Cell(f'FLOPs per {sweep.unit}', '/ fusion')]
    header += [Cell('train seconds'), Cell(f'{sweep.unit}s/s'), Cell('seeds'), Cell('state')]
    body = []
    for row in rows:
        line = [Cell(row.arm.label), interval(row.metric, places)]
        if sweep.baseline is not None:
            is_baseline = row.arm.label == sweep.baseline
            line += [interval(row.difference, places, '+')]
            verdict = Cell('baseline' if is_baseline else row.verdict or NONE)
            if row.verdict and row.difference:
                verdict = Cell(row.verdict, f'(n = {row.difference.n})')
            line += [verdict, tested(row.test)]
        if of_tasks:
            line += [
                interval(row.tasks.median if row.tasks else None, places),
                interval(row.tasks.iqm if row.tasks else None, places),
            ]
            if sweep.baseline is not None:
                line += [interval(row.tasks.improvement if row.tasks else None, 2)]
        if equal_time:
            line += [interval(row.equal_time, places)]
        others = [row.secondary.get(name) for name in secondary]
        line += [Cell(_significant(value), value=value) for value in others]
        parameters, flops = (
            [row.arm.counted(what, part) for part in ('model', 'fusion')]
            for what in ('parameters', f'flops_per_{sweep.unit}')
        )
        line += [_pair([NONE if p is None else f'{p:,}' for p in parameters], parameters[0])]
        line += [_pair([_short(f) for f in flops], flops[0])]
        line += [Cell(_seconds(row.seconds), value=row.seconds)]
        line += [Cell(_short(row.rate), value=row.rate)]
        have, asked = len(row.final), len(row.arm.seeds)
        line += [Cell(f'{have}' if have == asked else f'{have} of {asked}', value=have)]
        line += [Cell(row.arm.state, f'({_one_line(row.arm.reason)})' if row.arm.reason else '')]
        body.append(line)
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
    return Table(header, body, best)


def to_csv(sweep: Sweep, rows: list[Row]) -> str:
    """Every digit, one name per column, empty where there is no value."""
    secondary = _secondary(rows)
    lines = []
    for row in rows:
        line: dict[str, object] = {'arm': row.arm.label, 'state': row.arm.state}
        line |= {'reason': row.arm.reason, 'split': sweep.split, 'metric': sweep.metric}
        for name, e in (('', row.metric), ('difference_', row.difference)):
            line |= {f'{name}{key}': getattr(e, key, None) for key in ('mean', 'low', 'high')}
        line |= {'p': row.test and row.test.p, 'p_holm': row.test and row.test.holm}
        for name in ('median', 'iqm', 'improvement'):
            e = getattr(row.summary, name, None)
            line |= {f'{name}_{key}': getattr(e, key, None) for key in ('mean', 'low', 'high')}
        e = row.equal_time
        line |= {f'equal_time_{key}': getattr(e, key, None) for key in ('mean', 'low', 'high')}
        line |= {'difference_pairs': row.difference and row.difference.n, 'verdict': row.verdict}
        line |= {name: row.secondary.get(name) for name in secondary}
        for what in ('parameters', f'flops_per_{sweep.unit}'):
            line |= {f'{what}_{part}': row.arm.counted(what, part) for part in ('model', 'fusion')}
        line |= {'train_seconds': row.seconds, f'{sweep.unit}s_per_second': row.rate}
        line |= {'seeds': len(row.final), 'seeds_asked': len(row.arm.seeds)}
        lines.append(line | {'remarks': '; '.join(row.remarks)})
    file = io.StringIO()
    writer = csv.DictWriter(file, lines[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
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
    header, body, best = cells(sweep, rows)
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


def to_latex(sweep: Sweep, rows: list[Row]) -> str:
    """A booktabs table, made smaller only if it is wider than the line; details on a second line.

    Reasons stand in the caption, where there is room for them.
    """
    header, body, best = cells(sweep, rows)
    head = ' & '.join(map(_stack, header))
    lines = []
    for i, line in enumerate(body):
        mains = [_latex(cell.main) for cell in line]
        details = [rf'\scriptsize {_latex(cell.detail)}' * bool(cell.detail) for cell in line[:-1]]
        if i in best:
            mains[1] = rf'\textbf{{{mains[1]}}}'
        lines.append(' & '.join(mains) + r' \\')
        if any(details):
            lines.append(' & '.join([*details, '']) + r' \\')
    inner = '\n'.join(lines)
    ends = [
        f'{row.arm.label}: {row.arm.state}, {_one_line(row.arm.reason)}'
        for row in rows
        if row.arm.reason
    ]
    said = [sweep.title, *notes(sweep, rows), *ends]
    caption = ' '.join(f'{_latex(text.rstrip(".…"))}.' for text in said)
    made = f'Made by python -m mi.report --workdir={sweep.path}'
    made += f' from runs of: {sweep.command}' if sweep.command else ''
    return f"""% {' '.join(made.split())}
% Needs \\usepackage{{booktabs,graphicx}}.
\\begin{{table}}
\\centering
\\setlength{{\\tabcolsep}}{{4pt}}
\\caption{{{caption}}}
\\medskip
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}
\\toprule
{head} \\\\
\\midrule
{inner}
\\bottomrule
\\end{{tabular}}}}
\\end{{table}}
"""


def to_terminal(sweep: Sweep, rows: list[Row]) -> rich.table.Table:
    """The table without the secondary metrics, so that it fits on a screen."""
    header, body, best = cells(sweep, rows)
    of_tasks, equal_time = _optional(rows)
    first = (5 if sweep.baseline is not None else 2) + 3 * of_tasks + equal_time
    keep = [i for i in range(len(header)) if not first <= i < first + len(_secondary(rows))]
    return terminal(
        sweep.title,
        [header[i] for i in keep],
        [[line[i] for i in keep] for line in body],
        best,
    )


def terminal(
    title: str, header: list[Cell], body: list[list[Cell]], best: Collection[int] = ()
) -> rich.table.Table:
    """Cells for a screen: the first and the last column to the left; the second of `best` bold."""
    table = rich.table.Table(title=rich.text.Text(title), title_justify='left')
    for i, head in enumerate(header):
        text = rich.text.Text('\n'.join(filter(None, head[:2])))
        left = i in (0, len(header) - 1)
        table.add_column(text, justify='left' if left else 'right', overflow='fold')
    for number, line in enumerate(body):
        table.add_row(
            *(
                rich.text.Text.assemble(
                    (cell.main, 'bold' * (i == 1 and number in best)),
                    '\n' * bool(cell.detail),
                    cell.detail,
                )
                for i, cell in enumerate(line)
            )
        )
    return table


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
    return Cell(_p(test.holm), '' if test.can_tell else 'too few', test.holm)


def _p(value: float) -> str:
    """Two significant digits, as more are never meant."""
    return '<0.001' if value < 0.001 else f'{value:.{2 if value >= 0.0995 else 3}f}'


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


def _one_line(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder='…')


def escaped(text: str) -> str:
    """A text in Markdown, on one line."""
    # A bracket makes a link only before one of ([: and is left alone elsewhere: [2.1, 2.3].
    text = re.sub(r'[\\|*_`~$]|\](?=[(\[:])', r'\\\g<0>', text)
    return ' '.join(text.replace('&', '&amp;').replace('<', '&lt;').split())


LATEX = str.maketrans({
    '\\': r'\textbackslash{}', '{': r'\{', '}': r'\}', '&': r'\&', '%': r'\%', '$': r'\$',
    '#': r'\#', '_': r'\_', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
    '−': '$-$', '↓': r'$\downarrow$', '↑': r'$\uparrow$', '—': '---', '…': r'\dots{}',
    '<': '$<$', '>': '$>$', '[': '{[}', ']': '{]}', '\n': ' ',
})  # fmt: skip


def _stack(cell: Cell) -> str:
    """A head of narrow lines, so that the numbers set the width of the column."""
    lines = textwrap.wrap(cell.main, 12, break_long_words=False)
    stacked = r' \\ '.join(map(_latex, [*lines, *filter(None, [cell.detail])]))
    return rf'\shortstack[r]{{{stacked}}}'


def _latex(text: str) -> str:
    return text.translate(LATEX)
