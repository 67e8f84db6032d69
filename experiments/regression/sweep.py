"""Many regression tasks: which fusion of input and task needs the fewest examples of each?

Affine functions and sinusoids, half of the tasks each. The task comes as its number, as a noisy
descriptor or as a context inferred from at most 16 of its examples; networks of two hidden layers
(concat_mlp has one more) and about 6,000 parameters differ in the fusion with it. Errors on known
tasks against the examples of each, and on new tasks against the examples that these come with. Ten
seeds, and ten others.

    python -m launch.local --sweep=experiments/regression/sweep.py --workdir=runs/regression \
        --parallel=2

The report also has regression.png, .pdf and .md, and regression_tasks.png and .pdf: errors against
examples, and what is learned of single tasks.

Source: the two families are of Jayakumar et al. (ICLR 2020), recalled; the experiment is ours.
"""

import json
import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels
from launch.sweep import chain, product, zip_
from mi.report import plots, runs, tables

CONFIG = 'experiments/regression/config.py'
TITLE = 'Error of many regressions, by the fusion of input and task'
METRIC = 'mse'
SPLIT = 'eval'
CURVES = 'train'
BASELINE = None
PROBLEMS = ('problem.context', 'problem.examples')
NOTES = [
    'A label is the fusion, the map of three that meets the task, what says which task it is, and '
    'the training examples of each. Errors are those of the functions without noise.',
    'concat meets the task at the first map and film at all of them, as neither could make other '
    'functions of it at the last; the rest at the last map, a read-out for each task. On seeds 100 '
    'to 102, by number, with 16 examples and 2,000 steps, mi was better at the last map (0.050) '
    'than at the first (0.076) or at all (0.097); concat was better at the first (0.070) than at '
    'all (0.082); film the same (0.073). mi_low_rank, hypernetwork and concat_mlp took the last '
    'map, untried, so that the choice favours mi, concat and film over them.',
    'multi_head is not defined for a descriptor, for an inferred context, and for new tasks: it '
    'takes a task by its number alone, and a new one has none.',
    'none is not told the task. Its errors on new tasks are those of a network for each of them, '
    'learnt from its examples alone.',
    'An inferred context is of at most 16 examples, however many there are; in training they are '
    'among those whose error is the loss, noise and all, and of new tasks they are not.',
    'One learning rate, 0.01 and falling to 0, and 3,000 steps for all; 500 for none on new tasks.',
]

SEEDS = [tuple(range(10)), tuple(range(10, 20))]
EXAMPLES = (4, 8, 16, 64)
CONTEXTS = {
    'one_hot': 'the number of the task',
    'descriptor': 'a noisy descriptor',
    'inferred': 'a few examples',
}
SITES = {
    'mi': 'last',
    'mi_low_rank': 'last',
    'hypernetwork': 'last',
    'concat_mlp': 'last',
    'film': 'all',
    'concat': 'first',
}
TRANSFER_EXAMPLES = 16  # examples of each known task, where new ones are shown
DRAWN_FUSIONS = {'concat': 'concat', 'mi': 'MI'}
FIXED = {
    'train.steps': 3000, 'train.eval_every': 3000, 'train.save_every': 3000,
    'optim.learning_rate': 1e-2,
}  # fmt: skip


def sweep() -> list[dict[str, Any]]:
    fixed = [dict(FIXED)]

    def arms(sites: dict[str, str], contexts: list[str], examples: tuple[int, ...]) -> Any:
        words = zip_(**{'model.fusion.name': list(sites), 'model.site': list(sites.values())})
        return product(
            words,
            fixed,
            **{'problem.context': contexts, 'problem.examples': examples, 'seeds': SEEDS},
        )

    return chain(
        arms(SITES, list(CONTEXTS), EXAMPLES),
        arms({'multi_head': 'last'}, ['one_hot'], EXAMPLES),
        arms({'none': 'last'}, ['one_hot'], (TRANSFER_EXAMPLES,)),
    )


ArmByKey = dict[tuple[str, str, int], runs.Arm]  # fusion, context, examples →


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw errors of known and of new tasks against examples, and write tables of both."""
    sweep = runs.read_sweep(workdir)
    arms = {_key(arm): arm for arm in sweep.arms if arm.finite_values(METRIC, SPLIT)}
    fusions = list(dict.fromkeys(fusion for fusion, _, _ in arms))
    styles = panels.styles(fusions, grey=[f for f in ('concat', 'none') if f in fusions])
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 4.2), layout='constrained')
        grid = figure.subplots(2, len(CONTEXTS), sharey='row')
        for (known_axes, new_axes), (context, title) in zip(grid.T, CONTEXTS.items(), strict=True):
            known_axes.set_title(title)
            for fusion in fusions:
                if fusion != 'none':
                    panels.draw_line(
                        known_axes, _read_known(arms, fusion, context), fusion, styles[fusion]
                    )
                errors = {K: errors for K, errors in _read_new(arms, fusion, context).items() if K}
                panels.draw_line(new_axes, errors, fusion, styles[fusion])
            _format_axes(known_axes, 'examples per task', sorted({n for _, _, n in arms}))
            shots = sorted({K for f in fusions for K in _read_new(arms, f, context) if K})
            _format_axes(new_axes, 'examples per new task', shots)
        grid[0, 0].set_ylabel('error, known tasks')
        grid[1, 0].set_ylabel('error, new tasks')
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        names = [tables.humanize(label) for label in handles]
        figure.legend(
            list(handles.values()), names, loc='outside lower center', ncols=4, frameon=False
        )
        plots.save(figure, out, 'regression')
        _draw_tasks(workdir, out)
    parts = [*_write_tables(arms, fusions, sweep.seed_sets), sweep.describe_excluded()]
    text = '\n\n'.join(filter(None, parts)) + '\n'
    (out / 'regression.md').write_text(text, encoding='utf-8')


def _key(arm: runs.Arm) -> tuple[str, str, int]:
    overrides = arm.overrides
    return (
        overrides['model.fusion.name'],
        overrides['problem.context'],
        overrides['problem.examples'],
    )


def _read_known(arms: ArmByKey, fusion: str, context: str) -> dict[float, dict[int, float]]:
    """Return {examples of each task: {seed: error}}."""
    return {
        n: arm.final_values(METRIC, SPLIT)
        for (f, c, n), arm in sorted(arms.items())
        if (f, c) == (fusion, context)
    }


def _read_new(arms: ArmByKey, fusion: str, context: str) -> dict[float, dict[int, float]]:
    """Return {examples of a new task: {seed: error}}; 'none' has the same for every context."""
    arm = arms.get((fusion, 'one_hot' if fusion == 'none' else context, TRANSFER_EXAMPLES))
    names = [n for n in arm.metric_names('new') if n.startswith('mse/')] if arm else []
    shots = sorted(int(name.partition('/')[2]) for name in names)
    return {K: arm.final_values(f'mse/{K}', 'new') for K in shots} if arm else {}


def _format_axes(axes: Axes, label: str, numbers: list[float]) -> None:
    axes.set_yscale('log')
    panels.set_power_ticks(axes.yaxis)
    axes.set_xlabel(label)
    if numbers:
        panels.set_ticks(axes, numbers)


def _draw_tasks(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw two tasks of each family as two networks learned them, of the first seed."""
    members = json.loads((workdir / 'sweep.json').read_text())['members']
    arrays = {}
    for member in members:
        overrides = member['overrides']
        is_drawn = (
            overrides['problem.context'] == 'one_hot'
            and overrides['problem.examples'] == TRANSFER_EXAMPLES
        )
        file = workdir / member['name'] / 'artefacts.npz'
        fusion = overrides['model.fusion.name']
        if is_drawn and fusion in DRAWN_FUSIONS and fusion not in arrays and file.exists():
            arrays[fusion] = np.load(file)
    figure = Figure(figsize=(plots.WIDTH, 1.9), layout='constrained')
    subplots = figure.subplots(1, 4, sharey=True)
    for axes, task in zip(subplots, (0, 2, 1, 3), strict=True):
        for fusion, predictions in arrays.items():
            color = plots.GREY if fusion == 'concat' else plots.PALETTE[0]
            x = predictions['grid'][0, task]
            axes.plot(
                x, predictions['found'][0, task], color=color, lw=1.2, label=DRAWN_FUSIONS[fusion]
            )
        if arrays:
            predictions = next(iter(arrays.values()))
            targets = predictions['wanted'][0, task]
            axes.plot(x, targets, color=plots.INK, lw=0.8, ls=(0, (1, 1)), label='function')
            x, y = (predictions[name][0, task] for name in ('x', 'y'))
            axes.plot(x, y, 'o', color=plots.INK, ms=2.5, mew=0, label='examples')
        axes.set_xlabel('x')
    subplots[0].set_ylabel('y')
    handles, labels = subplots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    plots.save(figure, out, 'regression_tasks')


def _write_tables(
    arms: ArmByKey, fusions: list[str], draws: tuple[tuple[int, ...], ...]
) -> list[str]:
    """Tabulate errors of known and of new tasks, with the agreement of both sets of seeds."""
    texts = []
    for context, title in CONTEXTS.items():
        for title_of_tasks, read_errors in (('Known tasks', _read_known), ('New tasks', _read_new)):
            values = {f: read_errors(arms, f, context) for f in fusions}
            if title_of_tasks == 'Known tasks':
                values.pop('none', None)
            numbers = sorted({n for errors in values.values() for n in errors})
            if not numbers:
                continue
            body = [
                [tables.humanize(f), *(panels.interval(errors.get(n, {}), f) for n in numbers)]
                for f, errors in values.items()
                if errors
            ]
            header = ['fusion', *(f'{n:g} examples [95 %]' for n in numbers)]
            text = (
                f'**{title_of_tasks}**, told by {title}\n\n{tables.format_markdown(header, body)}'
            )
            agreements = [
                (
                    n,
                    panels.agreement(
                        {f: errors[n] for f, errors in values.items() if n in errors}, draws
                    ),
                )
                for n in numbers
            ]
            taus = ', '.join(f'{n:g}: {tau:.2f}' for n, tau in agreements if tau is not None)
            if taus:
                text += f"\n\nKendall's τ of the rankings by the two sets of seeds: {taus}."
            texts.append(text)
    return texts
