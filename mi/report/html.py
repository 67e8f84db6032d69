"""The page: everything in one file, nothing is fetched, every word from a run is escaped."""

import json
from collections.abc import Iterable
from html import escape

from mi.config import flat
from mi.report import tables
from mi.report.arms import Row
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5f6068; --rule: #d9d9de;
  --paper: #ffffff; --tint: #f4f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --soft: #a2a3ad; --rule: #3a3b42;
  --paper: #17181c; --tint: #212228; } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 78rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p, li { max-width: 46rem; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { vertical-align: bottom; border-bottom: 2px solid var(--ink); font-weight: 600; }
thead th { white-space: normal; }
tbody th { font-weight: 600; border-bottom: 1px solid var(--rule); vertical-align: top; }
td small, th small { display: block; color: var(--soft); font-weight: 400; white-space: nowrap; }
th:first-child, td:last-child, th:last-child, .words td, .words th { text-align: left; }
td:last-child small { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
.words td { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; max-width: 24rem; }
tbody th { position: sticky; left: 0; background: var(--paper); }
tr.baseline > * { background: var(--tint); }
.better { color: #00855f; } .worse { color: #c2410c; }
@media (prefers-color-scheme: dark) { .better { color: #3ecf9f; } .worse { color: #ff8f5a; } }
figure { margin: 1.5rem 0; } figcaption, .soft { color: var(--soft); font-size: .87rem; }
figure svg { width: 100%; max-width: 50rem; height: auto; display: block; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def page(sweep: Sweep, rows: list[Row], images: dict[str, str], notes: list[str]) -> str:
    """The whole document.

    Args:
      images: the SVG elements 'curves' and 'finals'.
      notes: what stands under the table.
    """
    parts = [
        f'<h1>{escape(sweep.title)}</h1>',
        f'<p>{escape(_sentence(sweep))}</p>',
        _table(sweep, rows),
        _list(notes),
        '<h2>Final values</h2>',
        _figure(images['finals'], _finals_text(sweep, rows), _finals_caption(sweep)),
        '<h2>Learning curves</h2>',
        _figure(images['curves'], _curves_text(sweep), _curves_caption(sweep)),
        *([] if 'tasks' not in images else ['<h2>Tasks</h2>', _tasks(sweep, rows, images)]),
        '<h2>What differs</h2>' + _differences(sweep) if len(rows) > 1 else '',
        '<h2>Runs</h2>',
        _runs(sweep),
        f'<h2>Command</h2><pre>{escape(str(sweep.command))}</pre>' if sweep.command else '',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(sweep.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + '\n'.join(filter(None, parts))
        + '\n</body>\n</html>\n'
    )


def _sentence(sweep: Sweep) -> str:
    metric = f'{tables.words(sweep.metric)} of the {sweep.split} split'
    if len(sweep.arms) == 1:
        return f'One run, {metric}.'
    better = 'lower' if sweep.lower_is_better else 'higher'
    text = f'{len(sweep.arms)} arms compared on {metric} ({better} is better)'
    paired = f'; differences are to {sweep.baseline}, paired by seed'
    return text + (paired if sweep.baseline is not None else '') + '.'


def _table(sweep: Sweep, rows: list[Row]) -> str:
    header, body, best = tables.cells(sweep, rows)
    head = ''.join(f'<th scope="col">{_cell(cell)}</th>' for cell in header)
    lines = []
    for i, (row, line) in enumerate(zip(rows, body, strict=True)):
        tds = [f'<th scope="row">{_cell(line[0])}</th>']
        for column, cell in enumerate(line[1:], 1):
            text = _cell(cell, bold=column == 1 and i in best)
            verdict = cell.main == row.verdict and row.verdict in ('better', 'worse')
            tds.append(f'<td class="{row.verdict}">{text}</td>' if verdict else f'<td>{text}</td>')
        kind = ' class="baseline"' if row.arm.label == sweep.baseline else ''
        lines.append(f'<tr{kind}>{"".join(tds)}</tr>')
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + '\n'.join(lines)
        + '\n</tbody></table></div>'
    )


def _cell(cell: tables.Cell, bold: bool = False) -> str:
    main = f'<b>{escape(cell.main)}</b>' if bold else escape(cell.main)
    return main + (f'<small>{escape(cell.detail)}</small>' if cell.detail else '')


def _list(lines: Iterable[str]) -> str:
    items = ''.join(f'<li>{escape(line)}</li>\n' for line in lines)
    return f'<ul class="soft">\n{items}</ul>'


def _words(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = ''.join(f'<th scope="col">{escape(word)}</th>' for word in header)
    lines = (''.join(f'<td>{escape(word)}</td>' for word in line) for line in body)
    text = '\n'.join(f'<tr>{line}</tr>' for line in lines)
    return (
        f'<div class="wide" tabindex="0"><table class="words">\n<thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{text}\n</tbody></table></div>'
    )


def _figure(svg: str, text: str, caption: str) -> str:
    named = svg.replace('<svg', f'<svg role="img" aria-label="{escape(text)}"', 1)
    return f'<figure>{named}<figcaption>{escape(caption)}</figcaption></figure>'


def _finals_text(sweep: Sweep, rows: list[Row]) -> str:
    def value(e: Estimate) -> str:
        interval = '' if e.low is None else f' [{e.low:.4g}, {e.high:.4g}]'
        return f'{e.mean:.4g}{interval}'

    each = (f'{r.arm.label} {value(r.metric) if r.metric else r.arm.state}' for r in rows)
    return f'{tables.words(sweep.metric)} of the {sweep.split} split by arm: {"; ".join(each)}'


def _finals_caption(sweep: Sweep) -> str:
    text = 'A dot per seed, a tick at the mean, a line for its 95 % bootstrap interval'
    return f'{text}; dashed: the mean of {sweep.baseline}.' if sweep.baseline else f'{text}.'


def _curves_text(sweep: Sweep) -> str:
    labels = ', '.join(arm.label for arm in sweep.arms)
    return (
        f'{tables.words(sweep.metric)} of the {sweep.curves} split over steps and seconds: {labels}'
    )


def _curves_caption(sweep: Sweep) -> str:
    order = ' Legend in the order of the last values.' if len(sweep.arms) > 1 else ''
    return (
        f'Mean over seeds and its 95 % bootstrap interval at each step, {sweep.curves} split. The '
        'vertical axis is zoomed to the later half of training; an arm that stopped before may lie '
        f'outside.{order}'
    )


def _tasks(sweep: Sweep, rows: list[Row], images: dict[str, str]) -> str:
    there = [row for row in rows if row.tasks is not None]
    labels = ', '.join(row.arm.label for row in there)
    text = f'{tables.words(sweep.metric)} of each task: {labels}'
    caption = 'Mean over seeds of each task, the tasks in the order of the mean over arms.'
    return _figure(images['tasks'], text, caption)


def _differences(sweep: Sweep) -> str:
    """Every config key in which an arm differs from the baseline, or from the first arm."""
    baseline = next((a for a in sweep.arms if a.label == sweep.baseline), sweep.arms[0])
    reference = flat(baseline.config)
    lines = []
    for arm in sweep.arms:
        if arm is baseline:
            continue
        values = flat(arm.config) or arm.overrides
        keys = sorted(reference.keys() | values.keys() if arm.config else values.keys())
        for key in keys:
            pair = [json.dumps(v[key]) if key in v else tables.NONE for v in (reference, values)]
            if pair[0] != pair[1]:
                lines.append([arm.label, key, *pair])
    if not lines:
        return '<p>The configs are equal.</p>'
    return _words(['arm', 'key', baseline.label, 'value of the arm'], lines)


def _runs(sweep: Sweep) -> str:
    def line(arm: Arm) -> list[str]:
        facts = [arm.status.get(key) for key in ('step', 'machine', 'updated')]
        seeds = ', '.join(map(str, arm.seeds))
        words = [tables.NONE if fact is None else str(fact) for fact in facts]
        words[-1] = words[-1].replace('T', ' ').replace('+00:00', ' UTC')
        return [arm.label, arm.state, arm.reason or tables.NONE, seeds or tables.NONE, *words]

    header = ['arm', 'state', 'reason', 'seeds', 'step', 'machine', 'updated']
    return _words(header, map(line, sweep.arms))
