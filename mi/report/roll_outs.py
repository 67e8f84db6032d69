"""Predictions that go on for long, of several arms: their errors over time, and tables of scores.

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
from matplotlib.ticker import NullFormatter

from mi.report import ratios, statistics, tables
from mi.report.runs import Arm


class Style(NamedTuple):
    """How an arm is called and drawn."""

    label: str
    colour: str
    dashes: Any


def kept(workdir: pathlib.Path, label: str) -> dict[str, np.ndarray]:
    """The artefacts of an arm, the seeds of all its runs one after the other; {} without them."""
    members = json.loads((workdir / 'sweep.json').read_text())['members']
    files = [workdir / m['name'] / 'artefacts.npz' for m in members if m['label'] == label]
    loaded = [np.load(file) for file in files if file.exists()]
    names = loaded[0].files if loaded else []
    return {name: np.concatenate([of[name] for of in loaded]) for name in names}


def curve(axes: Axes, time: np.ndarray, values: np.ndarray, style: Style) -> None:
    """The geometric mean of [seeds, times] with its interval; only where all are above zero."""
    there = (values > 0).all(0)
    middle, low, high = statistics.band(np.log(values[:, there]))
    axes.plot(
        time[there],
        np.exp(middle),
        color=style.colour,
        ls=style.dashes,
        lw=1,
        label=style.label,
    )
    if low is not None and high is not None:
        ends = np.exp(low), np.exp(high)
        axes.fill_between(time[there], *ends, color=style.colour, alpha=0.15, lw=0)
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, columns: int) -> None:
    """One for all panels, below them; each label once."""
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    named = {label: line for label, line in lines.items() if not label.startswith('_')}
    figure.legend(
        named.values(), named.keys(), loc='outside lower center', ncols=columns, frameon=False
    )


def table(
    arms: Mapping[str, Arm], scores: Sequence[str], metric: str, split: str, reference: str
) -> str:
    """Parameters and scores of {name: arm}; the ratio of the metric to that of the reference.

    Geometric means over seeds with intervals, but for `valid`, a share: that one's is arithmetic.
    """
    header = ['law', 'parameters', *map(tables.words, scores), 'valid']
    header.append(f'{tables.words(metric)} / that of {reference}')
    baseline = arms[reference].final(metric, split) if reference in arms else {}
    body = []
    for name, arm in arms.items():
        parameters = arm.counted('parameters', 'model')
        line = [name, tables.NONE if parameters is None else f'{parameters:,}']
        for score in scores:
            values = arm.final(score, split)
            line.append(ratios.text(ratios.geometric(values, name) if values else None))
        line.append(str(tables.interval(statistics.estimate(arm.final('valid', split), name), 2)))
        against = ratios.ratio(arm.final(metric, split), baseline, name)
        body.append([*line, ratios.text(None if name == reference else against)])
    return tables.markdown(header, body)
