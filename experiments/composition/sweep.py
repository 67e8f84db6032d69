"""Sweep that compares how fusions generalize to unseen combinations of modules.

The teacher is the modular teacher of Schug et al. (ICLR 2024). Students have about 4,000 parameters
and differ in the fusion of input and task. They are trained on single modules and on some pairs: in
one ring that connects all modules, in two rings that do not, or on no pairs. They are tested on
other pairs. The context of a task is given by the coefficients of its modules, or learned. Every
arm is trained with two sets of ten seeds.

    python -m launch.local --sweep=experiments/composition/sweep.py --workdir=runs/modules \
        --parallel=2

The report also has composition.png, .pdf and .md, with the errors on seen and unseen combinations.

Source: Schug et al., Discovering Modular Solutions That Generalize Compositionally, for the
question, the teacher and the supports. The students, the inference of contexts and all other
constants are ours.
"""

import pathlib

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels
from launch.sweep import Overrides, chain, product, zip_
from mi.report import (
    plots,
    runs,
    statistics,
    tables,
)

CONFIG = 'experiments/composition/config.py'
TITLE = 'Error on combinations of modules that were not seen'
METRIC = 'error'
SPLIT = 'unseen'
CURVES = 'train'
BASELINE = None
PROBLEMS = ('problem.support', 'problem.context')
NOTES = [
    'The error is the fraction of the variance within tasks that is not explained: 0 for the '
    'teacher itself, and 1 for the mean of each task. It is measured on pairs of modules that were '
    'not trained, which are the same for every support. Curves show the pairs that were trained.',
    'A label contains the fusion, the number of hidden layers, the support, the kind of context, '
    'and the number of parameters.',
    'All students have 4,000 parameters within 7 %, or 7,200 if contexts are learned, and fuse the '
    'context at the first map. mi with one hidden layer has the form of the teacher, with twice '
    'its hidden units. The question is whether such a student finds the teacher.',
    'given: the context is the coefficients of the modules, which are drawn at random. learned: '
    'the coefficients are equal, and the context of each task, 12 numbers that do not count as '
    'parameters, is learned with the network. The context of an unseen task is learned by 500 '
    'gradient steps on 256 of its examples, while the network is fixed.',
    'The support alone has 6 tasks and the others have 12, so its students see half as many '
    'examples.',
    'multi_head is undefined here, because a combination of modules is not a one-hot context.',
    'Every student trains for 4,000 steps at one learning rate, which falls from 0.01 to 0.',
]

SEEDS = [tuple(range(10)), tuple(range(10, 20))]
SUPPORTS = {'connected': 'o', 'disconnected': 's', 'alone': '^'}
STUDENTS = [
    ('mi', 1), ('mi_low_rank', 1), ('hypernetwork', 1), ('experts', 1), ('film', 1), ('gate', 1),
    ('attention', 1), ('concat_mlp', 1), ('concat', 1), ('concat', 2), ('concat', 3),
]  # fmt: skip
LEARNED = [
    ('mi', 1), ('mi_low_rank', 1), ('hypernetwork', 1), ('film', 1), ('concat_mlp', 1),
    ('concat', 2),
]  # fmt: skip
CONTEXTS = {'given': 'coefficients given', 'learned': 'equal coefficients, contexts learned'}


def sweep() -> list[Overrides]:
    def arms(
        students: list[tuple[str, int]], context: str, coefficients: str, parameters: int
    ) -> list[Overrides]:
        fusion_names, depths = zip(*students, strict=True)
        return product(
            zip_(**{'model.fusion.name': fusion_names, 'model.depth': depths}),
            **{
                'problem.support': list(SUPPORTS),
                'problem.context': [context],
                'problem.coefficients': [coefficients],
                'model.parameters': [parameters],
                'seeds': SEEDS,
            },
        )

    return chain(arms(STUDENTS, 'given', 'drawn', 4000), arms(LEARNED, 'learned', 'equal', 7200))


ArmByKey = dict[tuple[str, str, str], runs.Arm]  # student, context, support →


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draw the errors on seen and unseen combinations, and write them as a table."""
    sweep = runs.read_sweep(workdir)
    arms = {_make_key(arm): arm for arm in sweep.arms if arm.finite_values(METRIC, SPLIT)}
    contexts = [context for context in CONTEXTS if any(arm_key[1] == context for arm_key in arms)]
    with matplotlib.rc_context(plots.STYLE):
        num_rows = max((len(_list_students(arms, context)) for context in contexts), default=1)
        figure = Figure(figsize=(plots.WIDTH, 1.3 + 0.2 * num_rows), layout='constrained')
        panel_row = figure.subplots(1, max(1, len(contexts)), squeeze=False)[0]
        for axes, context in zip(panel_row, contexts, strict=False):
            _draw_errors(axes, arms, context)
        handles, labels = panel_row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
        plots.save(figure, out, 'composition')
    sections = [_tabulate_errors(arms, context, sweep.seed_sets) for context in contexts]
    sections = [*filter(None, [*sections, sweep.describe_excluded()])]
    (out / 'composition.md').write_text('\n\n'.join(sections) + '\n', encoding='utf-8')


def _make_key(arm: runs.Arm) -> tuple[str, str, str]:
    overrides, depth = arm.overrides, arm.overrides['model.depth']
    student = tables.humanize(overrides['model.fusion.name'])
    student += f', depth {depth}' if depth > 1 else ''
    return student, overrides['problem.context'], overrides['problem.support']


def _list_students(arms: ArmByKey, context: str) -> list[str]:
    students = (student for student, arm_context, _ in arms if arm_context == context)
    return list(dict.fromkeys(students))


def _draw_errors(axes: Axes, arms: ArmByKey, context: str) -> None:
    """Draw the errors of each student by support, filled for unseen pairs, hollow for seen ones."""
    students = _list_students(arms, context)
    for student_index, student in enumerate(students):
        for support_index, (support, marker) in enumerate(SUPPORTS.items()):
            arm = arms.get((student, context, support))
            if arm is None:
                continue

            # The mean on unseen pairs with its interval, and that on seen ones.
            color, y_mark = plots.PALETTE[support_index], student_index + 0.25 * (support_index - 1)
            unseen_error = statistics.estimate(arm.final_values(METRIC, 'unseen'), student)
            seen_error = statistics.estimate(arm.final_values(METRIC, 'seen'), student)
            axes.plot(seen_error.mean, y_mark, marker, color=color, mfc='none', ms=3.5, mew=0.7)
            if unseen_error.low is not None:
                axes.plot(
                    [unseen_error.low, unseen_error.high], [y_mark, y_mark], color=color, lw=1.2
                )
            mark_label = f'unseen pairs, {support}' if student_index == 0 else None
            axes.plot(
                unseen_error.mean, y_mark, marker, color=color, ms=4, mew=0, ls='', label=mark_label
            )

    # Legend, names of the students and scale.
    if students:
        axes.plot([], [], 'o', color=plots.GREY, mfc='none', ms=3.5, mew=0.7, ls='',
                  label='hollow: combinations seen')  # fmt: skip
    axes.set_yticks(range(len(students)), students)
    axes.set_ylim(len(students) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.grid(axis='x', lw=0.3, color=plots.GREY, alpha=0.5)
    axes.set(xscale='log', xlabel='variance not explained', title=CONTEXTS[context])
    panels.set_power_ticks(axes.xaxis)


def _tabulate_errors(
    arms_by_key: ArmByKey, context: str, draws: tuple[tuple[int, ...], ...]
) -> str:
    """Tabulate the errors by support, and the rank correlation between both sets of seeds."""
    students = _list_students(arms_by_key, context)
    supports = [
        support
        for support in SUPPORTS
        if any((student, context, support) in arms_by_key for student in students)
    ]

    # A row for each student: parameters, then both errors of each support.
    table_rows = []
    for student in students:
        student_arms = [arms_by_key.get((student, context, support)) for support in supports]
        first_arm = next(arm for arm in student_arms if arm is not None)
        table_row = [student, f'{first_arm.get_cost("parameters", "model"):,}']
        for arm in student_arms:
            table_row += [
                panels.format_mean(arm.final_values(METRIC, split), student, 2)
                if arm
                else tables.NONE
                for split in ('seen', 'unseen')
            ]
        table_rows.append(table_row)
    header = ['student', 'parameters']
    header += [f'{support}: {split} [95 %]' for support in supports for split in ('seen', 'unseen')]
    table = tables.format_markdown(header, table_rows)
    section = f'**{CONTEXTS[context].capitalize()}**\n\n{table}'

    # Agreement of the rankings, for each support.
    taus = []
    for support in supports:
        final_errors = {
            student: arms_by_key[arm_key].final_values(METRIC, SPLIT)
            for student in students
            if (arm_key := (student, context, support)) in arms_by_key
        }
        tau = panels.compute_agreement(final_errors, draws)
        taus += [] if tau is None else [f'{support} {tau:.2f}']
    if taus:
        section += "\n\nKendall's τ of the rankings on unseen pairs by the two sets of seeds: "
        section += ', '.join(taus) + '.'
    return section
