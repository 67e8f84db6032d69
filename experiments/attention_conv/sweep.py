"""Sweep that tests how well self-attention approximates a convolution, and whether it learns one.

Networks of three layers with about 5,000 parameters classify digits of 8 × 8 pixels. The layers are
convolutions, or self-attention with scores that are quadratic in the offset. In self-attention, the
center Δ and the sharpness α of each head are learned from a random start, fixed at a random start,
or learned from a grid. In each trained network of convolutions, every layer is then replaced by K²
heads at the offsets of its kernel. In theory, both networks agree for large α, with an error that
decreases as e^−α down to the rounding error. Theory does not say whether learned centers form the
grid, which the figure shows.

    python -m launch.local --sweep=experiments/attention_conv/sweep.py \
        --workdir=runs/attention_conv --parallel=2

The sweep needs scikit-learn, from the extra `digits`. The report also has construction.png,
centres.png (both also as .pdf) and attention_conv.md.

Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers (ICLR
2020), for the layer, its encoding and the construction. The images (theirs were CIFAR-10), the
networks and their training are ours.
"""

import json
import pathlib
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import ArrayLike

from experiments.figures import panels
from launch.sweep import Overrides, product, zip_
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


def sweep() -> list[Overrides]:
    convolutions = product(**{'model.layer': ['convolution'], 'model.kernel': [3, 5, 1]})
    attention = product(
        **{'model.layer': ['attention']},
        **{'model.heads': [9], 'model.centres': ['learnt', 'fixed', 'grid']},
    )
    four_heads = {'model.layer': 'attention', 'model.heads': 4, 'model.centres': 'learnt'}
    layer_overrides = [*convolutions, *attention, four_heads]
    return product(layer_overrides, zip_(seeds=SEEDS), **{'model.parameters': [5000]})


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the errors of the construction and the centers, and write both as tables."""
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
    sections = [_tabulate_errors(kernels), _tabulate_centers(arms)]
    (out / 'attention_conv.md').write_text('\n\n'.join(sections) + '\n', encoding='utf-8')


class ArmArrays(NamedTuple):
    """The artifacts of an arm, with the arrays of all seeds concatenated, [S, …]."""

    seeds: list[int]
    alphas: list[float]
    arrays: dict[str, np.ndarray]


def read_arms(workdir: pathlib.Path) -> dict[str, ArmArrays]:
    """Read the arrays of each arm from runs that are done, and return them by label."""
    runs_by_label: dict[str, list[ArmArrays]] = {}
    for member in json.loads((workdir / 'sweep.json').read_text())['members']:
        run_dir = workdir / member['name']
        if (run_dir / 'artefacts.npz').exists():
            config = json.loads((run_dir / 'config.json').read_text())
            arrays = dict(np.load(run_dir / 'artefacts.npz'))
            run_arrays = ArmArrays(config['seeds'], config['problem']['alphas'], arrays)
            runs_by_label.setdefault(member['label'], []).append(run_arrays)
    arms = {}
    for label, arm_runs in runs_by_label.items():
        seeds = [seed for run in arm_runs for seed in run.seeds]
        joined_arrays = {
            array_name: np.concatenate([run.arrays[array_name] for run in arm_runs])
            for array_name in arm_runs[0].arrays
        }
        arms[label] = ArmArrays(seeds, arm_runs[0].alphas, joined_arrays)
    return arms


def _draw_construction(figure: Figure, kernels: dict[str, ArmArrays]) -> None:
    """Draw the error of each layer, and the accuracy of the whole network, against α."""
    error_axes, accuracy_axes = figure.subplots(1, 2)
    for (kernel_title, arm), color in zip(kernels.items(), plots.PALETTE, strict=False):
        alphas = np.array(arm.alphas)
        for dtype_index, dtype_name in enumerate(('f32', 'bf16')):
            layer_errors = arm.arrays['layer_error'][:, dtype_index]  # [S, alphas, L]
            line_style = {'color': color, 'ls': plots.DASHES[dtype_index], 'lw': 1.2}
            line_label = f'{kernel_title}, {dtype_name}'
            median_error = np.median(layer_errors, (0, 2))
            median_error[median_error == 0] = np.nan  # no point on a logarithmic axis
            error_axes.plot(alphas, median_error, label=line_label, **line_style)
            error_axes.fill_between(
                alphas, layer_errors.min((0, 2)), layer_errors.max((0, 2)), median_error > 0,
                color=color, alpha=0.15, lw=0,
            )  # fmt: skip
            own_accuracy = arm.arrays['own_accuracy'][:, None]
            accuracy_gap = arm.arrays['accuracy'][:, dtype_index] - own_accuracy
            mean_gap, lower, upper = statistics.estimate_band(100 * accuracy_gap)
            accuracy_axes.plot(alphas, mean_gap, label=line_label, **line_style)
            if lower is not None and upper is not None:
                accuracy_axes.fill_between(alphas, lower, upper, color=color, alpha=0.15, lw=0)

    # The law of the theory, scales and labels.
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
    """Draw the centers and widths of the heads in every layer, for the first seed."""
    depth = next(iter(labeled_arms.values())).arrays['Delta'].shape[1]
    figure = Figure(figsize=(plots.WIDTH, 0.5 + 1.75 * len(labeled_arms)), layout='constrained')
    panel_grid = figure.subplots(len(labeled_arms), depth, squeeze=False, sharex=True, sharey=True)
    for panel_row, (arm_title, arm) in zip(panel_grid, labeled_arms.items(), strict=True):
        panel_row[0].set_ylabel(f'{arm_title}\nrows')
        for layer_index, axes in enumerate(panel_row):
            arrays = {name: array[0, layer_index] for name, array in arm.arrays.items()}
            _draw_heads(axes, arrays)
    for layer_index in range(depth):
        panel_grid[0, layer_index].set_title(f'layer {layer_index + 1}')
        panel_grid[-1, layer_index].set_xlabel('columns')
    handles, labels = panel_grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    return figure


def _draw_heads(axes: Axes, arrays: dict[str, np.ndarray]) -> None:
    """Draw the centers Δ [H, 2] of one layer as (row, column), with rows from top to bottom."""
    kernel_offsets = np.array([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)])
    axes.plot(*kernel_offsets.T[::-1], '+', color=plots.INK, ms=5, mew=0.6, label='3 × 3 kernel')
    initial_centers, final_centers = arrays['Delta_before'], arrays['Delta']
    for centers in zip(initial_centers, final_centers, strict=True):
        rows, columns = np.transpose(centers)
        axes.plot(columns, rows, color=plots.GREY, lw=0.6, zorder=1)
    axes.plot(*initial_centers.T[::-1], 'o', mfc='none', color=plots.GREY, ms=3.5, label='Δ before')
    axes.plot(*final_centers.T[::-1], 'o', color=plots.PALETTE[0], ms=3.5, mew=0, label='Δ after')
    for center, alpha in zip(final_centers, arrays['alpha'], strict=True):
        if alpha > 0:  # below, the head looks away from its center
            radius = float(compute_width(alpha))
            axes.add_patch(Circle(center[::-1], radius, color=plots.PALETTE[0], alpha=0.12, lw=0))
    axes.set(
        aspect='equal', xlim=(-4.5, 4.5), ylim=(4.5, -4.5), xticks=(-4, 0, 4), yticks=(-4, 0, 4)
    )


def compute_width(alpha: ArrayLike) -> np.ndarray:
    """Compute the standard deviation of a head's Gaussian along an axis in pixels, 1 / √(2α)."""
    return 1 / np.sqrt(2 * np.maximum(alpha, 1e-6))


def _tabulate_errors(kernels: dict[str, ArmArrays]) -> str:
    """Tabulate the error, averaged over layers and seeds, and the loss of accuracy."""
    header = ['kernel, α', 'error of a layer, f32 [95 %]', 'bf16 [95 %]']
    header += ['error of the logits, f32 [95 %]', 'accuracy lost, f32, points [95 %]']
    table_rows = []
    for kernel_title, arm in kernels.items():
        arrays = arm.arrays
        accuracy_lost = 100 * (arrays['own_accuracy'][:, None] - arrays['accuracy'][:, 0])
        for alpha_index, alpha in enumerate(arm.alphas):
            error_columns = [
                arrays['layer_error'][:, 0, alpha_index].mean(-1),
                arrays['layer_error'][:, 1, alpha_index].mean(-1),
                arrays['logit_error'][:, 0, alpha_index],
            ]
            table_row = [f'{kernel_title}, {alpha:g}']
            table_row += [
                _format_scientific(_estimate(kernel_title, arm, seed_errors))
                for seed_errors in error_columns
            ]
            mean_loss = _estimate(kernel_title, arm, accuracy_lost[:, alpha_index])
            table_row.append(str(tables.format_interval(mean_loss, 2)))
            table_rows.append(table_row)
    table = tables.format_markdown(header, table_rows)
    return f'**K² heads in place of a K × K convolution**\n\n{table}'


def _tabulate_centers(arms: dict[str, ArmArrays]) -> str:
    """Tabulate the distances between centers and the offsets of a 3 × 3 kernel, by layer."""
    kernel_offsets = np.array([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)], float)
    header = ['arm', 'layer', 'moved, pixels', f'heads within {NEAR} of an offset, before', 'after']
    header += ['offsets with such a head, before', 'after', 'width before', 'after']
    table_rows = []
    for arm_label, arm in arms.items():
        if 'Delta' not in arm.arrays:  # convolutions have no centers
            continue
        for layer_index in range(arm.arrays['Delta'].shape[1]):
            initial_centers, final_centers = (
                arm.arrays[array_name][:, layer_index] for array_name in ('Delta_before', 'Delta')
            )
            moved_distance = np.linalg.norm(final_centers - initial_centers, axis=-1).mean(-1)
            moved_distance[moved_distance < 1e-6] = 0  # rounding

            # Which heads are near which offset, before training and after.
            is_near = [
                np.linalg.norm(centers[:, :, None] - kernel_offsets, axis=-1) <= NEAR
                for centers in (initial_centers, final_centers)
            ]  # [S, H, 9]

            # Values of each seed, and the digits that their mean is written with.
            columns = [(moved_distance, 2)]
            columns += [(100 * near_mask.any(-1).mean(-1), 0) for near_mask in is_near]
            columns += [(near_mask.any(1).sum(-1).astype(float), 1) for near_mask in is_near]
            columns += [
                (np.median(compute_width(arm.arrays[array_name][:, layer_index]), -1), 2)
                for array_name in ('alpha_before', 'alpha')
            ]
            table_row = [arm_label, str(layer_index + 1)]
            table_row += [
                str(tables.format_interval(_estimate(arm_label, arm, seed_values), num_digits))
                for seed_values, num_digits in columns
            ]
            table_rows.append(table_row)
    note = (
        'Means over seeds [95 %]. A 3 × 3 kernel has 9 offsets; heads near one are in per cent. '
        'Widths are medians over heads of 1 / √(2α), in pixels.'
    )
    return f'**Centers of the heads**\n\n{tables.format_markdown(header, table_rows)}\n\n{note}'


def _estimate(arm_label: str, arm: ArmArrays, values: np.ndarray) -> statistics.Estimate:
    by_seed = dict(zip(arm.seeds, map(float, values), strict=True))
    return statistics.estimate(by_seed, arm_label)


def _format_scientific(estimate: statistics.Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f'{estimate.mean:.1e}'
    return f'{estimate.mean:.1e} [{estimate.low:.1e}, {estimate.high:.1e}]'
