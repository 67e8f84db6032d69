"""The page of an inspection, a self-contained HTML file in the style of the reports."""

import base64
import pathlib
from collections.abc import Mapping
from html import escape

import numpy as np

from mi import web_page
from mi.inspect.layers import Layer, Weights
from mi.inspect.trained import Trained

STYLE = """
figure img { display: block; width: 100%; max-width: 52rem; background: #fff; border-radius: 4px; }
"""
CAPTIONS = {
    'spectrum': 'Singular values of the unfoldings of W, over the largest one.',
    'outputs': (
        'Eigenvalues of the slices of the outputs with the largest norms, on the stacked stream '
        '[z; x]: ±σ/2 for the singular values σ of a slice. The positive half is shown.'
    ),
    'contexts': (
        'Cosines between the weights zᵀW that contexts generate, clustered by average linkage of '
        '1 − cosine; both matrices have the order of the trained clusters.'
    ),
}
NOTES = (
    'Effective rank: exp of the entropy of σ / Σσ (Roy & Vetterli, 2007). Stable rank: '
    'Σσ² / max σ² (Rudelson & Vershynin, 2007).',
    'In parentheses: the same at initialization, drawn again from the seed of the run.',
    'Angle: mean over pairs of contexts between the weights zᵀW that they generate; 90° if they '
    'share nothing. With V: between W′(z) = zᵀW + V.',
)


def render_page(
    trained: Trained, title: str, layers: list[Layer], figures: Mapping[str, list[pathlib.Path]]
) -> str:
    """Return the HTML document.

    Args:
      trained: the run.
      title: the heading of the page.
      layers: all layers of all seeds.
      figures: the SVG files to embed, by layer name.
    """
    notes = ''.join(f'<li>{escape(note)}</li>\n' for note in NOTES)
    sections = [
        f'<h1>{escape(title)}</h1>',
        f'<p>{escape(_introduce(trained, layers))}</p>',
        _render_table(layers),
        f'<ul class="soft">\n{notes}</ul>',
    ]
    for name, files in figures.items():
        sections.append(f'<h2>{escape(name)}</h2>')
        sections += [_render_figure(name, file) for file in files]
    return web_page.assemble(title, sections, STYLE)


def make_rows(layers: list[Layer]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text."""
    header = ['layer', 'seed', 'm × n × k', '‖W‖', '‖V‖']
    header += [f'{kind} rank {axis}' for kind in ('effective', 'stable') for axis in 'zxy']
    header += ['angle', 'angle with V']
    rows = []
    for layer in layers:
        trained, initial = layer.states['trained'], layer.states['initial']
        cells = [layer.name, str(layer.seed), ' × '.join(map(str, trained.shape))]
        cells += [_compare(trained.norm, initial.norm, 2)]
        cells += [_compare(trained.shared_norm, initial.shared_norm, 2)]
        for kind in ('effective_rank', 'stable_rank'):
            for unfolding, initial_unfolding in zip(
                trained.unfoldings, initial.unfoldings, strict=True
            ):
                rank = _compare(getattr(unfolding, kind), getattr(initial_unfolding, kind), 1)
                cells.append(f'{rank} of {unfolding.full_rank}' if 'eff' in kind else rank)
        for kind in ('contexts', 'generated'):
            angle, initial_angle = (_get_mean_angle(state, kind) for state in (trained, initial))
            has_angles = angle is not None and initial_angle is not None
            cells.append(_compare(angle, initial_angle, 0, '°') if has_angles else '—')
        rows.append(cells)
    return header, rows


def _introduce(trained: Trained, layers: list[Layer]) -> str:
    names = list(dict.fromkeys(layer.name for layer in layers))
    fusion_name = trained.config.model.fusion.name
    return (
        f'{len(names)} interaction{"s" if len(names) > 1 else ""} of the fusion {fusion_name} '
        f'after {trained.step:,} updates: {", ".join(names)}. The figures are those of seed '
        f'{layers[0].seed}.'
    )


def _render_table(layers: list[Layer]) -> str:
    header, rows = make_rows(layers)
    titles = ''.join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for name, *cells in rows:
        values = ''.join(f'<td>{escape(cell)}</td>' for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{values}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Layers">'
        f'<table><thead><tr>{titles}</tr></thead>\n<tbody>\n'
        + '\n'.join(lines)
        + '\n</tbody></table></div>'
    )


def _render_figure(name: str, file: pathlib.Path) -> str:
    """Return a figure that embeds the file in the page."""
    kind = file.stem.rpartition('.')[2]
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(f"{name}: {kind}")}" '
        f'src="data:image/svg+xml;base64,{data}">'
        f'<figcaption>{escape(CAPTIONS[kind])}</figcaption></figure>'
    )


def _compare(trained: float | None, initial: float | None, digits: int, unit: str = '') -> str:
    return f'{trained:.{digits}f}{unit} ({initial:.{digits}f}{unit})'


def _get_mean_angle(weights: Weights, kind: str) -> float | None:
    """Return the mean angle between contexts in degrees, or None for fewer than two contexts."""
    comparison = getattr(weights, kind)
    if comparison is None or len(comparison.norms) < 2:
        return None
    pairs = np.triu_indices(len(comparison.norms), 1)
    return float(comparison.angles[pairs].mean())
