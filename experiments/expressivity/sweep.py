"""Sweep that measures the size of networks that fit xᵀz, and two targets without a product.

The networks have ReLU layers, and the first layer fuses x with z by the fusion of the arm.
Concatenation has one to three hidden layers. For each dimension of x and z, a bisection on the
width finds the smallest network with a mean squared error of 0.1 on Gaussian inputs, at the best of
three learning rates. Every arm is trained with two sets of five seeds.

    python -m launch.local --sweep=experiments/expressivity/sweep.py --workdir=runs/growth \
        --parallel=2

The report also has expressivity.png, .pdf and .md, with the number of parameters against the
dimension, and the growth law.

Source: Jayakumar et al. (ICLR 2020) for the question, xᵀz and the error of 0.1. The networks, the
other targets, the training and the search are ours.
"""

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels
from launch.sweep import Overrides, product
from mi.fit import search
from mi.report import (
    plots,
    runs,
    statistics,
    tables,
)

CONFIG = 'experiments/expressivity/config.py:search'
TITLE = 'The smallest network that reaches an error of 0.1'
METRIC = 'parameters/4'
SPLIT = CURVES = 'eval'
BASELINE = None
PROBLEMS = ('problem.target',)
NOTES = [
    'Parameters of the smallest network for dimension 4; other dimensions stand beside it. An arm '
    'that some seeds did not reach the error with has a mean over the others.',
    'The exponent p of parameters = a · dᵖ, by least squares of logarithms over the dimensions d '
    'from 4 on that all seeds of a run reached: not the same for all arms.',
    'A label is the target, the fusion and the number of hidden layers.',
    'A network has at most 2,000 steps of 256 examples, and reaches the target if it does so at '
    'any multiple of 250 steps. One that would fit with more is counted as one that does not.',
    'The widths that are tried are in steps of a factor of 1.26, and networks have at most 30,000 '
    'parameters.',
]

SEEDS = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
TARGETS = {'product': 'y = xᵀz', 'additive': 'y = Σ u(xᵢ) + u(zᵢ)', 'x_only': 'y = Σ u(xᵢ)'}


def sweep() -> list[Overrides]:
    def arms(targets: list[str], fusions: list[str], depths: list[int]) -> list[Overrides]:
        return product(**{
            'problem.target': targets,
            'model.fusion.name': fusions,
            'model.depth': depths,
            'seeds': SEEDS,
        })  # fmt: skip

    return [
        *arms(['product'], ['concat'], [1, 2, 3]),
        *arms(['product'], ['mi', 'mi_low_rank', 'film', 'gate', 'attention'], [1]),
        *arms(['additive', 'x_only'], ['concat', 'mi', 'mi_low_rank', 'film'], [1]),
    ]


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the parameters against the dimension, and write tables of them and of growth laws."""
    sweep = runs.read_sweep(workdir)
    arms = [arm for arm in sweep.arms if arm.state == 'done']
    by_target = {
        target: [arm for arm in arms if arm.label.startswith(f'{target},')] for target in TARGETS
    }
    # A panel for each target, with the same style for a network in all of them.
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.6), layout='constrained')
        panel_row = figure.subplots(1, len(TARGETS), sharey=True)
        networks = [_name_network(arm) for arm in arms]
        concat_networks = [network for network in networks if network.startswith('concat')]
        styles = panels.assign_styles(networks, grey=concat_networks)
        for axes, (target, target_arms) in zip(panel_row, by_target.items(), strict=True):
            _draw_growth(axes, TARGETS[target], target_arms, styles)
        figure.axes[0].set_ylabel('parameters')
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=4, handlelength=3,
                      frameon=False)  # fmt: skip
        plots.save(figure, out, 'expressivity')

    # A table for each target that has been run.
    sections = [
        f'**{target}**, {TARGETS[target]}\n\n{_tabulate_growth(target_arms)}\n'
        for target, target_arms in by_target.items()
        if target_arms
    ]
    sections += [
        'Medians over all seeds; a seed that did not reach the error counts as larger than '
        f'all others. {sweep.describe_excluded()}\n',
        f'{statistics.CAUTION}\n',
    ]
    (out / 'expressivity.md').write_text('\n'.join(sections), encoding='utf-8')


def read_smallest_parameters(arm: runs.Arm) -> dict[int, dict[int, float]]:
    """Read the parameter count of the smallest network that reached the target error.

    Returns:
      {dimension: {seed: count}}, where the count is ∞ if no network of the seed reached the error.
    """
    smallest = {}
    for dimension in arm.config['search']['at']:
        by_seed = arm.final_values(f'parameters/{dimension}', SPLIT)
        smallest[dimension] = {seed: by_seed.get(seed, np.inf) for seed in arm.seeds}
    return smallest


def fit_growth_law(arm: runs.Arm) -> tuple[list[int], dict[int, float]]:
    """Fit {seed: exponent} to the dimensions that all seeds reached, starting at `fit_from`."""
    smallest, fit_from = read_smallest_parameters(arm), arm.config['search']['fit_from']
    dimensions = [
        dimension
        for dimension, by_seed in smallest.items()
        if dimension >= fit_from and np.isfinite(list(by_seed.values())).all()
    ]
    exponents = {}
    for seed in arm.seeds:
        num_params = [smallest[dimension][seed] for dimension in dimensions]
        exponent = search.fit_exponent(dimensions, num_params)
        if exponent is not None:
            exponents[seed] = exponent
    return dimensions, exponents


def _list_dimensions(arms: Sequence[runs.Arm]) -> list[int]:
    return sorted({dimension for arm in arms for dimension in read_smallest_parameters(arm)})


def _name_network(arm: runs.Arm) -> str:
    _, fusion, depth = arm.label.split(', ')
    return tables.humanize(fusion) + ('' if depth == '1' else f', {depth} hidden layers')


def _draw_growth(
    axes: Axes, title: str, arms: Sequence[runs.Arm], styles: dict[str, panels.Style]
) -> None:
    """Draw the median and the range over seeds, with a triangle where half of them need more."""
    for arm_index, arm in enumerate(arms):
        smallest, network = read_smallest_parameters(arm), _name_network(arm)
        color, dashes = styles[network]
        max_params = arm.config['search']['parameters']
        dimensions = np.array(list(smallest), float)
        num_params = np.sort([list(by_seed.values()) for by_seed in smallest.values()], 1)
        medians = np.median(num_params, 1)

        # The dimensions that at least half of the seeds reached, then the first that they did not.
        is_reached = np.isfinite(medians)
        reached, medians = dimensions[is_reached], medians[is_reached]
        axes.plot(reached, medians, color=color, ls=dashes, marker='.', label=network)
        smallest_seed, largest_seed = num_params[is_reached, 0], num_params[is_reached, -1]
        upper_ends = np.minimum(largest_seed, max_params)
        axes.fill_between(reached, smallest_seed, upper_ends, color=color, alpha=0.2, lw=0)
        if not is_reached.all():  # beside each other, the arms that do not get further
            position = dimensions[~is_reached][:1] * 1.06**arm_index
            axes.plot(position, [max_params], '^', color=color, mfc='none', ms=4, clip_on=False)
    axes.set(title=title, xlabel='dimension of x and z', yscale='log')
    panels.set_power_ticks(axes.yaxis)
    panels.set_ticks(axes, _list_dimensions(arms))


def format_smallest(num_params: Sequence[float]) -> str:
    """Format the median over seeds, and how many reached the target if some did not."""
    num_reached = int(np.isfinite(num_params).sum())
    median = np.median(num_params)
    cell = f'{median:,.0f}' if np.isfinite(median) else 'not reached'
    is_partial = 0 < num_reached < len(num_params)
    return cell + (f' ({num_reached} of {len(num_params)} seeds)' if is_partial else '')


def _tabulate_growth(arms: Sequence[runs.Arm]) -> str:
    """Tabulate the median parameters by dimension, the number of seeds, and the growth law."""
    table_rows = []
    for arm in arms:
        table_row = [_name_network(arm)]
        for by_seed in read_smallest_parameters(arm).values():
            table_row.append(format_smallest(list(by_seed.values())))
        fitted, exponents = fit_growth_law(arm)
        table_row.append(', '.join(map(str, fitted)) if exponents else tables.NONE)
        for seeds in SEEDS:
            draw_exponents = {seed: exponents[seed] for seed in seeds if seed in exponents}
            exponent = statistics.estimate(draw_exponents, arm.label) if draw_exponents else None
            table_row.append(str(tables.format_interval(exponent, 2)))
        table_rows.append(table_row)
    header = [
        'network',
        *(f'd = {dimension}' for dimension in _list_dimensions(arms)),
        'law of d =',
    ]
    header += [f'exponent, seeds {seeds[0]} to {seeds[-1]} [95 %]' for seeds in SEEDS]
    return tables.format_markdown(header, table_rows)
