"""Long predictions of several arms: their errors over time, and tables of scores.

Errors of different laws, and of different times, differ by orders of magnitude: means over seeds
are geometric.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import panels, ratios
from mi.report import statistics, tables
from mi.report.runs import Arm


class Style(NamedTuple):
    """The name and the style of an arm."""

    label: str
    color: str
    dashes: Any


def load_artifacts(workdir: pathlib.Path, label: str) -> dict[str, np.ndarray]:
    """Load the artefacts of an arm, with the seeds of all its runs joined; {} without any."""
    members = json.loads((workdir / 'sweep.json').read_text())['members']
    files = [workdir / m['name'] / 'artefacts.npz' for m in members if m['label'] == label]
    loaded = [np.load(file) for file in files if file.exists()]
    names = loaded[0].files if loaded else []
    return {name: np.concatenate([part[name] for part in loaded]) for name in names}


def draw_curve(axes: Axes, time: np.ndarray, values: np.ndarray, style: Style) -> None:
    """Draw the geometric mean of [seeds, times] with its interval, where all are positive."""
    is_positive = (values > 0).all(0)
    middle, low, high = statistics.estimate_band(np.log(values[:, is_positive]))
    axes.plot(
        time[is_positive],
        np.exp(middle),
        color=style.color,
        ls=style.dashes,
        lw=1,
        label=style.label,
    )
    if low is not None and high is not None:
        ends = np.exp(low), np.exp(high)
        axes.fill_between(time[is_positive], *ends, color=style.color, alpha=0.15, lw=0)
    axes.set_yscale('log')
    panels.set_power_ticks(axes.yaxis)


def draw_legend(figure: Figure, columns: int) -> None:
    """Draw one legend below all panels, with each label once."""
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    labeled = {label: line for label, line in lines.items() if not label.startswith('_')}
    figure.legend(
        labeled.values(), labeled.keys(), loc='outside lower center', ncols=columns, frameon=False
    )


LEARNED = 0.5  # an error below which a law has learned to move at all; it is 1 for a body at rest
NOTE = (
    'Geometric means over seeds, but for `valid`, a share: its means are arithmetic. Drifts are '
    f'those of the seeds whose error is below {LEARNED}, as a body that rests has none; where '
    'these are not all, their number is given.'
)


def table(
    arms: Mapping[str, Arm],
    scores: Sequence[str],
    metric: str,
    split: str,
    reference: str,
    draws: Sequence[Sequence[int]],
) -> str:
    """Tabulate parameters and scores of {name: arm}, and the ratio to the reference's metric.

    Means over seeds with intervals, as NOTE says; the ratio in each of the sets of seeds `draws`,
    or of all seeds if there are none. There are none where a seed is not finite.
    """
    header = ['law', 'parameters', *map(tables.humanize, scores), 'valid']
    against = f'{tables.humanize(metric)} / that of {reference}'
    header += [f'{against}, seeds {seeds[0]} to {seeds[-1]}' for seeds in draws] or [against]
    baseline = arms[reference].finite_values(metric, split) if reference in arms else {}
    # A row for each law: parameters, scores, and ratios to the reference.
    body = []
    for name, arm in arms.items():
        parameters = arm.get_cost('parameters', 'model')
        line = [name, tables.NONE if parameters is None else f'{parameters:,}']
        for score in scores:
            values = arm.finite_values(score, split)
            text = ratios.format_estimate(ratios.geometric(values, name) if values else None)
            if score.startswith('drift') and values:
                moving = {
                    s for s, error in arm.final_values('error', split).items() if error < LEARNED
                }
                moving_values = {seed: value for seed, value in values.items() if seed in moving}
                text = ratios.format_estimate(
                    ratios.geometric(moving_values, name) if moving_values else None
                )
                if len(moving_values) < len(values):
                    text += f' ({len(moving_values)} of {len(values)})'
            line.append(text)
        valid = arm.finite_values('valid', split)
        line.append(
            str(tables.format_interval(statistics.estimate(valid, name) if valid else None, 2))
        )
        finals = arm.finite_values(metric, split)
        for seeds in draws or [tuple(finals)]:
            ratio = ratios.ratio({s: finals[s] for s in seeds if s in finals}, baseline, name)
            line.append(ratios.format_estimate(None if name == reference else ratio))
        body.append(line)
    return tables.format_markdown(header, body)
