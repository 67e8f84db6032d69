"""Styles, lines of means with intervals, ticks and rankings of several experiments."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, NullLocator
from scipy import stats

from mi.report import plots, statistics, tables

Values = Mapping[float, Mapping[int, float]]  # {x: {seed: value}}
Style = tuple[str, Any]  # color and dashes


def styles(labels: Iterable[str], grey: Iterable[str] = ()) -> dict[str, Style]:
    """Return distinct colors and dashes by label; shades of grey for the labels in `grey`."""
    labels, grey = dict.fromkeys(labels), dict.fromkeys(grey)
    colored = [label for label in labels if label not in grey]
    by_label: dict[str, Style] = {label: plots.make_style(i)[:2] for i, label in enumerate(colored)}
    for i, label in enumerate(grey):
        turn, place = divmod(i, len(plots.DASHES))
        shade = 0x80 if not turn else 0x40 + round(0x70 * (turn * plots.GOLDEN % 1))
        by_label[label] = (f'#{shade:02X}{shade:02X}{shade:02X}', plots.DASHES[place])
    return by_label


def draw_line(axes: Axes, values: Values, label: str, style: Style) -> None:
    """Draw means over seeds with 95 % intervals; nothing where a value is not finite."""
    estimates = {
        x: statistics.estimate(by_seed, label) for x, by_seed in values.items() if _finite(by_seed)
    }
    if not estimates:
        return
    means = [estimate.mean for estimate in estimates.values()]
    bounds = np.array(
        [[e.mean if end is None else end for end in (e.low, e.high)] for e in estimates.values()]
    )
    color, dashes = style
    axes.errorbar(
        list(estimates), means, np.abs(bounds.T - means), color=color, ls=dashes, marker='.',
        ms=4, lw=1.2, elinewidth=0.8, label=label,
    )  # fmt: skip


SUPERSCRIPTS = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')


def format_power(value: float, position: Any = None) -> str:
    """Write 0.001 as 10⁻³ and 0.002 as 2·10⁻³, in letters, as figures parse no mathematics."""
    mantissa, exponent = f'{value:.3e}'.split('e')
    times = '' if float(mantissa) == 1 else f'{float(mantissa):g}·'
    return f'{times}10' + f'{int(exponent)}'.translate(SUPERSCRIPTS)


def set_power_ticks(axis: Axis) -> None:
    """Set ticks at powers of ten, and between them if there are too few."""
    axis.set_major_locator(plots.Decades())
    axis.set_major_formatter(FuncFormatter(format_power))
    axis.set_minor_locator(NullLocator())


def set_ticks(axes: Axes, numbers: Sequence[float]) -> None:
    """Set a logarithmic axis of x with these ticks and no others."""
    axes.set_xscale('log')
    axes.set_xticks(list(numbers), [f'{n:.12g}' for n in numbers])
    axes.set_xticks([], minor=True)


def interval(values: Mapping[int, float], label: str, digits: int = 3) -> str:
    """Write mean [low, high] in `digits` significant digits; — unless all values are finite."""
    if not _finite(values):
        return tables.NONE
    estimate = statistics.estimate(values, label)
    size = max(abs(estimate.mean), 1e-9)
    places = max(0, digits - 1 - int(np.floor(np.log10(size))))
    return str(tables.format_interval(estimate, min(places, 6)))


def agreement(
    values: Mapping[str, Mapping[int, float]], draws: Sequence[Sequence[int]]
) -> float | None:
    """Return Kendall's τ of the rankings by the means of two sets of seeds; None if undefined.

    Args:
      values: {arm: {seed: value}}.
      draws: the first two are compared; of arms that lack none of their seeds and are finite.
    """
    complete = [
        by_seed
        for by_seed in values.values()
        if _finite(by_seed) and all(s in by_seed for seeds in draws[:2] for s in seeds)
    ]
    if len(draws) < 2 or len(complete) < 2:
        return None
    means = [[np.mean([by_seed[s] for s in seeds]) for by_seed in complete] for seeds in draws[:2]]
    tau = float(stats.kendalltau(*means).statistic)
    return tau if np.isfinite(tau) else None


def _finite(values: Mapping[int, float]) -> bool:
    """Return whether there are values and all are finite; the mean of some would be biased."""
    return bool(values) and bool(np.isfinite(list(values.values())).all())
