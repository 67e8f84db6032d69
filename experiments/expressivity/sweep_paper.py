"""Sweep that measures the size of networks for xᵀWz and xᵀz with the protocol of the paper.

The arms are the smallest concat MLP with one hidden layer, up to dimensions 8 and 6 of x and z, and
up to dimension 20 the smallest MI with a read-out (MI, ReLU, affine map) and a single MI unit. Adam
takes 6,000 steps of 100 examples, at the best of three learning rates. The figure also shows the
curves of the paper, digitized from a slide.

    python -m launch.local --sweep=experiments/expressivity/sweep_paper.py --workdir=runs/paper

The report also has expressivity_paper.png, .pdf and .md, with the number of parameters against the
dimension, and the fits of a power of d and an exponential of d.

Source: Jayakumar et al. (ICLR 2020), section on expressivity, for the targets, steps, examples,
learning rates and the error of 0.1. One hidden layer is recalled from memory. The distribution of W
and everything else are ours.
"""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.expressivity import sweep as growth
from launch.sweep import Overrides
from mi.report import plots, runs, statistics, tables

CONFIG = 'experiments/expressivity/config.py:paper'
TITLE = 'The smallest network that reaches an error of 0.1, by the protocol of the paper'
METRIC = 'parameters/4'
SPLIT = CURVES = 'eval'
BASELINE = None
PROBLEMS = ('problem.target',)
NOTES = [
    'Parameters of the smallest network for dimension 4; other dimensions stand beside it.',
    'A label is the target, the fusion, the number of hidden layers, and the dimensions.',
    'A network has at most 6,000 steps of 100 examples with a constant learning rate, the best of '
    '0.1, 0.001 and 0.0001, and reaches the target if it does so at any multiple of 500 steps.',
    'The widths that are tried are in steps of a factor of 1.26, and networks have at most 2,500 '
    'parameters.',
]

SEEDS = [(0, 1, 2, 3, 4)]
TARGETS = {'product': '⟨x, z⟩', 'bilinear': 'xᵀWz'}
PAPER_TARGETS = {'product': 'inner_product', 'bilinear': 'bilinear'}
MLP, MI, BARE_MI = 'concat MLP', 'MI and read-out', 'one unit of MI'
NETWORKS = {('concat', 1): MLP, ('mi', 1): MI, ('mi', 0): BARE_MI}  # by fusion and depth
# The first that the digitised curve of an MLP no longer has, and those below.
MLP_DIMENSIONS = {'product': (1, 2, 3, 4, 5, 6, 7, 8), 'bilinear': (1, 2, 3, 4, 5, 6)}
MI_DIMENSIONS = (1, 2, 4, 10, 20)
STYLES = {
    MLP: (plots.PALETTE[1], '-'),
    MI: (plots.PALETTE[0], '-'),
    BARE_MI: (plots.PALETTE[2], '-'),
}
PAPER_DASHES = plots.DASHES[2]
PAPER_CURVES = pathlib.Path(__file__).parent / 'paper_curves.csv'

Curve = Mapping[int, float]  # {dimension: parameters}


def sweep() -> list[Overrides]:
    return [
        {
            'seeds': seeds,
            'problem.target': target,
            'model.fusion.name': fusion,
            'model.depth': depth,
            'search.at': MLP_DIMENSIONS[target] if network == MLP else MI_DIMENSIONS,
        }
        for seeds in SEEDS
        for target in TARGETS
        for (fusion, depth), network in NETWORKS.items()
    ]


class Laws(NamedTuple):
    """Two growth laws, fitted to numbers of parameters P(d) by least squares of ln P.

    Attributes:
      exponent: p in the power law P = a dᵖ.
      power_error: root mean square of the residuals of ln P for the power law.
      rate: r in the exponential law P = a rᵈ.
      exponential_error: root mean square of the residuals of ln P for the exponential law.
    """

    exponent: float
    power_error: float
    rate: float
    exponential_error: float


def fit_laws(curve: Curve) -> Laws | None:
    """Fit a power law and an exponential law, or return None if there are fewer than 3 points."""
    if len(curve) < 3:
        return None
    dimensions, log_params = np.array(list(curve), float), np.log(list(curve.values()))

    def fit(predictor: np.ndarray) -> tuple[float, float]:
        slope, intercept = np.polyfit(predictor, log_params, 1)
        residual = log_params - intercept - slope * predictor
        return float(slope), float(np.sqrt(np.mean(np.square(residual))))

    exponent, power_error = fit(np.log(dimensions))
    log_rate, exponential_error = fit(dimensions)
    return Laws(exponent, power_error, float(np.exp(log_rate)), exponential_error)


def read_paper_curves(path: pathlib.Path = PAPER_CURVES) -> dict[str, dict[int, float]]:
    """Read the digitized curves of the paper's MLP, {target: {dimension: parameters}}."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith('#')]
    curves: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(lines):
        curves.setdefault(row['target'], {})[int(row['d'])] = float(row['parameters'])
    return curves


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the parameters against the dimension, with the paper's curves, and write both tables."""
    sweep = runs.read_sweep(workdir)
    paper_curves = read_paper_curves()
    arms: dict[str, dict[str, runs.Arm]] = {target: {} for target in TARGETS}
    for arm in sweep.arms:
        if arm.state == 'done':
            network = arm.overrides['model.fusion.name'], arm.overrides['model.depth']
            arms[arm.overrides['problem.target']][NETWORKS[network]] = arm
    arms = {target: target_arms for target, target_arms in arms.items() if target_arms}

    # A panel for each target, on the axes of the paper's plot.
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.6), layout='constrained')
        panel_row = figure.subplots(1, max(1, len(arms)), sharey=True, squeeze=False)[0]
        for axes, (target, target_arms) in zip(panel_row, arms.items(), strict=False):
            _draw_paper(axes, paper_curves[PAPER_TARGETS[target]])
            for network, arm in target_arms.items():
                _draw_smallest(axes, network, arm)
            axes.set(title=TARGETS[target], xlabel='d, dimension of x and z')
            axes.set(xlim=(0.5, 20.5), ylim=(0, 2500), xticks=(1, 5, 10, 15, 20))
        panel_row[0].set_ylabel('parameters')
        handles, labels = panel_row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
        plots.save(figure, out, 'expressivity_paper')

    sections = [
        f'**{TARGETS[target]}**\n\n'
        f'{_tabulate_smallest(target_arms, paper_curves[PAPER_TARGETS[target]])}'
        for target, target_arms in arms.items()
    ]
    sections += [_tabulate_laws(arms, paper_curves, sweep.seed_sets), sweep.describe_excluded()]
    contents = '\n\n'.join(filter(None, sections)) + '\n'
    (out / 'expressivity_paper.md').write_text(contents, encoding='utf-8')


def _draw_paper(axes: Axes, mlp: Curve) -> None:
    dimensions = np.arange(1, 21)
    style = {'ls': PAPER_DASHES, 'lw': 1.4}
    axes.plot(list(mlp), list(mlp.values()), color=plots.INK, marker='x', ms=4,
              label='MLP, digitised', **style)  # fmt: skip
    axes.plot(dimensions, (dimensions + 1) ** 2, color=plots.GREY, label='MI, (d + 1)²', **style)


def _draw_smallest(axes: Axes, network: str, arm: runs.Arm) -> None:
    """Draw the median over seeds, and the range of seeds that reached the error."""
    by_seed = {
        dimension: np.array(list(values.values()))
        for dimension, values in growth.read_smallest_parameters(arm).items()
    }
    medians = {d: np.median(num_params) for d, num_params in by_seed.items()}
    reached = [dimension for dimension, median in medians.items() if np.isfinite(median)]
    color, dashes = STYLES[network]
    axes.plot(reached, [medians[d] for d in reached], color=color, ls=dashes, marker='.', ms=4,
              lw=1.2, label=f'{network}, ours')  # fmt: skip
    max_params = arm.config['search']['parameters']
    largest = [min(by_seed[dimension].max(), max_params) for dimension in reached]
    smallest = [by_seed[dimension].min() for dimension in reached]
    axes.fill_between(reached, smallest, largest, color=color, alpha=0.2, lw=0)


def _tabulate_smallest(arms: Mapping[str, runs.Arm], paper_mlp: Curve) -> str:
    """Tabulate the medians over seeds by dimension, and the number that reached the error."""
    networks = [network for network in NETWORKS.values() if network in arms]
    by_network = {network: growth.read_smallest_parameters(arms[network]) for network in networks}
    table_rows = []
    for dimension in sorted({d for smallest in by_network.values() for d in smallest}):
        table_row = [str(dimension)]
        for network in networks:
            by_seed = by_network[network].get(dimension)
            cell = growth.format_smallest(list(by_seed.values())) if by_seed else tables.NONE
            table_row.append(cell)
        paper = paper_mlp.get(dimension)
        table_row.append(tables.NONE if paper is None else f'{paper:,.0f}')
        table_rows.append(table_row)
    header = ['d', *(f'{network}, ours' for network in networks), "paper's MLP, digitised"]
    return tables.format_markdown(header, table_rows)


def read_seed_curves(arm: runs.Arm) -> dict[int, Curve]:
    """Read {seed: {dimension: parameters}} for the dimensions that all seeds reached."""
    smallest = growth.read_smallest_parameters(arm)
    reached = [d for d, by_seed in smallest.items() if np.isfinite(list(by_seed.values())).all()]
    return {seed: {d: smallest[d][seed] for d in reached} for seed in arm.seeds}


def _tabulate_laws(
    arms: Mapping[str, Mapping[str, runs.Arm]],
    paper_curves: Mapping[str, Curve],
    draws: Sequence[Sequence[int]],
) -> str:
    """Tabulate both laws for the MLPs, from the digitized curves and from each set of seeds."""
    table_rows = []
    for target, paper_target in PAPER_TARGETS.items():
        title = f'paper, {TARGETS[target]}'
        table_rows.append(_make_law_row(title, {0: paper_curves[paper_target]}))
    for target, target_arms in arms.items():
        if MLP in target_arms:
            curves = read_seed_curves(target_arms[MLP])
            for seeds in draws or [tuple(curves)]:
                title = f'ours, {TARGETS[target]}, seeds {seeds[0]} to {seeds[-1]}'
                table_rows.append(_make_law_row(title, {seed: curves[seed] for seed in seeds}))
    header = ['MLP', 'd', 'exponent p of dᵖ [95 %]', 'error', 'rate r of rᵈ [95 %]', 'error',
              'power is nearer']  # fmt: skip
    return (
        '**Laws of the growth**, fitted for each seed\n\n'
        f'{tables.format_markdown(header, table_rows)}'
    )


def _make_law_row(title: str, curves: Mapping[int, Curve]) -> list[str]:
    laws = {seed: law for seed, curve in curves.items() if (law := fit_laws(curve)) is not None}
    dimensions = list(next(iter(curves.values())))
    cells = [title, f'{dimensions[0]} to {dimensions[-1]}' if dimensions else tables.NONE]
    for field in Laws._fields:
        values = {seed: getattr(law, field) for seed, law in laws.items()}
        estimate = statistics.estimate(values, title) if values else None
        is_error = field.endswith('error')
        cell = tables.NONE if estimate is None else f'{estimate.mean:.2f}'
        cells.append(cell if is_error else str(tables.format_interval(estimate, 2)))
    nearer = [law.power_error < law.exponential_error for law in laws.values()]
    cells.append(f'{sum(nearer)} of {len(nearer)}')
    return cells
