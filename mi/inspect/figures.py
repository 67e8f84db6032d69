"""The figures of an inspection: singular values, eigenvalues of outputs, similarity of contexts."""

import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from scipy.cluster import hierarchy

from mi.inspect.layers import Layer
from mi.report import plots
from mi.report.plots import GREY, PALETTE, WIDTH
from mi.unify import cluster_contexts
from mi.unify.spectrum import ContextComparison

MAX_OUTPUTS = 6  # lines of the figure of eigenvalues
AXES = {'z': 'along the context z', 'x': 'along the input x', 'y': 'along the output y'}


def draw_figures(layers: list[Layer], out: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Write the figures for one seed's layers as PNG, PDF and SVG.

    Returns:
      The files of the figures, by layer name.
    """
    files: dict[str, list[pathlib.Path]] = {}
    with matplotlib.rc_context(plots.STYLE):
        for layer in layers:
            stem = layer.name.replace('/', '.').replace(' ', '_')
            figures = {'spectrum': _draw_spectrum(layer), 'outputs': _draw_outputs(layer)}
            if len(layer.names) > 1:
                figures['contexts'] = _draw_contexts(layer)
            for kind, figure in figures.items():
                files.setdefault(layer.name, []).extend(plots.save(figure, out, f'{stem}.{kind}'))
    return files


def _draw_spectrum(layer: Layer) -> Figure:
    """Draw the singular values of each unfolding relative to the largest, trained and initial."""
    figure = Figure(figsize=(WIDTH, 2.2), layout='constrained')
    panels = figure.subplots(1, 3, sharey=True)
    for axis, axes in enumerate(panels):
        ranks = []
        for state, color, dashes in (('initial', GREY, '--'), ('trained', PALETTE[0], '-')):
            unfolding = layer.states[state].unfoldings[axis]
            sigma = unfolding.singular_values
            ranks.append(f'{unfolding.effective_rank:.1f}')
            if sigma[0] > 0:
                index = np.arange(1, len(sigma) + 1)
                relative = np.where(sigma > 0, sigma / sigma[0], np.nan)
                marker = 'o' if len(sigma) < 20 else ''
                axes.plot(index, relative, color=color, ls=dashes, marker=marker, ms=2.5, lw=1.2,
                          label=state)  # fmt: skip
        axes.set_title(f'{AXES[unfolding.stream]}\neffective rank {ranks[1]} ({ranks[0]})')
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0].set_yscale('log')
    panels[0].set_ylim(max(1e-4, panels[0].get_ylim()[0]), 1.3)
    panels[0].yaxis.set_major_locator(plots.Decades())
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel('singular value / largest')
    panels[1].set_xlabel('index')
    panels[2].legend(frameon=False, loc='best', handlelength=1.6)
    return figure


def _draw_outputs(layer: Layer) -> Figure:
    """Draw the positive eigenvalues of the outputs with the largest norms, trained and initial."""
    figure = Figure(figsize=(WIDTH, 2.0), layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for axes, state in zip(panels, ('trained', 'initial'), strict=True):
        eigenvalues = layer.states[state].eigenvalues
        largest = np.argsort(-np.linalg.norm(eigenvalues, axis=1), kind='stable')[:MAX_OUTPUTS]
        for line, output in enumerate(largest):
            positive = np.sort(eigenvalues[output][eigenvalues[output] > 0])[::-1]
            style = plots.make_style(line)
            axes.plot(np.arange(1, len(positive) + 1), positive, color=style.color, lw=1,
                      marker='.', ms=3, label=f'output {output}')  # fmt: skip
        axes.set_title(state)
        axes.set_xlabel('index')
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(frameon=False, fontsize=6, handlelength=1.2)
    panels[0].set_ylabel('eigenvalue')
    return figure


def _draw_contexts(layer: Layer) -> Figure:
    """Draw the clusters of the contexts, and the cosines between their zᵀW in the same order."""
    trained, initial = (layer.states[state].contexts for state in ('trained', 'initial'))
    assert trained is not None and initial is not None
    clusters = cluster_contexts(trained.cosines)
    num_contexts = len(layer.names)
    height = 1.1 + 0.115 * num_contexts
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    tree_axes, *panels = figure.subplots(1, 3, width_ratios=(0.7, 1, 1))

    # The clusters, with the labels of the contexts beside them.
    labels = plots.shorten_labels(layer.names)
    hierarchy.dendrogram(
        clusters.linkage,
        ax=tree_axes,
        orientation='left',
        labels=[labels[name] for name in layer.names],
        color_threshold=0,
        above_threshold_color=plots.INK,
        leaf_font_size=6,
    )
    tree_axes.set_title('clusters')
    tree_axes.set_xlabel('1 − cosine')
    for side in ('left', 'right'):
        tree_axes.spines[side].set_visible(False)

    # Both matrices in the order of the leaves, which the dendrogram has from the bottom.
    order = clusters.order[::-1]
    for axes, title, comparison in (
        (panels[0], 'trained', trained),
        (panels[1], 'initial', initial),
    ):
        image = _draw_matrix(axes, comparison, order)
        axes.set_title(title)
    figure.colorbar(image, ax=panels, shrink=0.8, label='cosine of zᵀW', aspect=30)
    return figure


def _draw_matrix(axes: Axes, comparison: ContextComparison, order: np.ndarray) -> AxesImage:
    cosines = comparison.cosines[np.ix_(order, order)]
    image = axes.imshow(cosines, cmap='RdBu_r', vmin=-1, vmax=1, aspect='auto')
    axes.set_xticks([])
    axes.set_yticks([])
    return image
