"""Sweep on the product of two numbers, which MI represents exactly and ReLU networks approximate.

ReLU networks on the concatenation of x and z, with one or two hidden layers of several widths, and
one MI without a hidden layer are trained on y = xz with Gaussian x and z. An MI network can also
represent each of these ReLU networks, with W = 0 and their U, V and b. This needs no training, and
a test checks it bit for bit (tests/experiments/test_expressivity.py). Every arm is trained with two
sets of five seeds.

    python -m launch.local --sweep=experiments/expressivity/inclusion.py --workdir=runs/inclusion \
        --parallel=2

The sweep takes ten minutes on two cores. The report also has inclusion.png and .pdf, with the error
against the number of parameters, and the errors of two networks on the plane of x and z.

Source: the question of Jayakumar et al. (ICLR 2020), section on expressivity. The experiment is
ours.
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from experiments.expressivity.problem import SURFACE
from experiments.figures import panels, roll_outs
from launch.sweep import Overrides, product
from mi.report import plots, runs

CONFIG = 'experiments/expressivity/config.py:fit'
TITLE = 'Error of the product of two numbers'
METRIC = 'mse'
SPLIT = CURVES = 'eval'
BASELINE = None
NOTES = [
    'Mean squared error on 8,192 pairs of Gaussian numbers, after 4,000 steps of 256 pairs.',
    'A label is the fusion, the number of hidden layers, and their width.',
    'One learning rate, 0.01 and falling to 0, for all: larger networks may be able to do better.',
]


def sweep() -> list[Overrides]:
    fixed = {
        'problem.dimension': [1],
        'train.steps': [4000],
        'optim.learning_rate': [1e-2],
        'seeds': [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)],
    }

    def networks(fusion: str, depth: int, widths: list[int]) -> list[Overrides]:
        network = {'model.fusion.name': [fusion], 'model.depth': [depth], 'model.width': widths}
        return product(**network, **fixed)

    return [
        *networks('concat', 1, [4, 8, 16, 32, 64, 128, 256]),
        *networks('concat', 2, [4, 8, 16, 32, 64]),
        *networks('mi', 0, [1]),
    ]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the error against the size, and two surfaces of errors, once a run is done."""
    arms = {
        arm.label: arm for arm in runs.read_sweep(workdir).arms if arm.finite_values(METRIC, SPLIT)
    }
    if not arms:
        return
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.3), layout='constrained')
        error_axes, *surface_axes = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        for depth, dashes in zip((1, 2), plots.DASHES, strict=False):
            curve_label = f'concat, {depth} hidden layer{"s" if depth > 1 else ""}'
            prefix = f'concat, {depth},'
            depth_arms = [arm for label, arm in arms.items() if label.startswith(prefix)]
            _draw_errors(error_axes, depth_arms, curve_label, plots.GREY, dashes)
        mi_arms = [arm for label, arm in arms.items() if label.startswith('mi')]
        _draw_errors(error_axes, mi_arms, 'MI', plots.PALETTE[0])
        error_axes.set(xscale='log', yscale='log', xlabel='parameters', ylabel='mean squared error')
        panels.set_power_ticks(error_axes.xaxis)
        panels.set_power_ticks(error_axes.yaxis)
        figure.legend(loc='outside lower center', ncols=3, handlelength=3, frameon=False)
        surface_titles = {'concat, 1, 16': 'concat, width 16', 'mi, 0, 1': 'MI'}
        for axes, (label, title) in zip(surface_axes, surface_titles.items(), strict=True):
            image = _draw_surface(axes, workdir, label, title)
        surface_axes[0].set_ylabel('z')
        surface_axes[1].set_yticklabels([])
        if image is not None:
            color_bar = figure.colorbar(image, ax=surface_axes, label='|error|', extend='both')
            panels.set_power_ticks(color_bar.ax.yaxis)
        plots.save(figure, out, 'inclusion')


def _draw_errors(
    axes: Axes, arms: list[runs.Arm], label: str, color: str, dashes: plots.Dashes = '-'
) -> None:
    """Draw the median and the range over seeds."""
    if not arms:
        return
    sizes = [arm.get_cost('parameters', 'model') for arm in arms]
    seed_errors = [list(arm.final_values(METRIC, SPLIT).values()) for arm in arms]
    medians = np.array([np.median(arm_errors) for arm_errors in seed_errors])
    spread = [
        medians - [min(arm_errors) for arm_errors in seed_errors],
        [max(arm_errors) for arm_errors in seed_errors] - medians,
    ]
    axes.errorbar(
        sizes, medians, spread, color=color, ls=dashes, marker='.', label=label, elinewidth=0.8
    )


def _draw_surface(axes: Axes, workdir: pathlib.Path, label: str, title: str) -> AxesImage | None:
    """Draw |error| of the first seed on a square of x and z, if it is available."""
    artifacts = roll_outs.load_artifacts(workdir, label)
    axes.set(title=title, xlabel='x')
    if not artifacts:
        return None
    abs_error = np.abs(artifacts['surface'][0])
    return axes.imshow(
        np.maximum(abs_error, 1e-12),  # the logarithm of 0
        norm=LogNorm(1e-8, 1),
        origin='lower',
        extent=(-SURFACE, SURFACE, -SURFACE, SURFACE),
    )
