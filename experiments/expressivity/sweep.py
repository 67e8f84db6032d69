"""How large a network has to be to fit xᵀz, and two targets that have no product in them.

Networks of ReLU layers, whose first meets z with the fusion of the arm; for the
concatenation one to three hidden layers. For each dimension of x and z, the smallest network that
reaches a mean squared error of 0.1 on Gaussian inputs, found by bisection on the width with the
best of three learning rates, for each of five seeds; once more with five others.

    python -m launch.local --sweep=experiments/expressivity/sweep.py --workdir=runs/growth \
        --parallel=2

The report also has expressivity.png, .pdf and .md: parameters against the
dimension, and the law of their growth.

Source: the question, xᵀz and 0.1 are of Jayakumar et al. (ICLR 2020), recalled; networks, the
other targets, training and search are ours.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels
from launch.sweep import product
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


def sweep() -> list[dict[str, Any]]:
    def arms(targets: list[str], fusions: list[str], depths: list[int]) -> list[dict[str, Any]]:
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
    """Draw parameters against the dimension, and write them and the growth laws as tables."""
    sweep = runs.read_sweep(workdir)
    arms = [arm for arm in sweep.arms if arm.state == 'done']
    by_target = {
        target: [arm for arm in arms if arm.label.startswith(f'{target},')] for target in TARGETS
    }
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.6), layout='constrained')
        grid = figure.subplots(1, len(TARGETS), sharey=True)
        names = [_name(arm) for arm in arms]
        styles = panels.styles(names, grey=[name for name in names if name.startswith('concat')])
        for axes, (target, target_arms) in zip(grid, by_target.items(), strict=True):
            _draw(axes, TARGETS[target], target_arms, styles)
        figure.axes[0].set_ylabel('parameters')
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=4, handlelength=3,
                      frameon=False)  # fmt: skip
        plots.save(figure, out, 'expressivity')
    texts = [
        f'**{target}**, {TARGETS[target]}\n\n{_table(target_arms)}\n'
        for target, target_arms in by_target.items()
        if target_arms
    ]
    texts += [
        'Medians over all seeds; a seed that did not reach the error counts as larger than '
        f'all others. {sweep.describe_excluded()}\n',
        f'{statistics.CAUTION}\n',
    ]
    (out / 'expressivity.md').write_text('\n'.join(texts), encoding='utf-8')


def smallest_parameters(arm: runs.Arm) -> dict[int, dict[int, float]]:
    """Return {dimension: {seed: parameters}}; ∞ where the target was not reached."""
    parameters = {d: arm.final_values(f'parameters/{d}', SPLIT) for d in arm.config['search']['at']}
    return {
        d: {seed: by_seed.get(seed, np.inf) for seed in arm.seeds}
        for d, by_seed in parameters.items()
    }


def growth_law(arm: runs.Arm) -> tuple[list[int], dict[int, float]]:
    """Return the dimensions that all seeds reached, from `fit_from` on, and {seed: exponent}."""
    sizes, fit_from = smallest_parameters(arm), arm.config['search']['fit_from']
    dimensions = [
        d
        for d, by_seed in sizes.items()
        if d >= fit_from and np.isfinite(list(by_seed.values())).all()
    ]
    powers = {
        seed: search.fit_exponent(dimensions, [sizes[d][seed] for d in dimensions])
        for seed in arm.seeds
    }
    return dimensions, {seed: power for seed, power in powers.items() if power is not None}


def _name(arm: runs.Arm) -> str:
    _, fusion, depth = arm.label.split(', ')
    return tables.humanize(fusion) + ('' if depth == '1' else f', {depth} hidden layers')


def _draw(
    axes: Axes, title: str, arms: Sequence[runs.Arm], styles: dict[str, panels.Style]
) -> None:
    """Draw medians and the range of the seeds; a triangle where half of them need more."""
    for i, arm in enumerate(arms):
        sizes, (color, dashes) = smallest_parameters(arm), styles[_name(arm)]
        limit = arm.config['search']['parameters']
        d = np.array(list(sizes), float)
        values = np.sort([list(by_seed.values()) for by_seed in sizes.values()], 1)
        medians = np.median(values, 1)
        is_reached = np.isfinite(medians)
        axes.plot(
            d[is_reached], medians[is_reached], color=color, ls=dashes, marker='.', label=_name(arm)
        )
        ends = values[is_reached, 0], np.minimum(values[is_reached, -1], limit)
        axes.fill_between(d[is_reached], *ends, color=color, alpha=0.2, lw=0)
        if not is_reached.all():  # beside each other, the arms that do not get further
            place = d[~is_reached][:1] * 1.06**i
            axes.plot(place, [limit], '^', color=color, mfc='none', ms=4, clip_on=False)
    axes.set(title=title, xlabel='dimension of x and z', yscale='log')
    panels.set_power_ticks(axes.yaxis)
    panels.set_ticks(axes, sorted({d for arm in arms for d in smallest_parameters(arm)}))


def _table(arms: Sequence[runs.Arm]) -> str:
    """Tabulate median parameters by dimension, how many seeds reached them, and the law."""
    dimensions = sorted({d for arm in arms for d in smallest_parameters(arm)})
    body = []
    for arm in arms:
        line = [_name(arm)]
        for by_seed in smallest_parameters(arm).values():
            values = list(by_seed.values())
            reached = int(np.isfinite(values).sum())
            note = '' if reached == len(values) else f'{reached} of {len(values)} seeds'
            median = np.median(values)
            text = f'{median:,.0f}' if np.isfinite(median) else 'not reached'
            line.append(f'{text} ({note})' if note and reached else text)
        fitted, powers = growth_law(arm)
        line.append(', '.join(map(str, fitted)) if powers else tables.NONE)
        for drawn in SEEDS:
            draw_powers = {seed: powers[seed] for seed in drawn if seed in powers}
            law = statistics.estimate(draw_powers, arm.label) if draw_powers else None
            line.append(str(tables.format_interval(law, 2)))
        body.append(line)
    header = ['network', *(f'd = {d}' for d in dimensions), 'law of d =']
    header += [f'exponent, seeds {s[0]} to {s[-1]} [95 %]' for s in SEEDS]
    return tables.format_markdown(header, body)
