"""Sweep that compares fusions by the number of examples that regression tasks need.

Half of the tasks are affine functions, and half are sinusoids. The context of a task is its index,
a noisy descriptor, or inferred from at most 16 examples. Networks with two hidden layers
(concat_mlp has three) and about 6,000 parameters differ in the fusion of input and context. The
report shows errors on known tasks against the number of training examples, and errors on new tasks
against the number of their examples. Every arm is trained with two sets of ten seeds.

    python -m launch.local --sweep=experiments/regression/sweep.py --workdir=runs/regression \
        --parallel=2

The report also has regression.png, .pdf and .md, with errors against the number of examples, and
regression_tasks.png and .pdf, with the predictions for single tasks.

Source: the experiment is ours. See docs/paper.md.
"""

import json
import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels, roll_outs
from launch.sweep import Overrides, chain, product, zip_
from mi.report import plots, runs, tables

CONFIG = 'experiments/regression/config.py'
TITLE = 'Error of many regressions, by the fusion of input and task'
METRIC = 'mse'
SPLIT = 'eval'
CURVES = 'train'
BASELINE = None
PROBLEMS = ('problem.context', 'problem.examples')
NOTES = [
    'A label contains the fusion, the maps that fuse the context, the kind of context, and the '
    'number of training examples per task. Errors are measured against the functions without '
    'noise.',
    'concat fuses the context at the first of the three maps and film at all of them, because '
    'neither can make other functions of it at the last map. The other fusions use the last map, '
    'which gives each task a read-out. These maps were compared on seeds 100 to 102, with the '
    'index of the task, 16 examples and 2,000 steps. The error of mi was 0.050 at the last map, '
    '0.076 at the first and 0.097 at all; that of concat was 0.070 at the first and 0.082 at all; '
    'that of film was 0.073. mi_low_rank, hypernetwork and concat_mlp were only tried at the last '
    'map, so the choice favors mi, concat and film.',
    'multi_head is undefined for a descriptor, an inferred context and new tasks, because it '
    'needs the index of a known task.',
    'none does not receive the task. On each new task, it trains a network from scratch on the '
    'examples of that task.',
    'An inferred context uses at most 16 examples. In training, these examples are noisy and also '
    'count in the loss. On new tasks, they do not count in the error.',
    'Every network trains for 3,000 steps at one learning rate, which falls from 0.01 to 0. On new '
    'tasks, none trains for 500 steps.',
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


def sweep() -> list[Overrides]:
    fixed = [dict(FIXED)]

    def arms(
        sites: dict[str, str], contexts: list[str], examples: tuple[int, ...]
    ) -> list[Overrides]:
        fusions = {'model.fusion.name': list(sites), 'model.site': list(sites.values())}
        return product(
            zip_(**fusions),
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
    """Draw errors on known and new tasks against the number of examples, and write tables."""
    sweep = runs.read_sweep(workdir)
    arms = {_make_key(arm): arm for arm in sweep.arms if arm.finite_values(METRIC, SPLIT)}
    fusions = list(dict.fromkeys(fusion for fusion, _, _ in arms))
    baselines = [fusion for fusion in ('concat', 'none') if fusion in fusions]
    styles = panels.assign_styles(fusions, grey=baselines)
    example_counts = sorted({num_examples for _, _, num_examples in arms})
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 4.2), layout='constrained')
        panel_grid = figure.subplots(2, len(CONTEXTS), sharey='row')

        # A column for each context: errors on known tasks above, on new ones below.
        for (known_axes, new_axes), context in zip(panel_grid.T, CONTEXTS, strict=True):
            known_axes.set_title(CONTEXTS[context])
            shot_counts = set()
            for fusion in fusions:
                if fusion != 'none':
                    known_errors = _read_known(arms, fusion, context)
                    panels.draw_line(known_axes, known_errors, fusion, styles[fusion])
                new_errors = _read_new(arms, fusion, context)
                new_errors.pop(0, None)  # no place on a logarithmic axis
                panels.draw_line(new_axes, new_errors, fusion, styles[fusion])
                shot_counts |= new_errors.keys()
            _format_axes(known_axes, 'examples per task', example_counts)
            _format_axes(new_axes, 'examples per new task', sorted(shot_counts))

        # Labels that the panels share.
        panel_grid[0, 0].set_ylabel('error, known tasks')
        panel_grid[1, 0].set_ylabel('error, new tasks')
        handles = {
            label: handle
            for axes in panel_grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        labels = [tables.humanize(label) for label in handles]
        figure.legend(
            list(handles.values()), labels, loc='outside lower center', ncols=4, frameon=False
        )
        plots.save(figure, out, 'regression')
        _draw_tasks(workdir, out)
    sections = [*_tabulate_errors(arms, fusions, sweep.seed_sets), sweep.describe_excluded()]
    contents = '\n\n'.join(filter(None, sections)) + '\n'
    (out / 'regression.md').write_text(contents, encoding='utf-8')


def _make_key(arm: runs.Arm) -> tuple[str, str, int]:
    overrides = arm.overrides
    return (
        overrides['model.fusion.name'],
        overrides['problem.context'],
        overrides['problem.examples'],
    )


def _read_known(arms: ArmByKey, fusion: str, context: str) -> dict[float, dict[int, float]]:
    """Read the errors on known tasks, {examples of each task: {seed: error}}."""
    return {
        num_examples: arm.final_values(METRIC, SPLIT)
        for (arm_fusion, arm_context, num_examples), arm in sorted(arms.items())
        if (arm_fusion, arm_context) == (fusion, context)
    }


def _read_new(arms: ArmByKey, fusion: str, context: str) -> dict[float, dict[int, float]]:
    """Read the errors on new tasks, {examples: {seed: error}}. All contexts share 'none'."""
    arm = arms.get((fusion, 'one_hot' if fusion == 'none' else context, TRANSFER_EXAMPLES))
    if arm is None:
        return {}
    metric_names = [name for name in arm.metric_names('new') if name.startswith('mse/')]
    shot_counts = sorted(int(name.partition('/')[2]) for name in metric_names)
    return {num_shots: arm.final_values(f'mse/{num_shots}', 'new') for num_shots in shot_counts}


def _format_axes(axes: Axes, label: str, numbers: list[float]) -> None:
    axes.set_yscale('log')
    panels.set_power_ticks(axes.yaxis)
    axes.set_xlabel(label)
    if numbers:
        panels.set_ticks(axes, numbers)


def _draw_tasks(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw two tasks of each family, and the predictions of two networks of the first seed."""
    members = json.loads((workdir / 'sweep.json').read_text())['members']
    artifacts: dict[str, dict[str, np.ndarray]] = {}
    for member in members:
        overrides = member['overrides']
        is_drawn = (
            overrides['problem.context'] == 'one_hot'
            and overrides['problem.examples'] == TRANSFER_EXAMPLES
            and overrides['model.fusion.name'] in DRAWN_FUSIONS
        )
        fusion = overrides['model.fusion.name']
        if not is_drawn or fusion in artifacts:
            continue
        if arrays := roll_outs.load_artifacts(workdir, member['label']):
            artifacts[fusion] = arrays

    # A panel for each task: predictions, the function, and the examples.
    figure = Figure(figsize=(plots.WIDTH, 1.9), layout='constrained')
    panel_row = figure.subplots(1, 4, sharey=True)
    for axes, task_index in zip(panel_row, (0, 2, 1, 3), strict=True):
        for fusion, predictions in artifacts.items():
            color = plots.GREY if fusion == 'concat' else plots.PALETTE[0]
            grid, outputs = (predictions[name][0, task_index] for name in ('grid', 'predictions'))
            axes.plot(grid, outputs, color=color, lw=1.2, label=DRAWN_FUSIONS[fusion])
        if artifacts:
            predictions = next(iter(artifacts.values()))
            targets = predictions['targets'][0, task_index]
            axes.plot(grid, targets, color=plots.INK, lw=0.8, ls=(0, (1, 1)), label='function')
            x, y = (predictions[name][0, task_index] for name in ('x', 'y'))
            axes.plot(x, y, 'o', color=plots.INK, ms=2.5, mew=0, label='examples')
        axes.set_xlabel('x')
    panel_row[0].set_ylabel('y')
    handles, labels = panel_row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    plots.save(figure, out, 'regression_tasks')


def _tabulate_errors(
    arms: ArmByKey, fusions: list[str], draws: tuple[tuple[int, ...], ...]
) -> list[str]:
    """Tabulate errors on known and new tasks, and the rank agreement of both sets of seeds."""
    sections = []
    for context, context_title in CONTEXTS.items():
        for tasks_title, read_errors in (('Known tasks', _read_known), ('New tasks', _read_new)):
            errors_by_fusion = {fusion: read_errors(arms, fusion, context) for fusion in fusions}
            if tasks_title == 'Known tasks':
                errors_by_fusion.pop('none', None)
            example_counts = sorted(set().union(*errors_by_fusion.values()))
            if not example_counts:
                continue

            # A row for each fusion, a column for each number of examples.
            table_rows = []
            for fusion, errors in errors_by_fusion.items():
                if errors:
                    counted_errors = [errors.get(count, {}) for count in example_counts]
                    cells = [panels.format_mean(by_seed, fusion) for by_seed in counted_errors]
                    table_rows.append([tables.humanize(fusion), *cells])
            header = ['fusion', *(f'{count:g} examples [95 %]' for count in example_counts)]
            table = tables.format_markdown(header, table_rows)
            section = f'**{tasks_title}**, told by {context_title}\n\n{table}'

            # Agreement of the rankings, for each number of examples.
            taus = []
            for count in example_counts:
                errors_at_count = {
                    fusion: errors[count]
                    for fusion, errors in errors_by_fusion.items()
                    if count in errors
                }
                tau = panels.compute_agreement(errors_at_count, draws)
                taus += [] if tau is None else [f'{count:g}: {tau:.2f}']
            if taus:
                section += "\n\nKendall's τ of the rankings by the two sets of seeds: "
                section += f'{", ".join(taus)}.'
            sections.append(section)
    return sections
