"""The HTML page for a report, a self-contained file in the style of the run reports."""

from html import escape
from typing import TYPE_CHECKING

from mi import web_page

if TYPE_CHECKING:
    from mi.find.report import Interaction, Report

STYLE = """
.cost { display: inline-block; height: .6rem; background: var(--mark); border-radius: 2px; }
.motifs label { margin-right: 1rem; white-space: nowrap; }
tr.module > th { background: var(--tint); }
"""
SCRIPT = """
const boxes = [...document.querySelectorAll('.motifs input')];
const update = () => {
  const shown = new Set(boxes.filter(box => box.checked).map(box => box.value));
  let module = null, count = 0;
  const close = () => { if (module) module.hidden = count === 0; };
  for (const row of document.querySelectorAll('#tree tbody tr')) {
    if (row.classList.contains('module')) { close(); module = row; count = 0; continue; }
    row.hidden = !shown.has(row.dataset.motif);
    count += row.hidden ? 0 : 1;
  }
  close();
};
for (const box of boxes) box.addEventListener('change', update);
"""


def render_page(report: 'Report') -> str:
    """Return the HTML document."""
    sections = [
        f'<h1>{escape(report.name)}</h1>',
        f'<p>{escape(str(report).partition(chr(10) * 2)[0])}</p>',
        _render_filter(report),
        _render_tree(report),
        _render_candidates(report),
        '<h2>Outputs</h2>',
        _render_list(report.describe_outputs()),
        f'<h2>Notes</h2>{_render_list(report.notes)}' if report.notes else '',
        f'<script>{SCRIPT}</script>',
    ]
    return web_page.assemble(report.name, sections, STYLE)


def _render_filter(report: 'Report') -> str:
    """Return a checkbox for each motif."""
    labels = ''.join(
        f'<label><input type="checkbox" value="{escape(motif)}" checked> '
        f'{escape(motif)} ({number})</label>'
        for motif, number in report.count().items()
    )
    return f'<div class="bar motifs" role="group" aria-label="Motifs">{labels}</div>'


def _render_tree(report: 'Report') -> str:
    """Return the interactions as a tree of modules."""
    from mi.find.report import group_by_path

    rows = []
    for path, group in group_by_path(report.interactions).items():
        rows.append(
            f'<tr class="module"><th scope="rowgroup" colspan="7">{escape(path or "—")}</th></tr>'
        )
        rows += [_render_row(interaction, times) for interaction, times in group]
    titles = ('motif', 'streams', 'shapes', 'times', 'FLOPs', 'share', 'source')
    header = ''.join(f'<th scope="col">{title}</th>' for title in titles)
    if not rows:
        return '<p>No interactions.</p>'
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Interactions">'
        f'<table id="tree"><thead><tr>{header}</tr></thead>\n<tbody>\n'
        + '\n'.join(rows)
        + '\n</tbody></table></div>'
    )


def _render_row(interaction: 'Interaction', times: int | None) -> str:
    from mi.find.report import format_shapes, format_share, format_times, shorten_source

    bar = f'<span class="cost" style="width: {4 * min(1, interaction.share):.3f}rem"></span>'
    cells = [
        f'<td class="word">{escape(interaction.streams)}</td>',
        f'<td class="word">{escape(format_shapes(interaction))}</td>',
        f'<td>{format_times(times)}</td>',
        f'<td>{interaction.flops:,}</td>',
        f'<td>{bar} {format_share(interaction.share)}</td>',
        f'<td class="word" title="{escape(interaction.source)}">'
        f'{escape(shorten_source(interaction.source))}</td>',
    ]
    motif = escape(interaction.motif)
    return f'<tr data-motif="{motif}"><th scope="row">{motif}</th>{"".join(cells)}</tr>'


def _render_candidates(report: 'Report') -> str:
    """Return the candidates, with the parameters and FLOPs of three forms of W."""
    from mi.find.report import shorten_source

    if not report.candidates:
        return ''
    rows = []
    for candidate in report.candidates:
        costs = ''.join(
            f'<td>{candidate.params[form]:,}<small>{candidate.flops[form]:,} FLOPs</small></td>'
            for form in candidate.params
        )
        place = candidate.path or '—'
        rows.append(
            f'<tr><th scope="row">{escape(place)}</th><td class="word">{candidate.kind}</td>'
            f'<td class="word">{escape(candidate.x)} [{candidate.n}]</td>'
            f'<td class="word">{escape(candidate.z)} [{candidate.m}]</td><td>{candidate.k}</td>'
            f'{costs}<td class="word">{escape(shorten_source(candidate.source))}</td></tr>'
        )
    titles = ('module', 'kind', 'x', 'z', 'k', 'full', 'low rank', 'diagonal', 'source')
    header = ''.join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        '<h2>Candidates</h2><p>Streams that meet parameters without a product, and the parameters '
        'that W would add.</p><div class="wide" tabindex="0" role="region" '
        f'aria-label="Candidates"><table><thead><tr>{header}</tr></thead>\n<tbody>\n'
        + '\n'.join(rows)
        + '\n</tbody></table></div>'
    )


def _render_list(items: object) -> str:
    lines = ''.join(f'<li>{escape(str(item))}</li>\n' for item in items)  # type: ignore[attr-defined]
    return f'<ul class="soft">\n{lines}</ul>'
