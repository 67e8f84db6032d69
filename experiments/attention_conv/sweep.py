"""Self-attention that can be a convolution: how exactly it is one, and whether it becomes one.

Networks of three layers classify digits of 8 × 8 pixels, all of about 5,000 parameters: of
convolutions, and of self-attention whose scores are quadratic in the offset, with centers Δ and
sharpness α of each head learned, or left as drawn, or learned from a grid on. In each trained
network of convolutions every layer is then replaced by K² heads at the offsets of its kernel:
theory says that it is the same function as α grows, with an error that falls as e^−α until rounding
stops it. Theory does not say that learned centers form the grid: that is what the figure shows.

    python -m launch.local --sweep=experiments/attention_conv/sweep.py \
        --workdir=runs/attention_conv --parallel=2

Needs scikit-learn, the extra `digits`. The report also has construction.png, centres.png (and
.pdf), and attention_conv.md.

Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers (ICLR
2020), for layer, encoding and construction; the images (theirs were CIFAR-10), the networks and
their training are ours.
"""

import json
import pathlib
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from experiments.figures import panels
from launch.sweep import product, zip_
from mi.report import plots, statistics, tables

CONFIG = 'experiments/attention_conv/config.py'
TITLE = 'Digits by convolutions and by self-attention'
METRIC = 'accuracy'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'convolution, 3'
NOTES = [
    'Accuracy on 597 images that each seed holds out, at the end of 1,200 steps of 32 images.',
    'A label is the layer and its kernel; or attention, its heads and their centres: learnt, fixed '
    'as they were drawn, or learnt from a grid on.',
    'All arms have the number of channels that brings them nearest to 5,000 parameters. One '
    'learning rate for all. Convolutions pad with the edge, as self-attention does.',
]

SEEDS = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
DRAWN_ARMS = {'attention, 9, learnt': 'drawn at first', 'attention, 9, grid': 'a grid at first'}
NEAR = 0.5  # pixels from an offset of the kernel


def sweep() -> list[dict[str, Any]]:
    convolutions = product(**{'model.layer': ['convolution'], 'model.kernel': [3, 5, 1]})
    attention = product(
        **{'model.layer': ['attention']},
        **{'model.heads': [9], 'model.centres': ['learnt', 'fixed', 'grid']},
    )
    fewer = {'model.layer': 'attention', 'model.heads': 4, 'model.centres': 'learnt'}
    layers = [*convolutions, *attention, fewer]
    return product(layers, zip_(seeds=SEEDS), **{'model.parameters': [5000]})


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the error of the construction and the centers, and write both as tables."""
    arms = read_arms(workdir)
    kernels = {
        f'{K} × {K}': arms[f'convolution, {K}'] for K in (3, 5) if f'convolution, {K}' in arms
    }
    with matplotlib.rc_context(plots.STYLE):
        if kernels:
            figure = Figure(figsize=(plots.WIDTH, 2.3), layout='constrained')
            _draw_construction(figure, kernels)
            plots.save(figure, out, 'construction')
        labeled_arms = {title: arms[label] for label, title in DRAWN_ARMS.items() if label in arms}
        if labeled_arms:
            plots.save(_draw_centers(labeled_arms), out, 'centres')
    parts = [_tabulate_errors(kernels), _tabulate_centers(arms)]
    (out / 'attention_conv.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


class ArmArrays(NamedTuple):
    """The artifacts of an arm; the arrays of all its seeds are joined, [S, …]."""

    seeds: list[int]
    alphas: list[float]
    arrays: dict[str, np.ndarray]


def read_arms(workdir: pathlib.Path) -> dict[str, ArmArrays]:
    """Return the arrays of each arm by its label, from the runs that are done."""
    parts_of_label: dict[str, list[ArmArrays]] = {}
    for member in json.loads((workdir / 'sweep.json').read_text())['members']:
        folder = workdir / member['name']
        if (folder / 'artefacts.npz').exists():
            config = json.loads((folder / 'config.json').read_text())
            arrays = dict(np.load(folder / 'artefacts.npz'))
            part = ArmArrays(config['seeds'], config['problem']['alphas'], arrays)
            parts_of_label.setdefault(member['label'], []).append(part)
    return {
        label: ArmArrays(
            [seed for part in parts for seed in part.seeds],
            parts[0].alphas,
            {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays},
        )
        for label, parts in parts_of_label.items()
    }


def _draw_construction(figure: Figure, kernels: dict[str, ArmArrays]) -> None:
    """Draw the error of the layers, and the accuracy of the whole network, against α."""
    error_axes, accuracy_axes = figure.subplots(1, 2)
    for (title, arm), color in zip(kernels.items(), plots.PALETTE, strict=False):
        alphas = np.array(arm.alphas)
        for d, (dtype, dashes) in enumerate(zip(('f32', 'bf16'), plots.DASHES, strict=False)):
            errors = arm.arrays['layer_error'][:, d]  # [S, alphas, L]
            style = {'color': color, 'ls': dashes, 'lw': 1.2}
            label = f'{title}, {dtype}'
            median = np.median(errors, (0, 2))
            median[median == 0] = np.nan  # no point on a logarithmic axis
            error_axes.plot(alphas, median, label=label, **style)
            error_axes.fill_between(
                alphas, errors.min((0, 2)), errors.max((0, 2)), median > 0,
                color=color, alpha=0.15, lw=0,
            )  # fmt: skip
            accuracy_gap = arm.arrays['accuracy'][:, d] - arm.arrays['own_accuracy'][:, None]
            mean, low, high = statistics.estimate_band(100 * accuracy_gap)
            accuracy_axes.plot(alphas, mean, label=label, **style)
            if low is not None and high is not None:
                accuracy_axes.fill_between(alphas, low, high, color=color, alpha=0.15, lw=0)
    alphas = np.linspace(0.5, 21, 50)
    error_axes.plot(alphas, np.exp(-alphas), color=plots.GREY, ls=(0, (1, 1)), lw=1, label='e⁻ᵅ')
    error_axes.set(xlabel='α of every head', ylabel='relative error of a layer')
    error_axes.set(yscale='log', xlim=(0, 24), ylim=(1e-9, 2))
    panels.set_power_ticks(error_axes.yaxis)
    accuracy_axes.set(
        xlabel='α of every head', ylabel='accuracy, less that of\nthe convolutions (points)'
    )
    accuracy_axes.set_xlim(0, 12)
    error_axes.legend(frameon=False)


def _draw_centers(labeled_arms: dict[str, ArmArrays]) -> Figure:
    """Draw the centers and widths of every layer's heads, of the first seed."""
    depth = next(iter(labeled_arms.values())).arrays['Delta'].shape[1]
    figure = Figure(figsize=(plots.WIDTH, 0.5 + 1.75 * len(labeled_arms)), layout='constrained')
    grid = figure.subplots(len(labeled_arms), depth, squeeze=False, sharex=True, sharey=True)
    for row, (title, arm) in zip(grid, labeled_arms.items(), strict=True):
        row[0].set_ylabel(f'{title}\nrows')
        for layer, axes in enumerate(row):
            _draw_heads(axes, {name: a[0, layer] for name, a in arm.arrays.items()})
    for layer in range(depth):
        grid[0, layer].set_title(f'layer {layer + 1}')
        grid[-1, layer].set_xlabel('columns')
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    return figure


def _draw_heads(axes: Axes, arrays: dict[str, np.ndarray]) -> None:
    """Draw the offsets of one layer, Δ [H, 2] as (rows, columns); rows run down."""
    offsets = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    axes.plot(*offsets.T[::-1], '+', color=plots.INK, ms=5, mew=0.6, label='3 × 3 kernel')
    initial_centers, final_centers = arrays['Delta_before'], arrays['Delta']
    for start, end in zip(initial_centers, final_centers, strict=True):
        axes.plot(*zip(start[::-1], end[::-1], strict=True), color=plots.GREY, lw=0.6, zorder=1)
    axes.plot(*initial_centers.T[::-1], 'o', mfc='none', color=plots.GREY, ms=3.5, label='Δ before')
    axes.plot(*final_centers.T[::-1], 'o', color=plots.PALETTE[0], ms=3.5, mew=0, label='Δ after')
    for center, alpha in zip(final_centers, arrays['alpha'], strict=True):
        if alpha > 0:  # below, the head looks away from its center
            axes.add_patch(
                Circle(center[::-1], compute_width(alpha), color=plots.PALETTE[0], alpha=0.12, lw=0)
            )
    axes.set(
        aspect='equal', xlim=(-4.5, 4.5), ylim=(4.5, -4.5), xticks=(-4, 0, 4), yticks=(-4, 0, 4)
    )


def compute_width(alpha: Any) -> Any:
    """Return the standard deviation of a head's Gaussian along an axis, in pixels: 1 / √(2α)."""
    return 1 / np.sqrt(2 * np.maximum(alpha, 1e-6))


def _tabulate_errors(kernels: dict[str, ArmArrays]) -> str:
    """Tabulate errors, averaged over layers and seeds, and the accuracy that is lost."""
    header = ['kernel, α', 'error of a layer, f32 [95 %]', 'bf16 [95 %]']
    header += ['error of the logits, f32 [95 %]', 'accuracy lost, f32, points [95 %]']
    body = []
    for title, arm in kernels.items():
        arrays = arm.arrays
        accuracy_lost = 100 * (arrays['own_accuracy'][:, None] - arrays['accuracy'][:, 0])
        for i, alpha in enumerate(arm.alphas):
            columns = [arrays['layer_error'][:, d, i].mean(-1) for d in (0, 1)]
            columns.append(arrays['logit_error'][:, 0, i])
            line = [f'{title}, {alpha:g}']
            line += [_scientific(_estimate(arm, values)) for values in columns]
            body.append(
                [*line, str(tables.format_interval(_estimate(arm, accuracy_lost[:, i]), 2))]
            )
    return '**K² heads in place of a K × K convolution**\n\n' + tables.format_markdown(header, body)


def _tabulate_centers(arms: dict[str, ArmArrays]) -> str:
    """Tabulate the distances of the centers from the offsets of a 3 × 3 kernel, by layer."""
    offsets = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], float)
    header = ['arm', 'layer', 'moved, pixels', f'heads within {NEAR} of an offset, before', 'after']
    header += ['offsets with such a head, before', 'after', 'width before', 'after']
    body = []
    for label, arm in arms.items():
        if 'Delta' not in arm.arrays:
            continue
        for layer in range(arm.arrays['Delta'].shape[1]):
            initial_centers, final_centers = (
                arm.arrays[name][:, layer] for name in ('Delta_before', 'Delta')
            )
            distance = np.linalg.norm(final_centers - initial_centers, axis=-1).mean(-1)
            distance[distance < 1e-6] = 0  # rounding
            is_near = [
                np.linalg.norm(centers[:, :, None] - offsets, axis=-1) <= NEAR
                for centers in (initial_centers, final_centers)
            ]  # [S, H, 9]
            values = [(distance, 2)]
            values += [(100 * mask.any(-1).mean(-1), 0) for mask in is_near]
            values += [(mask.any(1).sum(-1).astype(float), 1) for mask in is_near]
            values += [
                (np.median(compute_width(arm.arrays[name][:, layer]), -1), 2)
                for name in ('alpha_before', 'alpha')
            ]
            line = [label, str(layer + 1)]
            line += [str(tables.format_interval(_estimate(arm, v), digits)) for v, digits in values]
            body.append(line)
    note = (
        'Means over seeds [95 %]. A 3 × 3 kernel has 9 offsets; heads near one are in per cent. '
        'Widths are medians over heads of 1 / √(2α), in pixels.'
    )
    return f'**Centers of the heads**\n\n{tables.format_markdown(header, body)}\n\n{note}'


def _estimate(arm: ArmArrays, values: np.ndarray) -> statistics.Estimate:
    return statistics.estimate(dict(zip(arm.seeds, map(float, values), strict=True)), 'kept')


def _scientific(estimate: statistics.Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f'{estimate.mean:.1e}'
    return f'{estimate.mean:.1e} [{estimate.low:.1e}, {estimate.high:.1e}]'
