"""The page: everything in one file, nothing is fetched, every word from a run is escaped.

The tables stand in the HTML; page.js sorts them, and draws the figures from the numbers that are
embedded as JSON. page.css has both faces, light and dark.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from mi.config import flatten
from mi.report import plots, statistics, tables
from mi.report.analysis import Row
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate

HERE = pathlib.Path(__file__).parent
POINTS = 500  # of a curve, at most; the figures for a paper have all


def page(sweep: Sweep, rows: list[Row], notes: list[str]) -> str:
    """The whole document.

    Args:
      notes: how the table is to be read, under it.
    """
    warning = statistics.too_few([row.test for row in rows])
    parts = [
        f'<h1>{escape(sweep.title)}</h1>',
        f'<p>{escape(_sentence(sweep))}</p>',
        f'<p class="warning" role="note">{escape(warning)}</p>' if warning else '',
        _table(sweep, rows),
        _notes([note for note in notes if note != warning]),
        _curves(sweep),
        _finals_and_cost(sweep, rows),
        _tasks(sweep, rows) if any(row.tasks for row in rows) else '',
        '<h2>What differs</h2>' + _differences(sweep) if len(rows) > 1 else '',
        '<h2>Runs</h2>',
        _runs(sweep),
        f'<h2>Command</h2><pre>{escape(str(sweep.command))}</pre>' if sweep.command else '',
        f'<script type="application/json" id="data">{_data(sweep, rows)}</script>',
        f'<script>{(HERE / "page.js").read_text(encoding="utf-8")}</script>',
    ]
    style = (HERE / 'page.css').read_text(encoding='utf-8')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f'<title>{escape(sweep.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n'
        + '\n'.join(filter(None, parts))
        + '\n</body>\n</html>\n'
    )


def _data(sweep: Sweep, rows: list[Row]) -> str:
    """What page.js draws, as JSON that can stand in a script element."""
    costs = [plots.costs(sweep, row) for row in rows]
    known = {
        name: words.format(unit=sweep.unit)
        for name, words in plots.COSTS.items()
        if any(cost[name] for cost in costs)
    }
    better = ', lower is better' if sweep.lower_is_better else ', higher is better'
    labels = [arm.label for arm in sweep.arms]
    data = {
        'metric': tables.words(sweep.metric),
        'split': sweep.split,
        'better': better if len(rows) > 1 else '',
        'lowerIsBetter': sweep.lower_is_better,
        'baseline': labels.index(sweep.baseline) if sweep.baseline is not None else None,
        'costs': known,
        'arms': [
            {
                'label': ' '.join(row.arm.label.split()),
                'state': row.arm.state,
                'why': row.arm.state if not row.final else 'not finite',
                'colour': colour,
                'dash': dash,
                'curve': _curve(sweep, row.arm),
                'final': _final(row),
                'costs': cost,
            }
            for row, (colour, dash), cost in zip(rows, plots.web_styles(sweep), costs, strict=True)
        ],
    }
    return json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')


def _curve(sweep: Sweep, arm: Arm) -> dict[str, Any] | None:
    line = plots.line(sweep, arm)
    if line is None:
        return None
    keep = np.unique(np.linspace(0, len(line.steps) - 1, POINTS).round().astype(int))
    seconds = plots.seconds_at(arm, line.steps)
    band = line.low is not line.mean
    return {
        'steps': line.steps[keep].tolist(),
        'seconds': None if seconds is None else _rounded(seconds[keep]),
        'mean': _rounded(line.mean[keep]),
        'low': _rounded(line.low[keep]) if band else None,
        'high': _rounded(line.high[keep]) if band else None,
    }


def _final(row: Row) -> dict[str, Any] | None:
    e = row.metric
    if e is None:
        return None
    return {'mean': e.mean, 'low': e.low, 'high': e.high, 'values': list(row.final.values())}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f'{value:.6g}') for value in values]


def _sentence(sweep: Sweep) -> str:
    metric = f'{tables.words(sweep.metric)} of the {sweep.split} split'
    if len(sweep.arms) == 1:
        return f'One run, {metric}.'
    better = 'lower' if sweep.lower_is_better else 'higher'
    text = f'{len(sweep.arms)} arms compared on {metric} ({better} is better)'
    paired = f'; differences are to {sweep.baseline}, paired by seed'
    return text + (paired if sweep.baseline is not None else '') + '.'


def _table(sweep: Sweep, rows: list[Row]) -> str:
    names, header, body, best = tables.cells(sweep, rows)
    columns = list(zip(*body, strict=True))
    numeric = [any(cell.value is not None for cell in column) for column in columns]
    word = [name in ('arm', 'verdict', 'state') for name in names]
    head = ''.join(
        f'<th scope="col"{_class("word", on=word[i])}>{_cell(cell)}</th>'
        for i, cell in enumerate(header)
    )
    lines = []
    for i, (row, line) in enumerate(zip(rows, body, strict=True)):
        tds = [f'<th scope="row">{_cell(line[0])}</th>']
        for column, cell in enumerate(line[1:], 1):
            kind = ['word'] * word[column]
            can_tell = row.test is not None and row.test.can_tell
            if names[column] == 'verdict' and can_tell:
                kind += {'better': ['good'], 'worse': ['bad']}.get(cell.main, [])
            value = _value(cell.value) if numeric[column] else ''
            text = _cell(cell, bold=column == 1 and i in best)
            tds.append(f'<td{_class(*kind)}{value}>{text}</td>')
        kind = ['baseline'] * (row.arm.label == sweep.baseline)
        lines.append(f'<tr{_class(*kind)}>{"".join(tds)}</tr>')
    return _wide(f'<tr>{head}</tr>', lines, 'sortable', 'Results')


def _class(*names: str, on: bool = True) -> str:
    return f' class="{" ".join(names)}"' if names and on else ''


def _value(value: float | None, name: str = 'value') -> str:
    """What a cell is sorted by; empty where there is nothing, so that it comes last."""
    return f' data-{name}="{"" if value is None else repr(float(value))}"'


def _wide(head: str, lines: Iterable[str], kind: str, name: str, more: str = '') -> str:
    """A table that scrolls by itself where the window is narrower."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="{kind}"{more}>\n<thead>{head}</thead>\n<tbody>\n'
        + '\n'.join(lines)
        + '\n</tbody></table></div>'
    )


def _cell(cell: tables.Cell, bold: bool = False) -> str:
    main = escape(cell.main).replace(' ↑', '&nbsp;↑').replace(' ↓', '&nbsp;↓')
    main = f'<b>{main}</b>' if bold else main
    return main + (f'<small>{escape(cell.detail)}</small>' if cell.detail else '')


def _notes(lines: Iterable[str]) -> str:
    items = ''.join(f'<li>{escape(line)}</li>\n' for line in lines)
    head = '<summary>How to read this</summary>'
    return f'<details open>{head}<ul class="soft">\n{items}</ul></details>'


def _words(header: Iterable[str], body: Iterable[Iterable[str]], name: str) -> str:
    head = ''.join(f'<th scope="col">{escape(word)}</th>' for word in header)
    lines = []
    for first, *rest in body:
        cells = ''.join(f'<td>{escape(word)}</td>' for word in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return _wide(f'<tr>{head}</tr>', lines, 'words sortable', name)


def _chart(name: str, text: str, caption: str, bar: bool = False) -> str:
    """A figure that page.js fills; `text` says what it shows to who does not see it."""
    return (
        '<figure>'
        + (f'<div class="bar" id="{name}-bar"></div>' if bar else '')
        + f'<div class="chart" id="{name}" role="img" aria-label="{escape(text)}">'
        + f'<noscript>JavaScript draws it; {name}.png and .pdf are beside this page.</noscript>'
        + f'</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _curves(sweep: Sweep) -> str:
    labels = ', '.join(arm.label for arm in sweep.arms)
    metric = f'{tables.words(sweep.metric)} of the {sweep.curves} split'
    caption = (
        f'{_capital(metric)}: mean over seeds and its 95 % bootstrap interval at each '
        'step. The vertical axis is that of the later half of training unless all is chosen.'
    )
    legend = (
        '<div class="bar legend" id="legend" role="group" aria-label="Arms shown in the figures">'
        '</div>'
    )
    chart = _chart('curves', f'{metric} over training: {labels}', caption, bar=True)
    return '<h2>Learning curves</h2>' + (legend if len(sweep.arms) > 1 else '') + chart


def _finals_and_cost(sweep: Sweep, rows: list[Row]) -> str:
    finals = 'A dot per seed, a bar at the mean, a line for its 95 % bootstrap interval'
    finals += f'; dashed: the mean of {sweep.baseline}.' if sweep.baseline is not None else '.'
    parts = ['<h2>Final values</h2>' + _chart('finals', _finals_text(sweep, rows), finals)]
    costs = [plots.costs(sweep, row) for row in rows if row.metric is not None]
    if len(costs) > 1 and any(value for cost in costs for value in cost.values()):
        text = f'{tables.words(sweep.metric)} against parameters, FLOPs and seconds of training'
        caption = (
            'Mean and 95 % bootstrap interval against what the whole model costs. Dashed: the best '
            'that there is for that cost or less; the arms on it are larger.'
        )
        parts.append('<h2>Cost against quality</h2>' + _chart('pareto', text, caption, bar=True))
    sections = ''.join(f'<section>{part}</section>' for part in parts)
    return f'<div class="pair">{sections}</div>'


def _finals_text(sweep: Sweep, rows: list[Row]) -> str:
    def value(e: Estimate) -> str:
        interval = '' if e.low is None else f' [{e.low:.4g}, {e.high:.4g}]'
        return f'{e.mean:.4g}{interval}'

    each = (f'{r.arm.label} {value(r.metric) if r.metric else r.arm.state}' for r in rows)
    return f'{tables.words(sweep.metric)} of the {sweep.split} split by arm: {"; ".join(each)}'


def _tasks(sweep: Sweep, rows: list[Row]) -> str:
    """A row per task and a column per arm, the tasks in the order of the mean over arms."""
    there = [row for row in rows if row.tasks is not None]
    means: dict[str, dict[str, float]] = {
        row.arm.label: dict(
            zip(row.tasks.tasks, row.tasks.scores.mean(axis=0).tolist(), strict=True)
        )
        for row in there
        if row.tasks is not None
    }
    baseline = means.get(sweep.baseline or '', {})
    tasks = list(dict.fromkeys(task for of_arm in means.values() for task in of_arm))
    tasks.sort(key=lambda t: -float(np.mean([of[t] for of in means.values() if t in of])))
    head = ''.join(f'<th scope="col">{escape(word)}</th>' for word in ['task', *means])
    lines = []
    for task in tasks:
        cells = []
        for of_arm in means.values():
            value = of_arm.get(task)
            other = baseline.get(task)
            gap = None if value is None or other is None else value - other
            text = tables.NONE if value is None else f'{value:.4g}'
            cells.append(f'<td{_value(value)}{_value(gap, "gap")}>{text}</td>')
        lines.append(f'<tr><th scope="row">{escape(task)}</th>{"".join(cells)}</tr>')
    size = max(abs(v) for of_arm in means.values() for v in of_arm.values())
    places = f' data-digits="{2 if size < 10 else 1 if size < 1000 else 0}"'
    caption = (
        f'{_capital(tables.words(sweep.metric))} of the {sweep.split} split, mean over seeds; the '
        'stronger the colour, the better. Differences: blue is better than the baseline, orange '
        'worse.'
    )
    table = _wide(f'<tr>{head}</tr>', lines, 'heat sortable', 'Tasks', places)
    return (
        f'<h2>Tasks</h2><div class="bar" id="tasks-bar"></div>{table}'
        f'<p class="soft">{escape(caption)}</p>'
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _differences(sweep: Sweep) -> str:
    """The config keys in which any arm differs from the baseline, or from the first arm."""
    baseline = next((a for a in sweep.arms if a.label == sweep.baseline), sweep.arms[0])
    reference = flatten(baseline.config)
    values = {arm.label: _settings(arm, reference) for arm in sweep.arms}
    keys = [
        key
        for key in sorted({key for of_arm in values.values() for key in of_arm})
        if any(_word(of_arm, key) != _word(reference, key) for of_arm in values.values())
    ]
    if not keys:
        return '<p>The configs are equal.</p>'
    head = ''.join(f'<th scope="col">{_breakable(key)}</th>' for key in ['arm', *keys])
    lines = []
    for arm in [baseline, *(arm for arm in sweep.arms if arm is not baseline)]:
        cells = []
        for key in keys:
            word = _word(values[arm.label], key)
            same = 'same' if word == _word(reference, key) else 'other'
            kind = '' if arm is baseline else f' class="{same}"'
            cells.append(f'<td{kind}>{escape(word)}</td>')
        kind = ' class="baseline"' if arm is baseline else ''
        lines.append(f'<tr{kind}><th scope="row">{escape(arm.label)}</th>{"".join(cells)}</tr>')
    return _wide(f'<tr>{head}</tr>', lines, 'words sortable', 'Configs that differ') + (
        f'<p class="soft">Bold: another value than that of {escape(baseline.label)}.</p>'
    )


def _settings(arm: Arm, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Its config; where it has none yet, the reference's with its overrides."""
    return flatten(arm.config) or {**reference, **arm.overrides}


def _word(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else tables.NONE


def _breakable(key: str) -> str:
    """A dotted key that may break after its dots."""
    return '<wbr>'.join(escape(part) for part in key.replace('.', '.\n').split('\n'))


def _runs(sweep: Sweep) -> str:
    def line(arm: Arm) -> list[str]:
        facts = [arm.status.get(key) for key in ('step', 'machine', 'updated')]
        seeds = ', '.join(map(str, arm.seeds))
        words = [tables.NONE if fact is None else str(fact) for fact in facts]
        words[-1] = words[-1].replace('T', ' ').replace('+00:00', ' UTC')
        return [arm.label, arm.state, arm.reason or tables.NONE, seeds or tables.NONE, *words]

    header = ['arm', 'state', 'reason', 'seeds', 'step', 'machine', 'updated']
    return _words(header, map(line, sweep.arms), 'Runs')
