"""The page: one file that fetches nothing, in which all text from runs is escaped.

The HTML contains the tables. page.js sorts them, and draws the figures from numbers that are
embedded as JSON. page.css has a light and a dark color scheme.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from mi.config import flatten
from mi.report import figures, statistics, tables
from mi.report.analysis import Row
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate
from mi.report.tables import Cell

HERE = pathlib.Path(__file__).parent
MAX_POINTS = 500  # largest number for a curve on the page; the figures for a paper have all points


def render_page(sweep: Sweep, rows: list[Row], notes: list[str]) -> str:
    """Return the HTML document.

    Args:
      sweep: the sweep.
      rows: its rows.
      notes: shown below the table.
    """
    # The sections of the page; the warning about too few seeds moves from the notes to the top.
    warning = statistics.warn_too_few_seeds([row.test for row in rows])
    parts = [
        f'<h1>{escape(sweep.title)}</h1>',
        f'<p>{escape(_introduce(sweep))}</p>',
        f'<p class="warning" role="note">{escape(warning)}</p>' if warning else '',
        _results_table(sweep, rows),
        _note_list([note for note in notes if note != warning]),
        _curves_section(sweep),
        _finals_and_cost_sections(sweep, rows),
        _tasks_section(sweep, rows) if tables.has_tasks(rows) else '',
        f'<h2>What differs</h2>{_config_table(sweep)}' if len(rows) > 1 else '',
        f'<h2>Runs</h2>\n{_runs_table(sweep)}',
        f'<h2>Command</h2><pre>{escape(str(sweep.command))}</pre>' if sweep.command else '',
        f'<script type="application/json" id="data">{_page_data(sweep, rows)}</script>',
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


def _page_data(sweep: Sweep, rows: list[Row]) -> str:
    """Return the data of page.js, as JSON that is safe inside a script element."""
    # Only costs that some arm recorded can be chosen on the page.
    arm_costs = [figures.list_costs(sweep, row) for row in rows]
    recorded_costs = {
        name: text.format(unit=sweep.unit)
        for name, text in figures.COSTS.items()
        if any(costs[name] for costs in arm_costs)
    }
    better = ''
    if len(rows) > 1:
        better = ', lower is better' if sweep.lower_is_better else ', higher is better'
    labels = [arm.label for arm in sweep.arms]
    styles = figures.web_styles(sweep)
    data = {
        'metric': tables.humanize(sweep.metric),
        'split': sweep.split,
        'better': better,
        'lowerIsBetter': sweep.lower_is_better,
        'baseline': labels.index(sweep.baseline) if sweep.baseline is not None else None,
        'costs': recorded_costs,
        'arms': [
            {
                'label': ' '.join(row.arm.label.split()),
                'state': row.arm.state,
                'why': row.arm.state if not row.final else 'not finite',
                'color': color,
                'dash': dashes,
                'curve': _curve_data(sweep, row.arm),
                'final': _final_data(row),
                'costs': costs,
            }
            for row, (color, dashes), costs in zip(rows, styles, arm_costs, strict=True)
        ],
    }
    return json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')


def _curve_data(sweep: Sweep, arm: Arm) -> dict[str, Any] | None:
    curve = figures.make_curve(sweep, arm)
    if curve is None:
        return None
    indices = np.linspace(0, len(curve.steps) - 1, MAX_POINTS).round().astype(int)
    indices = np.unique(indices)
    seconds = figures.seconds_at(arm, curve.steps)
    has_band = curve.low is not curve.mean
    return {
        'steps': curve.steps[indices].tolist(),
        'seconds': None if seconds is None else _round_values(seconds[indices]),
        'mean': _round_values(curve.mean[indices]),
        'low': _round_values(curve.low[indices]) if has_band else None,
        'high': _round_values(curve.high[indices]) if has_band else None,
    }


def _final_data(row: Row) -> dict[str, Any] | None:
    estimate = row.metric
    if estimate is None:
        return None
    values = list(row.final.values())
    return {'mean': estimate.mean, 'low': estimate.low, 'high': estimate.high, 'values': values}


def _round_values(values: np.ndarray) -> list[float]:
    return [float(f'{value:.6g}') for value in values]


def _introduce(sweep: Sweep) -> str:
    """Return a sentence on what is compared."""
    metric = f'{tables.humanize(sweep.metric)} of the {sweep.split} split'
    if len(sweep.arms) == 1:
        return f'One run, {metric}.'
    better = 'lower' if sweep.lower_is_better else 'higher'
    text = f'{len(sweep.arms)} arms compared on {metric} ({better} is better)'
    if sweep.baseline is not None:
        text += f'; differences are to {sweep.baseline}, paired by seed'
    return f'{text}.'


def _results_table(sweep: Sweep, rows: list[Row]) -> str:
    table = tables.make_table(sweep, rows)
    is_numeric = [
        any(cells[i].value is not None for cells in table.body) for i in range(len(table.columns))
    ]
    header = ''.join(
        f'<th scope="col"{_class_attribute("word" if column.terminal.wraps else "")}>'
        f'{_cell_html(cell)}</th>'
        for column, cell in zip(table.columns, table.header, strict=True)
    )
    lines = []
    for i, (row, cells) in enumerate(zip(rows, table.body, strict=True)):
        line = [f'<th scope="row">{_cell_html(cells[0])}</th>']
        for j, (column, cell) in enumerate(zip(table.columns, cells, strict=True)):
            if j == 0:
                continue
            classes = _class_attribute(
                'word' if column.terminal.wraps else '',
                _verdict_class(row, cell) if column.name == 'verdict' else '',
            )
            value = _data_attribute(cell.value) if is_numeric[j] else ''
            text = _cell_html(cell, bold=column.name == 'metric' and i in table.best)
            line.append(f'<td{classes}{value}>{text}</td>')
        is_baseline = row.arm.label == sweep.baseline
        lines.append(
            f'<tr{_class_attribute("baseline" if is_baseline else "")}>{"".join(line)}</tr>'
        )
    return _scrolling_table(f'<tr>{header}</tr>', lines, 'sortable', 'Results')


def _verdict_class(row: Row, cell: Cell) -> str:
    """Return the color class of a verdict; none where no difference could be significant."""
    if row.test is None or not row.test.can_be_significant:
        return ''
    return {'better': 'good', 'worse': 'bad'}.get(cell.main, '')


def _class_attribute(*names: str) -> str:
    classes = ' '.join(filter(None, names))
    return f' class="{classes}"' if classes else ''


def _data_attribute(value: float | None, name: str = 'value') -> str:
    """Return the attribute that a cell is sorted by; empty for None, which comes last."""
    return f' data-{name}="{"" if value is None else repr(float(value))}"'


def _scrolling_table(
    header: str, lines: Iterable[str], classes: str, name: str, attributes: str = ''
) -> str:
    """Return a table that scrolls sideways where the window is narrower."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="{classes}"{attributes}>\n<thead>{header}</thead>\n<tbody>\n'
        + '\n'.join(lines)
        + '\n</tbody></table></div>'
    )


def _cell_html(cell: Cell, bold: bool = False) -> str:
    main = escape(cell.main).replace(' ↑', '&nbsp;↑').replace(' ↓', '&nbsp;↓')
    if bold:
        main = f'<b>{main}</b>'
    return main + (f'<small>{escape(cell.detail)}</small>' if cell.detail else '')


def _note_list(notes: Iterable[str]) -> str:
    items = ''.join(f'<li>{escape(note)}</li>\n' for note in notes)
    summary = '<summary>How to read this</summary>'
    return f'<details open>{summary}<ul class="soft">\n{items}</ul></details>'


def _chart(name: str, label: str, caption: str, has_bar: bool = False) -> str:
    """Return a figure that page.js fills; `label` describes it to screen readers."""
    bar = f'<div class="bar" id="{name}-bar"></div>' if has_bar else ''
    return (
        f'<figure>{bar}'
        f'<div class="chart" id="{name}" role="img" aria-label="{escape(label)}">'
        f'<noscript>JavaScript draws it; {name}.png and .pdf are beside this page.</noscript>'
        f'</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _curves_section(sweep: Sweep) -> str:
    labels = ', '.join(arm.label for arm in sweep.arms)
    metric = f'{tables.humanize(sweep.metric)} of the {sweep.curves} split'
    caption = (
        f'{_capitalize(metric)}: mean over seeds and its 95 % bootstrap interval at each '
        'step. The vertical axis is that of the later half of training unless all is chosen.'
    )
    legend = ''
    if len(sweep.arms) > 1:
        legend = (
            '<div class="bar legend" id="legend" role="group" '
            'aria-label="Arms shown in the figures"></div>'
        )
    chart = _chart('curves', f'{metric} over training: {labels}', caption, has_bar=True)
    return f'<h2>Learning curves</h2>{legend}{chart}'


def _finals_and_cost_sections(sweep: Sweep, rows: list[Row]) -> str:
    caption = 'A dot per seed, a bar at the mean, a line for its 95 % bootstrap interval'
    if sweep.baseline is not None:
        caption += f'; dashed: the mean of {sweep.baseline}'
    chart = _chart('finals', _describe_finals(sweep, rows), f'{caption}.')
    parts = [f'<h2>Final values</h2>{chart}']
    arm_costs = [figures.list_costs(sweep, row) for row in rows if row.metric is not None]
    if len(arm_costs) > 1 and any(any(costs.values()) for costs in arm_costs):
        label = f'{tables.humanize(sweep.metric)} against parameters, FLOPs and seconds of training'
        caption = (
            'Mean and 95 % bootstrap interval against the cost of the whole model. Dashed: the '
            'best mean for that cost or less; the arms on it are larger.'
        )
        chart = _chart('pareto', label, caption, has_bar=True)
        parts.append(f'<h2>Cost against quality</h2>{chart}')
    sections = ''.join(f'<section>{part}</section>' for part in parts)
    return f'<div class="pair">{sections}</div>'


def _describe_finals(sweep: Sweep, rows: list[Row]) -> str:
    def format_estimate(estimate: Estimate) -> str:
        interval = ''
        if estimate.low is not None:
            interval = f' [{estimate.low:.4g}, {estimate.high:.4g}]'
        return f'{estimate.mean:.4g}{interval}'

    arm_texts = [
        f'{row.arm.label} {format_estimate(row.metric) if row.metric else row.arm.state}'
        for row in rows
    ]
    metric = tables.humanize(sweep.metric)
    return f'{metric} of the {sweep.split} split by arm: {"; ".join(arm_texts)}'


def _tasks_section(sweep: Sweep, rows: list[Row]) -> str:
    """Return a table with a row per task and a column per arm, sorted by the mean over arms."""
    # Compute {arm: {task: mean}} and the order of the tasks.
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.task_summary is not None:
            task_means = row.task_summary.scores.mean(axis=0).tolist()
            means[row.arm.label] = dict(zip(row.task_summary.tasks, task_means, strict=True))
    tasks = list(dict.fromkeys(task for arm_means in means.values() for task in arm_means))

    def mean_over_arms(task: str) -> float:
        return float(np.mean([arm[task] for arm in means.values() if task in arm]))

    tasks.sort(key=lambda task: -mean_over_arms(task))

    # Write a line per task; its cells hold the score and the difference to the baseline.
    baseline_means = means.get(sweep.baseline or '', {})
    lines = []
    for task in tasks:
        cells = []
        for arm_means in means.values():
            value, baseline = arm_means.get(task), baseline_means.get(task)
            gap = None if value is None or baseline is None else value - baseline
            text = tables.NONE if value is None else f'{value:.4g}'
            cells.append(f'<td{_data_attribute(value)}{_data_attribute(gap, "gap")}>{text}</td>')
        lines.append(f'<tr><th scope="row">{escape(task)}</th>{"".join(cells)}</tr>')
    header = ''.join(f'<th scope="col">{escape(text)}</th>' for text in ['task', *means])
    largest = max(abs(value) for arm_means in means.values() for value in arm_means.values())
    decimals = 2 if largest < 10 else 1 if largest < 1000 else 0
    table = _scrolling_table(
        f'<tr>{header}</tr>', lines, 'heat sortable', 'Tasks', f' data-digits="{decimals}"'
    )
    caption = (
        f'{_capitalize(tables.humanize(sweep.metric))} of the {sweep.split} split, mean over '
        'seeds; the stronger the color, the better. Differences: blue is better than the '
        'baseline, orange worse.'
    )
    return (
        f'<h2>Tasks</h2><div class="bar" id="tasks-bar"></div>{table}'
        f'<p class="soft">{escape(caption)}</p>'
    )


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _config_table(sweep: Sweep) -> str:
    """Return the config keys in which any arm differs from the baseline, or from the first arm."""
    # Find the keys that differ.
    baseline = next((arm for arm in sweep.arms if arm.label == sweep.baseline), sweep.arms[0])
    reference = flatten(baseline.config)
    settings = {arm.label: _flatten_config(arm, reference) for arm in sweep.arms}
    keys = [
        key
        for key in sorted(set().union(*settings.values()))
        if any(
            _format_setting(arm_settings, key) != _format_setting(reference, key)
            for arm_settings in settings.values()
        )
    ]
    if not keys:
        return '<p>The configs are equal.</p>'

    # Write a line per arm, the baseline first.
    lines = []
    for arm in [baseline, *(arm for arm in sweep.arms if arm is not baseline)]:
        cells = []
        for key in keys:
            text = _format_setting(settings[arm.label], key)
            kind = 'same' if text == _format_setting(reference, key) else 'other'
            classes = _class_attribute('' if arm is baseline else kind)
            cells.append(f'<td{classes}>{escape(text)}</td>')
        classes = _class_attribute('baseline' if arm is baseline else '')
        label = f'<th scope="row">{escape(arm.label)}</th>'
        lines.append(f'<tr{classes}>{label}{"".join(cells)}</tr>')
    header = ''.join(f'<th scope="col">{_breakable(key)}</th>' for key in ['arm', *keys])
    table = _scrolling_table(f'<tr>{header}</tr>', lines, 'words sortable', 'Configs that differ')
    caption = f'Bold: another value than that of {escape(baseline.label)}.'
    return f'{table}<p class="soft">{caption}</p>'


def _flatten_config(arm: Arm, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an arm; until it has one, the reference with its overrides."""
    return flatten(arm.config) or {**reference, **arm.overrides}


def _format_setting(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else tables.NONE


def _breakable(key: str) -> str:
    """Return a dotted key that may break after its dots."""
    return '<wbr>'.join(escape(part) for part in key.replace('.', '.\n').split('\n'))


def _runs_table(sweep: Sweep) -> str:
    names = ['arm', 'state', 'reason', 'seeds', 'step', 'machine', 'updated']
    header = ''.join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for arm in sweep.arms:
        status = [arm.status.get(key) for key in ('step', 'machine', 'updated')]
        texts = [tables.NONE if value is None else str(value) for value in status]
        texts[-1] = texts[-1].replace('T', ' ').replace('+00:00', ' UTC')
        seeds = ', '.join(map(str, arm.seeds))
        texts = [arm.state, arm.reason or tables.NONE, seeds or tables.NONE, *texts]
        cells = ''.join(f'<td>{escape(text)}</td>' for text in texts)
        lines.append(f'<tr><th scope="row">{escape(arm.label)}</th>{cells}</tr>')
    return _scrolling_table(f'<tr>{header}</tr>', lines, 'words sortable', 'Runs')
