"""Helpers for styles, lines with intervals, ticks, and agreement of rankings."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, NullLocator
from scipy import stats

from mi.report import plots, statistics, tables

Values = Mapping[float, Mapping[int, float]]  # {x: {seed: value}}
Style = tuple[str, plots.Dashes]  # color and dashes


def assign_styles(labels: Iterable[str], grey: Iterable[str] = ()) -> dict[str, Style]:
    """Assign distinct colors and dashes to labels, and shades of grey to the labels in `grey`."""
    labels, grey = dict.fromkeys(labels), dict.fromkeys(grey)
    colored = [label for label in labels if label not in grey]
    styles: dict[str, Style] = {
        label: plots.make_style(index)[:2] for index, label in enumerate(colored)
    }
    for grey_index, label in enumerate(grey):
        turn, dash_index = divmod(grey_index, len(plots.DASHES))
        shade = 0x80 if not turn else 0x40 + round(0x70 * (turn * plots.GOLDEN % 1))
        styles[label] = (f'#{shade:02X}{shade:02X}{shade:02X}', plots.DASHES[dash_index])
    return styles


def draw_line(axes: Axes, values: Values, label: str, style: Style) -> None:
    """Draw means over seeds with 95 % intervals, except where a value is not finite."""
    estimates = {
        x: statistics.estimate(by_seed, label)
        for x, by_seed in values.items()
        if _is_finite(by_seed)
    }
    if not estimates:
        return
    means, lower_bars, upper_bars = [], [], []
    for estimate in estimates.values():
        means.append(estimate.mean)
        lower_bars.append(0 if estimate.low is None else abs(estimate.low - estimate.mean))
        upper_bars.append(0 if estimate.high is None else abs(estimate.high - estimate.mean))
    color, dashes = style
    axes.errorbar(
        list(estimates), means, [lower_bars, upper_bars], color=color, ls=dashes, marker='.',
        ms=4, lw=1.2, elinewidth=0.8, label=label,
    )  # fmt: skip


SUPERSCRIPTS = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')


def format_power(value: float, position: object = None) -> str:
    """Format 0.001 as 10⁻³ and 0.002 as 2·10⁻³, in Unicode, because figures do not parse TeX."""
    mantissa, exponent = f'{value:.3e}'.split('e')
    factor = '' if float(mantissa) == 1 else f'{float(mantissa):g}·'
    return f'{factor}10' + f'{int(exponent)}'.translate(SUPERSCRIPTS)


def set_power_ticks(axis: Axis) -> None:
    """Set ticks at powers of ten, with more ticks between them if there are too few."""
    axis.set_major_locator(plots.Decades())
    axis.set_major_formatter(FuncFormatter(format_power))
    axis.set_minor_locator(NullLocator())


def set_ticks(axes: Axes, numbers: Sequence[float]) -> None:
    """Make the x axis logarithmic, with exactly the given ticks."""
    axes.set_xscale('log')
    axes.set_xticks(list(numbers), [f'{number:.12g}' for number in numbers])
    axes.set_xticks([], minor=True)


def format_mean(values: Mapping[int, float], label: str, digits: int = 3) -> str:
    """Format mean [low, high] with `digits` significant digits, or a dash for non-finite values."""
    if not _is_finite(values):
        return tables.NONE
    estimate = statistics.estimate(values, label)
    magnitude = max(abs(estimate.mean), 1e-9)
    num_decimals = max(0, digits - 1 - int(np.floor(np.log10(magnitude))))
    return str(tables.format_interval(estimate, min(num_decimals, 6)))


def compute_agreement(
    values: Mapping[str, Mapping[int, float]], draws: Sequence[Sequence[int]]
) -> float | None:
    """Compute Kendall's τ between the rankings of arms by two sets of seeds, or None if undefined.

    Args:
      values: {arm: {seed: value}}. Arms with missing seeds or non-finite values are ignored.
      draws: sets of seeds. The first two are compared.
    """
    complete = [
        by_seed
        for by_seed in values.values()
        if _is_finite(by_seed) and all(seed in by_seed for seeds in draws[:2] for seed in seeds)
    ]
    if len(draws) < 2 or len(complete) < 2:
        return None
    means = [
        [np.mean([by_seed[seed] for seed in seeds]) for by_seed in complete] for seeds in draws[:2]
    ]
    tau = float(stats.kendalltau(*means).statistic)
    return tau if np.isfinite(tau) else None


def _is_finite(values: Mapping[int, float]) -> bool:
    """Return whether there are values and all are finite. A mean of the rest would be biased."""
    return bool(values) and bool(np.isfinite(list(values.values())).all())
