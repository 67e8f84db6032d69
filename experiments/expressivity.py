"""How large a network has to be to fit xᵀz, and two targets that have no product in them.

Networks of ReLU layers, the first of which meets z with the fusion of the arm; for the
concatenation one to three hidden layers. For each dimension of x and z, the smallest network that
reaches a mean squared error of 0.1 on Gaussian inputs, found by bisection on the width with the
best of three learning rates, for each of five seeds; once more with five others.

    python -m launch.local --sweep=experiments/expressivity.py --workdir=runs/growth --parallel=2

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

from launch.sweep import product
from mi.report import panels, plots, runs, statistics, tables

CONFIG = 'configs/expressivity.py:search'
TITLE = 'Growth of the smallest network that reaches an error of 0.1'
METRIC = 'exponent'
SPLIT = CURVES = 'eval'
BASELINE = None
NOTES = [
    'The exponent p of parameters = a · dᵖ, by least squares of logarithms over the dimensions d '
    'from 4 on that were reached.',
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
    """Draws parameters against the dimension, and writes them and the growth laws as tables."""
    arms = runs.read(workdir).arms
    by_target = {
        target: [arm for arm in arms if arm.label.startswith(f'{target},')] for target in TARGETS
    }
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.6), layout='constrained')
        grid = figure.subplots(1, len(TARGETS), sharey=True)
        names = [_name(arm) for arm in arms]
        styles = panels.styles(names, grey=[name for name in names if name.startswith('concat')])
        for axes, (target, of_target) in zip(grid, by_target.items(), strict=True):
            _draw(axes, TARGETS[target], of_target, styles)
        figure.axes[0].set_ylabel('parameters')
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
        plots.save(figure, out, 'expressivity')
    texts = [
        f'**{target}**, {TARGETS[target]}\n\n{_table(of_target)}\n'
        for target, of_target in by_target.items()
        if of_target
    ]
    (out / 'expressivity.md').write_text('\n'.join(texts), encoding='utf-8')


def smallest(arm: runs.Arm) -> dict[int, dict[int, float]]:
    """{dimension: {seed: parameters of the smallest network that reached the target}}."""
    names = [name for name in arm.names('eval') if name.startswith('parameters/')]
    found = {int(name.partition('/')[2]): arm.final(name, 'eval') for name in names}
    return {d: found[d] for d in sorted(found)}


def _name(arm: runs.Arm) -> str:
    _, fusion, depth = arm.label.split(', ')
    return tables.words(fusion) + ('' if depth == '1' else f', {depth} hidden layers')


def _draw(
    axes: Axes, title: str, arms: Sequence[runs.Arm], styles: dict[str, panels.Style]
) -> None:
    """Medians over the seeds, and the whole range of them."""
    for arm in arms:
        found, (colour, dashes) = smallest(arm), styles[_name(arm)]
        d = list(found)
        values = [list(of.values()) for of in found.values()]
        axes.plot(
            d, [np.median(v) for v in values], color=colour, ls=dashes, marker='.', label=_name(arm)
        )
        axes.fill_between(
            d, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0
        )
    axes.set(title=title, xlabel='dimension of x and z', yscale='log')
    panels.powers(axes.yaxis)
    panels.ticks(axes, sorted({d for arm in arms for d in smallest(arm)}))


def _table(arms: Sequence[runs.Arm]) -> str:
    """Median parameters by dimension, where not all seeds got there how many; and the law."""
    dimensions = sorted({d for arm in arms for d in smallest(arm)})
    seeds = len({seed for arm in arms for seed in arm.seeds})
    body = []
    for arm in arms:
        found, line = smallest(arm), [_name(arm)]
        for d in dimensions:
            of = list(found.get(d, {}).values())
            few = '' if len(of) == seeds else f' ({len(of)} of {seeds} seeds)'
            line.append(f'{np.median(of):,.0f}{few}' if of else 'not reached')
        laws = arm.final('exponent', 'eval')
        for drawn in SEEDS:
            of_draw = {seed: laws[seed] for seed in drawn if seed in laws}
            law = statistics.estimate(of_draw, arm.label) if of_draw else None
            line.append(str(tables.interval(law, 2)))
        body.append(line)
    header = ['network', *(f'd = {d}' for d in dimensions)]
    header += [f'exponent, seeds {s[0]} to {s[-1]} [95 %]' for s in SEEDS]
    return tables.markdown(header, body)
