"""Figures of errors over time and tables of scores, for long predictions by several arms.

Errors span orders of magnitude across laws and times. Therefore, means over seeds are geometric.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels, ratios
from mi.report import plots, statistics, tables
from mi.report.arms import Arm


class Style(NamedTuple):
    """The name and the style of an arm."""

    label: str
    color: str
    dashes: plots.Dashes


def load_artifacts(workdir: pathlib.Path, label: str) -> dict[str, np.ndarray]:
    """Load the artifacts of an arm, with all seeds concatenated, or return {} if there are none."""
    members = json.loads((workdir / 'sweep.json').read_text())['members']
    run_dirs = [workdir / member['name'] for member in members if member['label'] == label]
    paths = [run_dir / 'artefacts.npz' for run_dir in run_dirs]
    archives = [np.load(path) for path in paths if path.exists()]
    names = archives[0].files if archives else []
    return {name: np.concatenate([archive[name] for archive in archives]) for name in names}


def draw_curve(axes: Axes, time: np.ndarray, values: np.ndarray, style: Style) -> None:
    """Draw the geometric mean of [seeds, times] with its interval, where all are positive."""
    is_positive = (values > 0).all(0)
    mean_log, lower, upper = statistics.estimate_band(np.log(values[:, is_positive]))
    axes.plot(
        time[is_positive],
        np.exp(mean_log),
        color=style.color,
        ls=style.dashes,
        lw=1,
        label=style.label,
    )
    if lower is not None and upper is not None:
        bounds = np.exp(lower), np.exp(upper)
        axes.fill_between(time[is_positive], *bounds, color=style.color, alpha=0.15, lw=0)
    axes.set_yscale('log')
    panels.set_power_ticks(axes.yaxis)


def draw_legend(figure: Figure, columns: int) -> None:
    """Draw a common legend below all panels, with each label once."""
    handles = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    labels = [label for label in handles if not label.startswith('_')]
    labeled = [handles[label] for label in labels]
    figure.legend(labeled, labels, loc='outside lower center', ncols=columns, frameon=False)


LEARNED = 0.5  # an error below which a law has learned to move at all; it is 1 for a body at rest
NOTE = (
    'Geometric means over seeds, but for `valid`, a share: its means are arithmetic. Drifts are '
    f'those of the seeds whose error is below {LEARNED}, as a body that rests has none; where '
    'these are not all, their number is given.'
)


def tabulate_scores(
    arms: Mapping[str, Arm],
    scores: Sequence[str],
    metric: str,
    split: str,
    reference: str,
    draws: Sequence[Sequence[int]],
) -> str:
    """Tabulate the parameters and scores of {name: arm}, and the ratios to a reference arm.

    Scores are means over seeds with intervals, as NOTE explains. Ratios are computed in each set of
    seeds in `draws`, or over all seeds if `draws` is empty. Non-finite values are omitted.
    """
    header = ['law', 'parameters', *map(tables.humanize, scores), 'valid']
    ratio_title = f'{tables.humanize(metric)} / that of {reference}'
    if draws:
        header += [f'{ratio_title}, seeds {seeds[0]} to {seeds[-1]}' for seeds in draws]
    else:
        header.append(ratio_title)
    baseline = arms[reference].finite_values(metric, split) if reference in arms else {}

    # A row for each law: parameters, scores, and ratios to the reference.
    table_rows = []
    for law, arm in arms.items():
        num_params = arm.get_cost('parameters', 'model')
        table_row = [law, tables.NONE if num_params is None else f'{num_params:,}']
        table_row += [_format_score(arm, law, score, split) for score in scores]
        valid = arm.finite_values('valid', split)
        mean_valid = statistics.estimate(valid, law) if valid else None
        table_row.append(str(tables.format_interval(mean_valid, 2)))
        final_values = arm.finite_values(metric, split)
        for seeds in draws or [tuple(final_values)]:
            draw_values = {seed: final_values[seed] for seed in seeds if seed in final_values}
            ratio = ratios.estimate_ratio(draw_values, baseline, law)
            table_row.append(ratios.format_estimate(None if law == reference else ratio))
        table_rows.append(table_row)
    return tables.format_markdown(header, table_rows)


def _format_score(arm: Arm, law: str, score: str, split: str) -> str:
    """Format the geometric mean of a score, which for a drift is over the seeds that move."""
    values = arm.finite_values(score, split)
    if not values:
        return tables.NONE
    num_seeds = len(values)
    if score.startswith('drift'):
        errors = arm.final_values('error', split)
        moving_seeds = {seed for seed, error in errors.items() if error < LEARNED}
        values = {seed: value for seed, value in values.items() if seed in moving_seeds}
    mean = ratios.estimate_geometric_mean(values, law) if values else None
    note = f' ({len(values)} of {num_seeds})' if len(values) < num_seeds else ''
    return ratios.format_estimate(mean) + note
