"""The figures of a report: learning curves, final values, costs and single tasks."""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mi.report import plots, statistics
from mi.report.analysis import ArmResult
from mi.report.arms import Arm, Sweep
from mi.report.plots import DASHES, GREY, WIDTH, Style
from mi.report.statistics import Estimate

WEB_DASHES = ('none', '7 3', '2 2', '7 2 2 2')  # DASHES in SVG
COSTS = {'parameters': 'parameters', 'flops': 'FLOPs per {unit}', 'seconds': 'training seconds'}


class Curve(NamedTuple):
    """The learning curve of an arm at the steps where all seeds are finite.

    Attributes:
      steps: the steps [N], empty if there are none.
      mean: mean over seeds [N].
      low, high: the band [N], which is the curve itself for a single seed.
      omits_steps: whether other steps were recorded, where a seed is not finite.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    omits_steps: bool


Curves = dict[str, Curve]  # by label of the arm


def make_curves(sweep: Sweep) -> Curves:
    """Compute the learning curve of every arm."""
    return {arm.label: _make_curve(sweep, arm) for arm in sweep.arms}


def _make_curve(sweep: Sweep, arm: Arm) -> Curve:
    steps, values = arm.curve(sweep.metric, sweep.curves)
    is_finite = np.isfinite(values).all(axis=0)
    omits_steps = not is_finite.all()
    if not is_finite.any():
        empty = np.empty(0)
        return Curve(empty, empty, empty, empty, omits_steps)
    mean, low, high = statistics.estimate_band(values[:, is_finite])
    low, high = (mean if bound is None else bound for bound in (low, high))
    return Curve(steps[is_finite], mean, low, high, omits_steps)


def draw_figures(
    sweep: Sweep, results: list[ArmResult], curves: Curves, out: pathlib.Path
) -> tuple[list[pathlib.Path], list[str]]:
    """Draw all figures in every format, and return the paths of the files and remarks."""
    remarks: list[str] = []
    paths = []
    with matplotlib.rc_context(plots.STYLE):
        figures = {
            'curves': _draw_curves(sweep, curves, remarks),
            'finals': _draw_finals(sweep, results),
        }
        if any(result.task_summary for result in results):
            figures['tasks'] = _draw_tasks(sweep, results)
        if pareto := _draw_pareto(sweep, results):
            figures['pareto'] = pareto
        for figure_name, figure in figures.items():
            paths += plots.save(figure, out, figure_name)
    return paths, remarks


def web_styles(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the color and the SVG dashes of each arm, which match those of the figures."""
    return [(style.color, WEB_DASHES[DASHES.index(style.dashes)]) for style in _arm_styles(sweep)]


def _arm_styles(sweep: Sweep) -> list[Style]:
    """Return the style of each arm, which all figures share. The baseline is grey."""
    labels = [arm.label for arm in sweep.arms if arm.label != sweep.baseline]
    styles = {label: plots.make_style(arm_index) for arm_index, label in enumerate(labels)}
    return [styles.get(arm.label, Style(GREY, '-', 'o')) for arm in sweep.arms]


def seconds_at(arm: Arm, steps: np.ndarray) -> np.ndarray | None:
    """Return the training seconds up to each step, or None if they were not recorded."""
    timed_steps, seconds = arm.training_seconds()
    if not len(timed_steps):
        return None
    return np.interp(steps, np.append(0, timed_steps), np.append(0, seconds))


def _draw_curves(sweep: Sweep, curves: Curves, remarks: list[str]) -> Figure:
    """Draw the metric over steps and over seconds, with a line and a band for each arm."""
    figure = Figure(figsize=(WIDTH, _fit_legend(2.4, len(sweep.arms))), layout='constrained')
    step_axes, time_axes = figure.subplots(1, 2, sharey=True)
    labels = plots.shorten_labels(arm.label for arm in sweep.arms)

    # Draw each arm into both panels; remark what is missing.
    drawn: list[Curve] = []
    legend_entries: list[tuple[float, str, Artist]] = []  # final value, label and line
    missing_labels: list[str] = []
    for arm, style in zip(sweep.arms, _arm_styles(sweep), strict=True):
        curve = curves[arm.label]
        if curve.omits_steps:
            remarks.append(f'{arm.label}: its curve omits steps that are not finite')
        if not len(curve.steps):
            missing_labels.append(arm.label)
            continue
        drawn.append(curve)
        line = _draw_curve(step_axes, curve.steps.astype(float), curve, style)
        seconds = seconds_at(arm, curve.steps)
        if seconds is not None:
            line = _draw_curve(time_axes, seconds, curve, style)
        else:
            remarks.append(f'{arm.label}: no curve over seconds, timing.jsonl has no record')
        label = labels[arm.label] + ('' if arm.state == 'done' else f' ({arm.state})')
        legend_entries.append((curve.mean[-1], label, line))
    if missing_labels:
        remarks.append(
            f'No {sweep.metric} in the {sweep.curves} records, and no curve: '
            f'{", ".join(missing_labels)}'
        )

    # Label the axes.
    step_axes.set_ylabel(f'{sweep.metric_title} ({sweep.curves})')
    for axes, xlabel in ((step_axes, 'training step'), (time_axes, 'training seconds')):
        axes.set_xlabel(xlabel)
        axes.set_xlim(left=0)
        plots.set_round_ticks(axes, 4, integer=axes is step_axes)
    if not drawn:
        for axes in (step_axes, time_axes):
            _write_placeholder(axes, 'no records yet')
        return figure
    step_axes.set_ylim(_later_half_limits(drawn))
    step_axes.ticklabel_format(axis='y', useOffset=False)

    # The legend lists the arms from top to bottom, in the order in which the lines end.
    legend_entries.sort(key=lambda entry: -entry[0])
    _, entry_labels, handles = zip(*legend_entries, strict=True)
    if len(sweep.arms) > 1:
        figure.legend(
            handles, entry_labels, loc='outside right center', frameon=False, handlelength=1.6
        )
    return figure


def _draw_curve(axes: Axes, x: np.ndarray, curve: Curve, style: Style) -> Artist:
    """Draw a curve with its band, and return the line."""
    marker = '.' if len(curve.steps) == 1 else ''
    (handle,) = axes.plot(x, curve.mean, color=style.color, ls=style.dashes, lw=1.2, marker=marker)
    if curve.low is not curve.mean:
        axes.fill_between(x, curve.low, curve.high, color=style.color, alpha=0.2, lw=0)
    return handle


def _later_half_limits(curves: list[Curve]) -> tuple[float, float]:
    """Return y limits for the later half of training, so that final differences are visible.

    Early losses are often so large that they would hide these differences. If all of training has
    at most twice the range of the later half, the limits cover all of it.
    """

    def limits_since(step: float) -> tuple[float, float]:
        lows, highs = [], []
        for curve in curves:
            is_later = curve.steps >= step
            if is_later.any():
                lows.append(float(curve.low[is_later].min()))
                highs.append(float(curve.high[is_later].max()))
        return min(lows), max(highs)

    lower_limit, upper_limit = limits_since(max(curve.steps[-1] for curve in curves) / 2)
    lowest, highest = limits_since(0)
    if highest - lowest <= 2 * (upper_limit - lower_limit):
        lower_limit, upper_limit = lowest, highest
    margin = 0.08 * (upper_limit - lower_limit) or 0.05 * abs(upper_limit) or 1.0
    return lower_limit - margin, upper_limit + margin


def _draw_finals(sweep: Sweep, results: list[ArmResult]) -> Figure:
    """Draw the seeds of each arm as points, with their mean and interval.

    A dashed line marks the baseline.
    """
    figure = Figure(figsize=(WIDTH, 0.75 + 0.28 * len(results)), layout='constrained')
    axes = figure.subplots()
    for y, (result, style) in enumerate(zip(results, _arm_styles(sweep), strict=True)):
        if result.metric is None:
            placeholder = result.arm.state if not result.final else 'not finite'
            axes.text(0.5, y, placeholder, transform=axes.get_yaxis_transform(), color=GREY,
                      ha='center', va='center', fontsize=7, style='italic')  # fmt: skip
            continue
        # Seeds are drawn below the line, because the interval of few seeds ends at their extremes.
        values = list(result.final.values())
        seed_y = [y + 0.27] * len(values)
        axes.plot(values, seed_y, 'o', color=style.color, alpha=0.6, ms=3.5, mew=0, zorder=2)
        if result.metric.low is not None and result.metric.high is not None:
            interval = [result.metric.low, result.metric.high]
            axes.plot(interval, [y, y], color=style.color, lw=1.4, solid_capstyle='butt', zorder=3)
        axes.plot(result.metric.mean, y, '|', color=style.color, ms=11, mew=2, zorder=4)
        if result.arm.label == sweep.baseline:
            axes.axvline(result.metric.mean, color=GREY, ls=(0, (4, 3)), lw=0.8, zorder=1)

    # Name the arms on the left and the metric below.
    labels = plots.shorten_labels(result.arm.label for result in results)
    axes.set_yticks(range(len(results)), [labels[result.arm.label] for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis='x', useOffset=False)
    if not any(result.metric for result in results):
        axes.set_xticks([])
    direction = ''
    if len(results) > 1:
        direction = ', lower is better' if sweep.lower_is_better else ', higher is better'
    axes.set_xlabel(f'{sweep.metric_title} ({sweep.split}{direction})')
    return figure


def list_costs(sweep: Sweep, result: ArmResult) -> dict[str, float | None]:
    """Return the costs of an arm by the keys of COSTS. All are None if it is not comparable."""
    if not sweep.is_comparable(result.arm):
        return dict.fromkeys(COSTS)
    return {
        'parameters': result.arm.get_cost('parameters', 'model'),
        'flops': result.arm.get_cost(f'flops_per_{sweep.unit}', 'model'),
        'seconds': result.seconds,
    }


class _Point(NamedTuple):
    """An arm in the figure that shows cost against quality."""

    label: str
    problem: str
    metric: Estimate
    style: Style
    costs: dict[str, float | None]


def _draw_pareto(sweep: Sweep, results: list[ArmResult]) -> Figure | None:
    """Draw the final metric against each cost that is known for all comparable arms.

    Return None if there is no such cost, or if there are fewer than two arms.
    """
    points = [
        _Point(
            label=result.arm.label,
            problem=sweep.name_problem(result.arm),
            metric=result.metric,
            style=style,
            costs=list_costs(sweep, result),
        )
        for result, style in zip(results, _arm_styles(sweep), strict=True)
        if result.metric is not None and sweep.is_comparable(result.arm)
    ]
    cost_names = [name for name in COSTS if all(point.costs[name] for point in points)]
    if len(points) < 2 or not cost_names:
        return None
    figure = Figure(figsize=(WIDTH, _fit_legend(2.2, len(points))), layout='constrained')
    panels = figure.subplots(1, len(cost_names), sharey=True, squeeze=False)[0]
    for axes, cost_name in zip(panels, cost_names, strict=True):
        handles = _draw_cost(axes, points, cost_name, sweep.lower_is_better)
        axes.set_xlabel(COSTS[cost_name].format(unit=sweep.unit))
    panels[0].set_ylabel(f'{sweep.metric_title} ({sweep.split})')
    panels[0].ticklabel_format(axis='y', useOffset=False)
    labels = plots.shorten_labels(point.label for point in points)
    figure.legend(
        handles, list(labels.values()), loc='outside right center', frameon=False, handlelength=1.0
    )
    return figure


def find_front(
    pairs: Iterable[tuple[float, float]], lower_is_better: bool
) -> list[tuple[float, float]]:
    """Return the pairs (cost, mean) that no other pair beats in both, the cheapest first."""
    sign = 1 if lower_is_better else -1
    front: list[tuple[float, float]] = []
    for cost, metric_mean in sorted(pairs, key=lambda pair: (pair[0], sign * pair[1])):
        if not front or sign * metric_mean < sign * front[-1][1]:
            front.append((cost, metric_mean))
    return front


def _draw_cost(
    axes: Axes, points: list[_Point], cost_name: str, lower_is_better: bool
) -> list[Artist]:
    """Draw the metric against one cost, and return the markers of the points."""
    # A dashed line passes through the arms of each problem that no other arm of it beats in both.
    costs = [point.costs[cost_name] or 0 for point in points]
    problem_pairs: dict[str, list[tuple[float, float]]] = {}  # (cost, mean) of each arm
    for point, cost in zip(points, costs, strict=True):
        problem_pairs.setdefault(point.problem, []).append((cost, point.metric.mean))
    for pairs in problem_pairs.values():
        front = find_front(pairs, lower_is_better)
        axes.step(*zip(*front, strict=True), where='post', color=GREY, ls=(0, (4, 3)), lw=0.8)

    # Each arm is a marker with a line for its interval.
    handles: list[Artist] = []
    for (_, _, metric, style, _), cost in zip(points, costs, strict=True):
        if metric.low is not None and metric.high is not None:
            axes.plot([cost] * 2, [metric.low, metric.high], color=style.color, lw=1.0, alpha=0.6)
        handles += axes.plot(cost, metric.mean, style.marker, color=style.color, ms=4, mew=0)

    # Costs that differ by more than a factor of 8 get a logarithmic axis.
    if max(costs) > 8 * min(costs):
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(plots.Decades())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(plots.Ticks()))
    else:
        plots.set_round_ticks(axes, 3, integer=cost_name != 'seconds')
    axes.margins(x=0.1)
    return handles


def _draw_tasks(sweep: Sweep, results: list[ArmResult]) -> Figure:
    """Draw a row for each task with a point for each arm, sorted by the mean over arms."""
    means_by_task: dict[str, dict[str, float]] = {}  # {task: {arm: mean}}
    for result in results:
        if result.task_summary is not None:
            task_means = result.task_summary.scores.mean(axis=0)
            for task, mean in zip(result.task_summary.tasks, task_means, strict=True):
                means_by_task.setdefault(task, {})[result.arm.label] = float(mean)
    sorted_tasks = sorted(
        means_by_task, key=lambda task: np.mean(list(means_by_task[task].values()))
    )

    # Draw the points of each arm.
    height = _fit_legend(0.8 + 0.14 * len(sorted_tasks), len(results) if len(results) > 1 else 0)
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    axes = figure.subplots()
    labels = plots.shorten_labels(result.arm.label for result in results)
    handles = {}
    for result, style in zip(results, _arm_styles(sweep), strict=True):
        label = result.arm.label
        points = [
            (means_by_task[task][label], y)
            for y, task in enumerate(sorted_tasks)
            if label in means_by_task[task]
        ]
        if points:
            (handles[labels[label]],) = axes.plot(
                *zip(*points, strict=True), style.marker, color=style.color, ms=3.5, mew=0,
                alpha=0.85, ls='none',
            )  # fmt: skip

    # Name the tasks on the left and the metric below.
    task_labels = plots.shorten_labels(sorted_tasks)
    axes.set_yticks(range(len(sorted_tasks)), [task_labels[task] for task in sorted_tasks])
    axes.tick_params(axis='y', length=0, labelsize=6)
    axes.set_ylim(-0.7, len(sorted_tasks) - 0.3)
    axes.grid(axis='y', lw=0.3, color=GREY, alpha=0.5)
    axes.spines['left'].set_visible(False)
    axes.set_xlabel(f'{sweep.metric_title} ({sweep.split}), mean over seeds')
    if len(results) > 1:
        figure.legend(
            list(handles.values()), list(handles), loc='outside right center', frameon=False,
            handlelength=1.0,
        )  # fmt: skip
    axes.ticklabel_format(axis='x', useOffset=False)
    return figure


def _write_placeholder(axes: Axes, placeholder: str) -> None:
    axes.text(0.5, 0.5, placeholder, transform=axes.transAxes, ha='center', va='center', color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _fit_legend(height: float, num_entries: int) -> float:
    """Return a figure height in inches, at least `height`, that fits a legend beside the axes."""
    return max(height, 0.15 * num_entries + 0.1)
