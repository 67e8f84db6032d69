"""Sweep that compares fusions on conditional statements and similarity metrics.

Networks of about 1,000 parameters, and for the statements also of 300, fit four functions of x and
z. They differ in the fusion with z. Errors are measured on the training distribution, and on inputs
x with three times the norm. One run trains two sets of five seeds.

    XLA_FLAGS=--xla_backend_optimization_level=1 python -m launch.local \
        --sweep=experiments/conditional/sweep.py --workdir=runs/conditional

A run spends most of its time on compilation, which the flag shortens.

The report also has conditional.png, .pdf and .md, with both errors and their ratios to the best
concatenation.

Source: the hypothesis of Jayakumar et al. (ICLR 2020). The experiment is ours.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.conditional.config import PRESETS
from experiments.figures import panels, ratios
from launch.sweep import Overrides
from mi.report import plots, runs, tables

CONFIG = 'experiments/conditional/config.py'
TITLE = 'Error of conditional statements and similarity metrics'
METRIC = 'nmse'
SPLIT = CURVES = 'eval'
BASELINE = None
PROBLEMS = ('problem.targets', 'model.parameters')
NOTES = [
    'Mean squared error divided by the variance of the target, mean of two targets, on 8,192 fresh '
    'examples after 3,000 steps of 128. The split far has inputs x of three times the norm.',
    'A label is the targets, the fusion, the hidden layers of x, whether z passes one of its own '
    'first, and the number of parameters that the width is chosen for.',
    'One learning rate, 0.01 and falling to 0, for all.',
]

DRAWS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))  # of the seeds of each run
SIZES = {'statements': (300, 1000), 'metrics': (1000,)}  # parameters
LARGEST = 1000  # of them
TARGETS = {
    'conditional': 'y = A₁x if z₁ > 0 else A₀x',
    'choice': 'y = A_c x, c = argmax z₁ … z₄',
    'cosine': 'y = √d cos(x, z)',
    'squared_distance': 'y = ‖x − z‖², scaled',
}
SPLITS = {'eval': 'inputs as in training', 'far': 'x of three times the norm'}

Errors = Mapping[int, float]  # {seed: error}
ArmByKey = dict[tuple[str, str, int], runs.Arm]  # preset, network, parameters →


class Network(NamedTuple):
    """A network in the comparison.

    Attributes:
      name: name of the network in tables and figures.
      fusion: name of the first layer, which fuses x and z.
      depth: number of hidden layers.
      encodes_context: whether a hidden layer encodes z before the fusion.
    """

    name: str
    fusion: str
    depth: int
    encodes_context: bool = False

    @property
    def overrides(self) -> Overrides:
        """The config overrides that select this network."""
        return {
            'model.fusion.name': self.fusion,
            'model.depth': self.depth,
            'model.encodes_context': self.encodes_context,
        }


CONCAT = (
    Network('concat, 1 hidden layer', 'concat', 1),
    Network('concat, 2 hidden layers', 'concat', 2),
)
STATEMENT_NETWORKS = (
    *CONCAT,
    Network('concat, z encoded', 'concat', 1, True),
    Network('FiLM, z encoded', 'film', 1, True),
    Network('gate, z encoded', 'gate', 1, True),
    Network('MI', 'mi', 1),
    Network('MI, z encoded', 'mi', 0, True),
    Network('low-rank MI, z encoded', 'mi_low_rank', 0, True),
    Network('low-rank MI, z encoded, 1 hidden', 'mi_low_rank', 1, True),
)
METRIC_NETWORKS = (
    *CONCAT,
    Network('MI', 'mi', 1),
    Network('low-rank MI', 'mi_low_rank', 1),
    Network('FiLM', 'film', 1),
)
NETWORKS = {'statements': STATEMENT_NETWORKS, 'metrics': METRIC_NETWORKS}
"""Preset of the config → the networks that are compared on its targets."""


def sweep() -> list[Overrides]:
    return [
        {'problem.targets': PRESETS[preset], **network.overrides, 'model.parameters': size}
        for preset, networks in NETWORKS.items()
        for size in SIZES[preset]
        for network in networks
    ]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw both errors of each network, and write tables of errors and of ratios to concat."""
    sweep = runs.read_sweep(workdir)
    arms = {_make_key(arm): arm for arm in sweep.arms if arm.finite_values(METRIC, SPLIT)}

    # A row of panels for the statements, and one for the metrics; a column for each of the two.
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 4.2), layout='constrained')
        heights = [len(networks) for networks in NETWORKS.values()]
        panel_grid = figure.subplots(
            len(NETWORKS), 2, sharex='row', sharey='row', height_ratios=heights
        )
        for axes_row, (preset, networks) in zip(panel_grid, NETWORKS.items(), strict=True):
            for axes, target in zip(axes_row, PRESETS[preset], strict=True):
                _draw_errors(axes, arms, preset, target)
                axes.set(title=TARGETS[target], xlabel='variance not explained')
            axes_row[0].set_yticks(range(len(networks)), [network.name for network in networks])
            axes_row[0].set_ylim(len(networks) - 0.5, -0.5)
        handles, labels = panel_grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
        plots.save(figure, out, 'conditional')

    sections = [
        _tabulate_errors(arms, preset, target, split)
        for preset, targets in PRESETS.items()
        for target in targets
        for split in SPLITS
    ]
    sections.append(sweep.describe_excluded())
    contents = '\n\n'.join(filter(None, sections)) + '\n'
    (out / 'conditional.md').write_text(contents, encoding='utf-8')


def _make_key(arm: runs.Arm) -> tuple[str, str, int]:
    overrides = arm.overrides
    targets = tuple(overrides['problem.targets'])
    preset = next(preset for preset in PRESETS if PRESETS[preset] == targets)
    name = next(
        network.name
        for network in NETWORKS[preset]
        if network.overrides.items() <= overrides.items()
    )
    return preset, name, overrides['model.parameters']


def _draw_errors(axes: Axes, arms: ArmByKey, preset: str, target: str) -> None:
    """Draw the geometric mean and the interval of each network, by size and split."""
    for split_index, (split, split_title) in enumerate(SPLITS.items()):
        color = plots.PALETTE[split_index]
        for size in SIZES[preset]:
            means, positions = [], []
            for network_index, network in enumerate(NETWORKS[preset]):
                arm = arms.get((preset, network.name, size))
                errors = arm.finite_values(f'{METRIC}/{target}', split) if arm else {}
                if errors:
                    means.append(ratios.estimate_geometric_mean(errors, network.name))
                    positions.append(network_index + 0.2 * (2 * split_index - 1))
            bars = [
                [mean.mean - (mean.low or mean.mean) for mean in means],
                [(mean.high or mean.mean) - mean.mean for mean in means],
            ]
            label = f'{split_title}, {size:,} parameters'
            axes.errorbar(
                [mean.mean for mean in means], positions, xerr=bars, color=color,
                mfc=color if size == LARGEST else 'none',
                marker='o', ms=3.5, mew=0.7, ls='', elinewidth=0.8, label=label,
            )  # fmt: skip
    axes.set_xscale('log')
    panels.set_power_ticks(axes.xaxis)
    axes.tick_params(axis='y', length=0)
    axes.grid(axis='x', lw=0.3, color=plots.GREY, alpha=0.5)


def find_best_concat(errors: Mapping[str, Errors]) -> str | None:
    """Find the concat network with the lowest geometric mean in {network: {seed: error}}."""
    means = {
        name: ratios.estimate_geometric_mean(by_seed, name).mean
        for name, by_seed in errors.items()
        if name.startswith('concat')
    }
    return min(means, key=means.__getitem__, default=None)


def _tabulate_errors(arms: ArmByKey, preset: str, target: str, split: str) -> str:
    """Tabulate the errors by size, and their ratios to the best concat network of that size."""
    errors: dict[str, dict[int, Errors]] = {network.name: {} for network in NETWORKS[preset]}
    for (arm_preset, name, size), arm in arms.items():
        if arm_preset == preset:
            errors[name][size] = arm.finite_values(f'{METRIC}/{target}', split)
    errors = {name: by_size for name, by_size in errors.items() if by_size}
    if not errors:
        return ''
    sizes = SIZES[preset]
    baselines = {
        size: find_best_concat(
            {name: errors[name][size] for name in errors if size in errors[name]}
        )
        for size in sizes
    }

    # A row for each network: errors, then ratios in each set of seeds.
    table_rows = []
    for name, by_size in errors.items():
        cells = [_format_error(by_size.get(size), name) for size in sizes]
        for size in sizes:
            baseline = errors.get(baselines[size] or '', {}).get(size, {})
            cells.append(_format_ratios(by_size.get(size, {}), baseline, name))
        table_rows.append([name, *cells])
    header = ['network', *(f'{size:,} parameters [95 %]' for size in sizes)]
    header += [f'ratio to the best concat, {size:,}' for size in sizes]
    title = f'**{tables.humanize(target)}**, {TARGETS[target]}, {SPLITS[split]}'
    return f'{title}\n\n{tables.format_markdown(header, table_rows)}'


def _format_error(errors: Errors | None, name: str) -> str:
    if not errors:
        return tables.NONE
    return ratios.format_estimate(ratios.estimate_geometric_mean(errors, name))


def _format_ratios(errors: Errors, baseline: Errors, name: str) -> str:
    """Format the ratio to the baseline in each set of seeds, or a dash for the baseline itself."""
    if not errors or errors is baseline:
        return tables.NONE
    cells = []
    for seeds in DRAWS:
        draw_errors = {seed: errors[seed] for seed in seeds if seed in errors}
        cells.append(ratios.format_estimate(ratios.estimate_ratio(draw_errors, baseline, name)))
    return '; '.join(cells)
