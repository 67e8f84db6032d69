"""Figures for a paper of 5.5 inches: learning curves with bands, final values, cost, single tasks.

Matplotlib is used through its objects, never pyplot, so that nothing is left behind in a process
that trains; equal input gives equal bytes.
"""

import colorsys
import itertools
import logging
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    Formatter,
    FuncFormatter,
    Locator,
    MaxNLocator,
    NullLocator,
)

from mi.report import statistics, tables
from mi.report.analysis import Row
from mi.report.runs import Arm, Sweep
from mi.report.tables import words

INK = '#1b1b1f'
GREY = '#808080'  # the baseline
# Okabe & Ito's palette, which the colour-blind can tell apart, less black and yellow: these are
# seen on white and on black.
PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GOLDEN = 0.618034  # steps of it, modulo 1, are spread evenly however many there are
DASHES = ('-', (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # one per round of the palette
WEB_DASHES = ('none', '7 3', '2 2', '7 2 2 2')  # the same in SVG
MARKERS = ('o', 's', '^', 'D')  # one per round too, where there are points and no lines
WIDTH = 5.5
LONGEST = 34  # characters of a label
STYLE: dict[Any, Any] = {
    'pdf.fonttype': 42,
    'svg.hashsalt': 'mi.report',
    'svg.fonttype': 'path',
    'text.parse_math': False,  # a label may hold dollars
    'font.size': 8,
    'axes.labelsize': 8,
    'axes.titlesize': 8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'legend.fontsize': 7,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'figure.constrained_layout.w_pad': 0.06,
    **{f'{name}tick.major.width': 0.6 for name in 'xy'},
    **{f'{name}tick.color': INK for name in 'xy'},
    **{name: INK for name in ('text.color', 'axes.labelcolor', 'axes.edgecolor')},
}
METADATA: dict[str, dict[str, None]] = {
    'png': {'Software': None},
    'pdf': {'Creator': None, 'Producer': None, 'CreationDate': None},
    'svg': {'Creator': None, 'Date': None, 'Format': None, 'Type': None},
}

# It reports every glyph of a PDF at INFO, which absl prints.
logging.getLogger('fontTools').setLevel(logging.WARNING)


def draw(sweep: Sweep, rows: list[Row], out: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Writes each figure in every format; returns the files and remarks."""
    remarks: list[str] = []
    paths = []
    with matplotlib.rc_context(STYLE):
        figures = {'curves': _curves(sweep, remarks), 'finals': _finals(sweep, rows)}
        if any(row.tasks for row in rows):
            figures['tasks'] = _tasks(sweep, rows)
        if figure := _pareto(sweep, rows):
            figures['pareto'] = figure
        for name, figure in figures.items():
            paths += save(figure, out, name)
    return paths, remarks


def save(figure: Figure, out: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Writes NAME.png, .pdf and .svg, the same bytes for the same figure; within STYLE."""
    paths = [out / f'{name}.{kind}' for kind in METADATA]
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # what is laid out once stays so, instead of at every draw
    for path in paths:
        figure.savefig(path, dpi=200, metadata=METADATA[path.suffix[1:]])
    return paths


def web_styles(sweep: Sweep) -> list[tuple[str, str]]:
    """Color and dashes of each arm as SVG has them, the same in the page as in the figures."""
    return [(style.color, WEB_DASHES[DASHES.index(style.dashes)]) for style in _style(sweep)]


class Style(NamedTuple):
    """How an arm is drawn: with a line, or with points."""

    color: str
    dashes: Any
    marker: str


def style(number: int) -> Style:
    """The style of an arm by its number; no two have the same color.

    The palette comes first. Each later round of it has other dashes and markers too, as its colors
    are shades that are harder to tell apart.
    """
    turn, place = divmod(number, len(PALETTE))
    color = PALETTE[place]
    if turn:
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
        lightness = 0.32 + 0.36 * ((turn * GOLDEN + 0.45) % 1)  # seen on white and on black
        hue += 0.06 * (turn // 8 * GOLDEN % 1)
        channels = colorsys.hls_to_rgb(hue, lightness, max(0.4, saturation * 0.8))
        color = '#' + ''.join(f'{round(255 * channel):02X}' for channel in channels)
    return Style(color, DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)])


def _style(sweep: Sweep) -> list[Style]:
    """The style of each arm, the same in every figure: the baseline is grey."""
    others = [arm.label for arm in sweep.arms if arm.label != sweep.baseline]
    styles = {label: style(i) for i, label in enumerate(others)}
    return [styles.get(arm.label, Style(GREY, '-', 'o')) for arm in sweep.arms]


def short(values: Sequence[float]) -> list[str]:
    """Numbers with one unit's prefix, in as many digits as tell them apart: 429.5k, 430.0k."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return ['0' for _ in values]
    power = next(power for power in tables.PREFIX if min(sizes) >= 10**power or not power)
    scaled = [value / 10**power for value in values]
    gap = min((abs(b - a) for a, b in itertools.pairwise(sorted(set(scaled)))), default=0.0)
    allowed = 1e-3 * gap or 0.005 * max(map(abs, scaled))
    digits = next(
        (d for d in range(15) if all(abs(x - round(x, d)) <= allowed for x in scaled)), 15
    )
    prefix = tables.PREFIX[power].strip()
    return [f'{x:.{digits}f}{prefix}'.replace('-', '−') if x else '0' for x in scaled]


class Decades(Locator):
    """A few ticks of a logarithmic axis, however many decades or how small a part of one it has."""

    def __call__(self) -> Any:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        low, high = sorted((vmin, vmax))
        powers = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1.0)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            every = -(-len(powers) // 5) if digits == (1,) else 1
            ticks = np.outer(10 ** powers[::every], digits).ravel()
            ticks = ticks[(low <= ticks) & (ticks <= high)]
            if len(ticks) > 2:
                return ticks
        return MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)


class Ticks(Formatter):
    """Writes the ticks of a linear axis by `short`, no two alike."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return short(values)

    def __call__(self, x: float, pos: int | None = None) -> str:
        return short([x])[0]


class Line(NamedTuple):
    """A curve [N] with its band, which is the curve itself where there is one seed."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def line(sweep: Sweep, arm: Arm) -> Line | None:
    """The curve of an arm where all its seeds are finite; None without a point."""
    steps, values = arm.curve(sweep.metric, sweep.curves)
    finite = np.isfinite(values).all(axis=0)
    if not finite.any():
        return None
    mean, low, high = statistics.band(values[:, finite])
    return Line(steps[finite], mean, mean if low is None else low, mean if high is None else high)


def seconds_at(arm: Arm, steps: np.ndarray) -> np.ndarray | None:
    """The seconds of training up to each step; None without a record of them."""
    timed, seconds = arm.seconds()
    return np.interp(steps, np.append(0, timed), np.append(0, seconds)) if len(timed) else None


def _curves(sweep: Sweep, remarks: list[str]) -> Figure:
    """The metric of one split over steps and over seconds, a line and a band per arm."""
    figure = Figure(figsize=(WIDTH, _beside(2.4, len(sweep.arms))), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    lines, ends = [], []
    missing: list[str] = []
    names = labels(arm.label for arm in sweep.arms)
    for arm, style in zip(sweep.arms, _style(sweep), strict=True):
        curve = line(sweep, arm)
        if not np.isfinite(arm.curve(sweep.metric, sweep.curves)[1]).all():
            remarks.append(f'{arm.label}: its curve leaves out steps that are not finite')
        if curve is None:
            missing.append(arm.label)
            continue
        lines.append(curve)
        label = names[arm.label] + ('' if arm.state == 'done' else f' ({arm.state})')
        seconds = seconds_at(arm, curve.steps)
        panels = [(left, curve.steps.astype(float))]
        if seconds is not None:
            panels.append((right, seconds))
        else:
            remarks.append(f'{arm.label}: no curve over seconds, timing.jsonl has no record')
        for axes, x in panels:
            marker = '.' if len(curve.steps) == 1 else ''
            (handle,) = axes.plot(
                x, curve.mean, color=style.color, ls=style.dashes, lw=1.2, marker=marker
            )
            if curve.low is not curve.mean:
                axes.fill_between(x, curve.low, curve.high, color=style.color, alpha=0.2, lw=0)
        ends.append((curve.mean[-1], label, handle))
    if missing:
        remarks.append(
            f'No {sweep.metric} in the {sweep.curves} records, and no curve: {", ".join(missing)}'
        )
    left.set_ylabel(f'{words(sweep.metric)} ({sweep.curves})')
    for axes, label in ((left, 'training step'), (right, 'training seconds')):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        _round_ticks(axes, 4, integer=axes is left)
    if lines:
        left.set_ylim(_zoom(lines))
        left.ticklabel_format(axis='y', useOffset=False)
        # Top to bottom as the lines end, so that legend and lines are read in the same order.
        ends.sort(key=lambda end: -end[0])
        _, texts, handles = zip(*ends, strict=True)
        if len(sweep.arms) > 1:
            figure.legend(
                handles, texts, loc='outside right center', frameon=False, handlelength=1.6
            )
    else:
        for axes in (left, right):
            _say(axes, 'no records yet')
    return figure


def _zoom(lines: list[Line]) -> tuple[float, float]:
    """Limits of y that show the later half of training, and so the ends of the lines apart.

    Early losses are so much larger than the differences at the end that they would hide them. Where
    they are not, up to twice the range of the later half, all is shown.
    """

    def limits(since: float) -> tuple[float, float]:
        parts = [(line, line.steps >= since) for line in lines]
        low = min(float(line.low[part].min()) for line, part in parts if part.any())
        return low, max(float(line.high[part].max()) for line, part in parts if part.any())

    low, high = limits(max(line.steps[-1] for line in lines) / 2)
    whole = limits(0)
    if whole[1] - whole[0] <= 2 * (high - low):
        low, high = whole
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _finals(sweep: Sweep, rows: list[Row]) -> Figure:
    """A line per arm: a point per seed, the mean as a bar, its interval; dashed: the baseline."""
    figure = Figure(figsize=(WIDTH, 0.75 + 0.28 * len(rows)), layout='constrained')
    axes = figure.subplots()
    names = labels(row.arm.label for row in rows)
    for y, (row, (color, *_)) in enumerate(zip(rows, _style(sweep), strict=True)):
        if row.metric is None:
            text = row.arm.state if not row.final else 'not finite'
            axes.text(0.5, y, text, transform=axes.get_yaxis_transform(), color=GREY,
                      ha='center', va='center', fontsize=7, style='italic')  # fmt: skip
            continue
        values = list(row.final.values())
        # Below the line: the interval of few seeds ends exactly at their extremes.
        seeds = [y + 0.27] * len(values)
        axes.plot(values, seeds, 'o', color=color, alpha=0.6, ms=3.5, mew=0, zorder=2)
        if row.metric.low is not None and row.metric.high is not None:
            ends = [row.metric.low, row.metric.high]
            axes.plot(ends, [y, y], color=color, lw=1.4, solid_capstyle='butt', zorder=3)
        axes.plot(row.metric.mean, y, '|', color=color, ms=11, mew=2, zorder=4)
        if row.arm.label == sweep.baseline:
            axes.axvline(row.metric.mean, color=GREY, ls=(0, (4, 3)), lw=0.8, zorder=1)
    axes.set_yticks(range(len(rows)), [names[row.arm.label] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis='x', useOffset=False)
    if not any(row.metric for row in rows):
        axes.set_xticks([])
    better = ', lower is better' if sweep.lower_is_better else ', higher is better'
    axes.set_xlabel(f'{words(sweep.metric)} ({sweep.split}{better if len(rows) > 1 else ""})')
    return figure


COSTS = {'parameters': 'parameters', 'flops': 'FLOPs per {unit}', 'seconds': 'training seconds'}


def costs(sweep: Sweep, row: Row) -> dict[str, float | None]:
    """What an arm costs, by the words of COSTS; nothing where it is not compared."""
    if not sweep.compares(row.arm):
        return dict.fromkeys(COSTS)
    counted = row.arm.counted
    return {
        'parameters': counted('parameters', 'model'),
        'flops': counted(f'flops_per_{sweep.unit}', 'model'),
        'seconds': row.seconds,
    }


def _pareto(sweep: Sweep, rows: list[Row]) -> Figure | None:
    """The final metric against each cost; a line through the arms that no other beats in both."""
    there = [
        (row, row.metric, style, costs(sweep, row))
        for row, style in zip(rows, _style(sweep), strict=True)
        if row.metric is not None and sweep.compares(row.arm)
    ]
    panels = [name for name in COSTS if all(cost[name] for *_, cost in there)]
    if len(there) < 2 or not panels:
        return None
    figure = Figure(figsize=(WIDTH, _beside(2.2, len(there))), layout='constrained')
    names = labels(row.arm.label for row, *_ in there)
    sign = 1 if sweep.lower_is_better else -1
    for axes, name in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        front: list[tuple[float, float]] = []
        for _, e, _, cost in sorted(there, key=lambda t: (t[3][name] or 0, sign * t[1].mean)):
            if not front or sign * e.mean < sign * front[-1][1]:
                front.append((cost[name] or 0, e.mean))
        axes.step(*zip(*front, strict=True), where='post', color=GREY, ls=(0, (4, 3)), lw=0.8)
        handles = []
        for _, e, (color, _, marker), cost in there:
            if e.low is not None and e.high is not None:
                axes.plot([cost[name]] * 2, [e.low, e.high], color=color, lw=1.0, alpha=0.6)
            handles += axes.plot(cost[name], e.mean, marker, color=color, ms=4, mew=0)
        values = [cost[name] or 0 for *_, cost in there]
        if max(values) > 8 * min(values):
            axes.set_xscale('log')
            axes.xaxis.set_major_locator(Decades())
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(Ticks()))
        else:
            _round_ticks(axes, 3, integer=name != 'seconds')
        axes.margins(x=0.1)
        axes.set_xlabel(COSTS[name].format(unit=sweep.unit))
    figure.axes[0].set_ylabel(f'{words(sweep.metric)} ({sweep.split})')
    figure.axes[0].ticklabel_format(axis='y', useOffset=False)
    figure.legend(
        handles, list(names.values()), loc='outside right center', frameon=False, handlelength=1.0
    )
    return figure


def _tasks(sweep: Sweep, rows: list[Row]) -> Figure:
    """A line per task and a point per arm, the tasks sorted by the mean over arms."""
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.tasks is not None:
            each = row.tasks.scores.mean(axis=0)
            for task, mean in zip(row.tasks.tasks, each, strict=True):
                means.setdefault(task, {})[row.arm.label] = float(mean)
    order = sorted(means, key=lambda task: np.mean(list(means[task].values())))
    height = _beside(0.8 + 0.14 * len(order), len(rows) if len(rows) > 1 else 0)
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    axes = figure.subplots()
    names, handles = labels(row.arm.label for row in rows), {}
    for row, (color, _, marker) in zip(rows, _style(sweep), strict=True):
        there = [(means[t][row.arm.label], y) for y, t in enumerate(order)
                 if row.arm.label in means[t]]  # fmt: skip
        if there:
            x, y = zip(*there, strict=True)
            (handle,) = axes.plot(x, y, marker, color=color, ms=3.5, mew=0, alpha=0.85, ls='none')
            handles[names[row.arm.label]] = handle
    shown = labels(order)
    axes.set_yticks(range(len(order)), [shown[task] for task in order])
    axes.tick_params(axis='y', length=0, labelsize=6)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(axis='y', lw=0.3, color=GREY, alpha=0.5)
    axes.spines['left'].set_visible(False)
    axes.set_xlabel(f'{words(sweep.metric)} ({sweep.split}), mean over seeds')
    if len(rows) > 1:
        figure.legend(
            list(handles.values()), list(handles), loc='outside right center', frameon=False,
            handlelength=1.0,
        )  # fmt: skip
    axes.ticklabel_format(axis='x', useOffset=False)
    return figure


def _round_ticks(axes: Axes, count: int, integer: bool) -> None:
    """Sets about so many round ticks of x; whole ones where x counts something."""
    locator = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=integer)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(Ticks())


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha='center', va='center', color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _beside(height: float, entries: int) -> float:
    """Inches of a figure of this height or more that a legend beside it fits into."""
    return max(height, 0.15 * entries + 0.1)


def labels(texts: Iterable[str]) -> dict[str, str]:
    """Each text short enough for a legend, on one line, and no two alike unless they are equal.

    Of a long text both ends are kept, which usually tell arms apart; where they do not, what
    follows the beginning that all such texts share.
    """
    texts = list(dict.fromkeys(texts))
    found = {text: _shortened(' '.join(text.split())) for text in texts}
    for label in set(found.values()):
        alike = [text for text in texts if found[text] == label]
        if len(alike) > 1:
            letters = zip(*alike, strict=False)
            shared = itertools.takewhile(lambda each: len(set(each)) == 1, letters)
            start = max(0, len(list(shared)) - 8)
            found |= {text: _shortened(f'…{" ".join(text[start:].split())}') for text in alike}
    for text in texts:  # what is still like another one is numbered
        copies = [other for other in texts if found[other] == found[text]]
        if len(copies) > 1:
            found |= {copy: f'{found[copy][:30]} ({i})' for i, copy in enumerate(copies, start=1)}
    return found


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f'{text[:14]}…{text[-19:]}'
