"""The web page of a report: a single HTML file without external resources.

The HTML contains the tables. page.js sorts them, and draws the figures from numbers that are
embedded as JSON. page.css has a light and a dark color scheme. All text from runs is escaped.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from html import escape

import numpy as np

from mi import web_page
from mi.config import flatten
from mi.report import figures, statistics, tables
from mi.report.analysis import ArmResult
from mi.report.arms import Arm, Sweep
from mi.report.figures import Curve, Curves
from mi.report.statistics import Estimate
from mi.report.tables import Cell

HERE = pathlib.Path(__file__).parent
MAX_POINTS = 500  # largest number for a curve on the page; the figures for a paper have all points


def render_page(sweep: Sweep, results: list[ArmResult], curves: Curves, notes: list[str]) -> str:
    """Render the HTML document.

    Args:
      sweep: the sweep.
      results: results of the sweep's arms.
      curves: learning curves of the arms.
      notes: notes to show below the table.
    """
    # The sections of the page; the warning about too few seeds moves from the notes to the top.
    warning = statistics.warn_too_few_seeds([result.test for result in results])
    sections = [
        f'<h1>{escape(sweep.title)}</h1>',
        f'<p>{escape(_introduce(sweep))}</p>',
        f'<p class="warning" role="note">{escape(warning)}</p>' if warning else '',
        _results_table(sweep, results),
        _note_list([note for note in notes if note != warning]),
        _curves_section(sweep),
        _finals_and_cost_sections(sweep, results),
        _tasks_section(sweep, results) if tables.has_tasks(results) else '',
        f'<h2>What differs</h2>{_config_table(sweep)}' if len(results) > 1 else '',
        f'<h2>Runs</h2>\n{_runs_table(sweep)}',
        f'<h2>Command</h2><pre>{escape(str(sweep.command))}</pre>' if sweep.command else '',
        f'<script type="application/json" id="data">{_page_data(sweep, results, curves)}</script>',
        f'<script>{(HERE / "page.js").read_text(encoding="utf-8")}</script>',
    ]
    return web_page.assemble(sweep.title, sections)


def _page_data(sweep: Sweep, results: list[ArmResult], curves: Curves) -> str:
    """Return the data of page.js, as JSON that is safe inside a script element."""
    # Only costs that some arm recorded can be chosen on the page.
    arm_costs = [figures.list_costs(sweep, result) for result in results]
    recorded_costs = {
        cost_name: axis_title.format(unit=sweep.unit)
        for cost_name, axis_title in figures.COSTS.items()
        if any(costs[cost_name] for costs in arm_costs)
    }

    # The arms keep the order of the sweep, in which they have their colors.
    direction = ''
    if len(results) > 1:
        direction = ', lower is better' if sweep.lower_is_better else ', higher is better'
    labels = [arm.label for arm in sweep.arms]
    styles = figures.web_styles(sweep)
    page_data = {
        'metric': sweep.metric_title,
        'split': sweep.split,
        'better': direction,
        'lowerIsBetter': sweep.lower_is_better,
        'baseline': labels.index(sweep.baseline) if sweep.baseline is not None else None,
        'costs': recorded_costs,
        'arms': [
            {
                'label': ' '.join(result.arm.label.split()),
                'problem': sweep.name_problem(result.arm),
                'state': result.arm.state,
                'why': result.arm.state if not result.final else 'not finite',
                'color': color,
                'dash': dashes,
                'curve': _curve_data(result.arm, curves[result.arm.label]),
                'final': _final_data(result),
                'costs': costs,
            }
            for result, (color, dashes), costs in zip(results, styles, arm_costs, strict=True)
        ],
    }
    return json.dumps(page_data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')


def _curve_data(arm: Arm, curve: Curve) -> dict[str, object] | None:
    if not len(curve.steps):
        return None
    # Thin out the points evenly; the first and the last stay.
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


def _final_data(result: ArmResult) -> dict[str, object] | None:
    estimate = result.metric
    if estimate is None:
        return None
    values = list(result.final.values())
    return {'mean': estimate.mean, 'low': estimate.low, 'high': estimate.high, 'values': values}


def _round_values(values: np.ndarray) -> list[float]:
    return [float(f'{value:.6g}') for value in values]


def _introduce(sweep: Sweep) -> str:
    """Return a sentence that introduces the comparison."""
    metric = f'{sweep.metric_title} of the {sweep.split} split'
    if len(sweep.arms) == 1:
        return f'One run, {metric}.'
    direction = 'lower' if sweep.lower_is_better else 'higher'
    sentence = f'{len(sweep.arms)} arms compared on {metric} ({direction} is better)'
    if sweep.baseline is not None:
        sentence += f'; differences are to {sweep.baseline}, paired by seed'
    return f'{sentence}.'


def _results_table(sweep: Sweep, results: list[ArmResult]) -> str:
    table = tables.make_table(sweep, results)
    # Only columns with numbers have values to sort by; others are sorted by their text.
    is_numeric = [
        any(cells[column_index].value is not None for cells in table.body)
        for column_index in range(len(table.columns))
    ]
    header = ''.join(
        f'<th scope="col"{_class_attribute("word" if column.terminal.wraps else "")}>'
        f'{_cell_html(cell)}</th>'
        for column, cell in zip(table.columns, table.header, strict=True)
    )

    # Add a row per arm; color and weight mark verdicts and the best mean.
    table_rows = []
    for row_index, (result, cells) in enumerate(zip(results, table.body, strict=True)):
        row_cells = [f'<th scope="row">{_cell_html(cells[0])}</th>']
        for column_index, (column, cell) in enumerate(zip(table.columns, cells, strict=True)):
            if column_index == 0:
                continue
            classes = _class_attribute(
                'word' if column.terminal.wraps else '',
                _verdict_class(result, cell) if column.name == 'verdict' else '',
            )
            sort_attribute = _data_attribute(cell.value) if is_numeric[column_index] else ''
            cell_text = _cell_html(cell, bold=column.name == 'metric' and row_index in table.best)
            row_cells.append(f'<td{classes}{sort_attribute}>{cell_text}</td>')
        is_baseline = result.arm.label == sweep.baseline
        table_rows.append(
            f'<tr{_class_attribute("baseline" if is_baseline else "")}>{"".join(row_cells)}</tr>'
        )
    return _scrolling_table(f'<tr>{header}</tr>', table_rows, 'sortable', 'Results')


def _verdict_class(result: ArmResult, cell: Cell) -> str:
    """Return the color class of a verdict, or '' if no difference could be significant."""
    if result.test is None or not result.test.can_be_significant:
        return ''
    return {'better': 'good', 'worse': 'bad'}.get(cell.main, '')


def _class_attribute(*class_names: str) -> str:
    classes = ' '.join(filter(None, class_names))
    return f' class="{classes}"' if classes else ''


def _data_attribute(value: float | None, name: str = 'value') -> str:
    """Return the attribute with a cell's sort key. It is empty for None, which comes last."""
    return f' data-{name}="{"" if value is None else repr(float(value))}"'


def _scrolling_table(
    header: str, table_rows: Iterable[str], classes: str, name: str, attributes: str = ''
) -> str:
    """Return a table that scrolls sideways if the window is narrower."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="{classes}"{attributes}>\n<thead>{header}</thead>\n<tbody>\n'
        + '\n'.join(table_rows)
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
    """Return an empty figure that page.js fills. `label` describes it to screen readers."""
    toolbar = f'<div class="bar" id="{name}-bar"></div>' if has_bar else ''
    return (
        f'<figure>{toolbar}'
        f'<div class="chart" id="{name}" role="img" aria-label="{escape(label)}">'
        f'<noscript>JavaScript draws it; {name}.png and .pdf are beside this page.</noscript>'
        f'</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _curves_section(sweep: Sweep) -> str:
    labels = ', '.join(arm.label for arm in sweep.arms)
    metric = f'{sweep.metric_title} of the {sweep.curves} split'
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


def _finals_and_cost_sections(sweep: Sweep, results: list[ArmResult]) -> str:
    caption = 'A dot per seed, a bar at the mean, a line for its 95 % bootstrap interval'
    if sweep.baseline is not None:
        caption += f'; dashed: the mean of {sweep.baseline}'
    chart = _chart('finals', _describe_finals(sweep, results), f'{caption}.')
    sections = [f'<h2>Final values</h2>{chart}']
    arm_costs = [
        figures.list_costs(sweep, result) for result in results if result.metric is not None
    ]
    if len(arm_costs) > 1 and any(any(costs.values()) for costs in arm_costs):
        label = f'{sweep.metric_title} against parameters, FLOPs and seconds of training'
        scope = ' of each problem' if len(sweep.group_by_problem()) > 1 else ''
        caption = (
            'Mean and 95 % bootstrap interval against the cost of the whole model. Dashed: the '
            f'best mean{scope} for that cost or less; the arms on it are larger.'
        )
        chart = _chart('pareto', label, caption, has_bar=True)
        sections.append(f'<h2>Cost against quality</h2>{chart}')
    contents = ''.join(f'<section>{section}</section>' for section in sections)
    return f'<div class="pair">{contents}</div>'


def _describe_finals(sweep: Sweep, results: list[ArmResult]) -> str:
    def format_estimate(estimate: Estimate) -> str:
        interval = ''
        if estimate.low is not None:
            interval = f' [{estimate.low:.4g}, {estimate.high:.4g}]'
        return f'{estimate.mean:.4g}{interval}'

    descriptions = [
        f'{result.arm.label} '
        f'{format_estimate(result.metric) if result.metric else result.arm.state}'
        for result in results
    ]
    metric = sweep.metric_title
    return f'{metric} of the {sweep.split} split by arm: {"; ".join(descriptions)}'


def _tasks_section(sweep: Sweep, results: list[ArmResult]) -> str:
    """Return a table of tasks and arms, with tasks sorted by the mean over arms."""
    # Compute {arm: {task: mean}} and the order of the tasks.
    means: dict[str, dict[str, float]] = {}
    for result in results:
        if result.task_summary is not None:
            task_means = result.task_summary.scores.mean(axis=0).tolist()
            means[result.arm.label] = dict(zip(result.task_summary.tasks, task_means, strict=True))
    tasks = list(dict.fromkeys(task for arm_means in means.values() for task in arm_means))

    def mean_over_arms(task: str) -> float:
        return float(np.mean([arm[task] for arm in means.values() if task in arm]))

    tasks.sort(key=lambda task: -mean_over_arms(task))

    # Add a row per task; its cells hold the score and the difference to the baseline.
    baseline_means = means.get(sweep.baseline or '', {})
    table_rows = []
    for task in tasks:
        cells = []
        for arm_means in means.values():
            task_mean, baseline_mean = arm_means.get(task), baseline_means.get(task)
            difference = None
            if task_mean is not None and baseline_mean is not None:
                difference = task_mean - baseline_mean
            cell_text = tables.NONE if task_mean is None else f'{task_mean:.4g}'
            attributes = _data_attribute(task_mean) + _data_attribute(difference, 'gap')
            cells.append(f'<td{attributes}>{cell_text}</td>')
        table_rows.append(f'<tr><th scope="row">{escape(task)}</th>{"".join(cells)}</tr>')

    # page.js replaces the numbers with differences with this many decimals.
    header = ''.join(f'<th scope="col">{escape(title)}</th>' for title in ['task', *means])
    largest = max(abs(mean) for arm_means in means.values() for mean in arm_means.values())
    decimals = 2 if largest < 10 else 1 if largest < 1000 else 0
    table = _scrolling_table(
        f'<tr>{header}</tr>', table_rows, 'heat sortable', 'Tasks', f' data-digits="{decimals}"'
    )
    caption = (
        f'{_capitalize(sweep.metric_title)} of the {sweep.split} split, mean over '
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
    """Return a table of the config keys in which arms differ from the baseline or first arm."""
    baseline = next((arm for arm in sweep.arms if arm.label == sweep.baseline), sweep.arms[0])
    reference = flatten(baseline.config)
    settings = {arm.label: _flatten_config(arm, reference) for arm in sweep.arms}
    differing_keys = [
        config_key
        for config_key in sorted(set().union(*settings.values()))
        if any(
            _format_setting(arm_settings, config_key) != _format_setting(reference, config_key)
            for arm_settings in settings.values()
        )
    ]
    if not differing_keys:
        return '<p>The configs are equal.</p>'

    # Add a row per arm, the baseline first.
    table_rows = []
    for arm in [baseline, *(arm for arm in sweep.arms if arm is not baseline)]:
        cells = []
        for config_key in differing_keys:
            setting = _format_setting(settings[arm.label], config_key)
            emphasis = 'same' if setting == _format_setting(reference, config_key) else 'other'
            classes = _class_attribute('' if arm is baseline else emphasis)
            cells.append(f'<td{classes}>{escape(setting)}</td>')
        classes = _class_attribute('baseline' if arm is baseline else '')
        label = f'<th scope="row">{escape(arm.label)}</th>'
        table_rows.append(f'<tr{classes}>{label}{"".join(cells)}</tr>')
    titles = ['arm', *differing_keys]
    header = ''.join(f'<th scope="col">{_breakable(title)}</th>' for title in titles)
    table = _scrolling_table(
        f'<tr>{header}</tr>', table_rows, 'words sortable', 'Configs that differ'
    )
    caption = f'Bold: another value than that of {escape(baseline.label)}.'
    return f'{table}<p class="soft">{caption}</p>'


def _flatten_config(arm: Arm, reference: Mapping[str, object]) -> dict[str, object]:
    """Return the flat config of an arm, or the reference with its overrides if it has none yet."""
    return flatten(arm.config) or {**reference, **arm.overrides}


def _format_setting(settings: Mapping[str, object], config_key: str) -> str:
    return (
        json.dumps(settings[config_key], ensure_ascii=False)
        if config_key in settings
        else tables.NONE
    )


def _breakable(config_key: str) -> str:
    """Allow line breaks after the dots of a dotted key."""
    return '<wbr>'.join(escape(segment) for segment in config_key.replace('.', '.\n').split('\n'))


def _runs_table(sweep: Sweep) -> str:
    column_titles = ['arm', 'state', 'reason', 'seeds', 'step', 'machine', 'updated']
    header = ''.join(f'<th scope="col">{escape(title)}</th>' for title in column_titles)
    table_rows = []
    for arm in sweep.arms:
        status_values = [arm.status.get(field) for field in ('step', 'machine', 'updated')]
        step, machine, updated = (
            tables.NONE if status_value is None else str(status_value)
            for status_value in status_values
        )
        updated = updated.replace('T', ' ').replace('+00:00', ' UTC')
        seeds = ', '.join(map(str, arm.seeds))
        cell_texts = [arm.state, arm.reason or tables.NONE, seeds or tables.NONE]
        cell_texts += [step, machine, updated]
        cells = ''.join(f'<td>{escape(cell_text)}</td>' for cell_text in cell_texts)
        table_rows.append(f'<tr><th scope="row">{escape(arm.label)}</th>{cells}</tr>')
    return _scrolling_table(f'<tr>{header}</tr>', table_rows, 'words sortable', 'Runs')
