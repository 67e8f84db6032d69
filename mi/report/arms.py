"""What the report says of each arm of a sweep, in numbers."""

import dataclasses
import math

import numpy as np

from mi.report import statistics
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class OfTasks:
    """Final scores of one arm on several tasks.

    Attributes:
      tasks: their names.
      scores: [seeds, tasks].
      iqm: interquartile mean over all of them.
      improvement: how probably a seed is better than one of the baseline's on a task.
    """

    tasks: tuple[str, ...]
    scores: np.ndarray
    iqm: Estimate
    improvement: Estimate | None


@dataclasses.dataclass(frozen=True)
class Row:
    """What the table says of an arm; None where there is nothing to say.

    Attributes:
      final: the compared metric per seed, empty where the arm has no final record.
      metric: mean of these, difference: to the baseline, paired by seed.
      tasks: of the scores of each task, where there are several.
      equal_time: mean of the curve when the quickest arm was done.
      secondary: means of the other numbers in the final records, but those of single tasks.
      rate: tokens, or steps of environments, per second of training.
      remarks: why something is missing here.
    """

    arm: Arm
    final: dict[int, float]
    metric: Estimate | None
    difference: Estimate | None
    verdict: str | None
    tasks: 'OfTasks | None'
    equal_time: Estimate | None
    secondary: dict[str, float]
    seconds: float | None
    rate: float | None
    remarks: list[str]


def rows(sweep: Sweep) -> list[Row]:
    """A row per arm, in the order of the sweep; an arm without numbers has its row as well."""
    finals = [arm.final(sweep.metric, sweep.split) for arm in sweep.arms]
    baseline = next(
        (f for f, a in zip(finals, sweep.arms, strict=True) if a.label == sweep.baseline), {}
    )
    if not all(map(math.isfinite, baseline.values())):
        baseline = {}  # the seeds that did not diverge would be a selection
    reference = next((a for a in sweep.arms if a.label == sweep.baseline), None)
    seconds = quickest(sweep)
    return [
        _row(sweep, a, f, baseline, reference, seconds)
        for a, f in zip(sweep.arms, finals, strict=True)
    ]


def quickest(sweep: Sweep) -> float | None:
    """Seconds of training of the quickest arm; None unless all of several are done and timed."""
    seconds = [arm.seconds()[1] for arm in sweep.arms]
    if len(sweep.arms) < 2 or any(a.state != 'done' for a in sweep.arms):
        return None
    return min((float(s[-1]) for s in seconds), default=None) if all(map(len, seconds)) else None


def _row(
    sweep: Sweep,
    arm: Arm,
    final: dict[int, float],
    baseline: dict[int, float],
    reference: Arm | None,
    seconds_of_quickest: float | None,
) -> Row:
    mean = against = None
    remarks = []
    try:
        mean = statistics.estimate(final, arm.label) if final else None
        if arm.label != sweep.baseline:
            against = statistics.difference(final, baseline, arm.label)
    except ValueError as error:
        remarks.append(f'{error}; no mean')
    if not final and arm.state == 'done':
        remarks.append(f'{arm.label}: no {sweep.metric} in the {sweep.split} records')
    if 0 < len(final) < len(arm.seeds):
        remarks.append(f'{arm.label}: {len(final)} of {len(arm.seeds)} seeds have a final record')
    if against is not None and against.n < max(len(final), len(baseline)):
        remarks.append(
            f'{arm.label}: the difference pairs the {against.n} seeds that both arms have'
        )
    elif mean is not None and against is None and sweep.baseline not in (None, arm.label):
        remarks.append(f'{arm.label}: no difference, {sweep.baseline} has no value to pair')
    secondary = {}
    names = [name for name in arm.names(sweep.split) if '/' not in name]
    for name in names if final else []:
        values = arm.final(name, sweep.split).values()
        if name != sweep.metric and all(map(math.isfinite, values)):
            secondary[name] = math.fsum(values) / len(values)
    _, seconds = arm.seconds()
    return Row(
        arm=arm,
        final=final,
        metric=mean,
        difference=against,
        verdict=statistics.verdict(against, sweep.lower_is_better),
        tasks=_of_tasks(sweep, arm, reference),
        equal_time=_at(sweep, arm, seconds_of_quickest),
        secondary=secondary,
        seconds=float(seconds[-1]) if len(seconds) else None,
        rate=arm.rate(sweep.unit),
        remarks=remarks,
    )


def _at(sweep: Sweep, arm: Arm, seconds: float | None) -> Estimate | None:
    """The last point of the curve that the arm had reached after so many seconds."""
    steps, values = arm.curve(sweep.metric, sweep.curves)
    timed, passed = arm.seconds()
    if seconds is None or not len(steps) or not np.isfinite(values).all():
        return None
    reached = np.interp(steps, np.append(0, timed), np.append(0, passed)) <= seconds * 1.001
    if not reached.any():
        return None
    last = int(np.flatnonzero(reached)[-1])
    return statistics.estimate(dict(enumerate(values[:, last])), arm.label)


def _of_tasks(sweep: Sweep, arm: Arm, reference: Arm | None) -> OfTasks | None:
    tasks, scores = arm.scores(sweep.metric, sweep.split)
    if len(tasks) < 2:
        return None
    against = None
    if reference is not None and reference is not arm:
        theirs, baseline = reference.scores(sweep.metric, sweep.split)
        if theirs == tasks:
            against = statistics.probability_of_improvement(scores, baseline, sweep.lower_is_better)
    return OfTasks(
        tasks,
        scores,
        statistics.over_seeds(scores, statistics.iqm),
        against,
    )
