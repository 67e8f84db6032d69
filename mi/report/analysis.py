"""What the report says of each arm of a sweep, in numbers."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mi.report import statistics
from mi.report.runs import Arm, Sweep
from mi.report.statistics import Estimate, Test


@dataclasses.dataclass(frozen=True)
class Summary:
    """Final scores of one arm, [seeds, tasks], by statistics that outliers move less than a mean.

    Attributes:
      tasks: their names; empty where there is one number per seed.
      scores: [seeds, tasks].
      own_runs: whether each task has runs of its own, which decides what the bootstrap draws.
      median, iqm: as in `statistics`, with their intervals.
      improvement: how probably a seed is better than one of the baseline's on a task.
    """

    tasks: tuple[str, ...]
    scores: np.ndarray
    own_runs: bool
    median: Estimate
    iqm: Estimate
    improvement: Estimate | None


@dataclasses.dataclass(frozen=True)
class Row:
    """What the table says of an arm; None where there is nothing to say.

    Attributes:
      final: the compared metric per seed, empty where the arm has no final record.
      metric: mean of these, difference: to the baseline, paired by seed.
      test: of that difference, corrected for the number of arms.
      summary: of the scores of each seed, and of each task where there are several.
      equal_time: mean of the curve when the quickest arm was done.
      secondary: means of the other numbers in the final records, but those of single tasks.
      rate: tokens, or steps of environments, per second of training.
      remarks: why something is missing here.
    """

    arm: Arm
    final: dict[int, float]
    metric: Estimate | None
    difference: Estimate | None
    test: Test | None
    verdict: str | None
    summary: Summary | None
    equal_time: Estimate | None
    secondary: dict[str, float]
    seconds: float | None
    rate: float | None
    remarks: list[str]

    @property
    def tasks(self) -> Summary | None:
        """The summary where it is of several tasks."""
        return self.summary if self.summary is not None and self.summary.tasks else None


def rows(sweep: Sweep) -> list[Row]:
    """A row per arm, in the order of the sweep; an arm without numbers has its row as well."""
    finals = [arm.final(sweep.metric, sweep.split) for arm in sweep.arms]
    reference = next((a for a in sweep.arms if a.label == sweep.baseline), None)
    baseline = reference.finite(sweep.metric, sweep.split) if reference else {}
    seconds = quickest(sweep)
    found = [
        _row(sweep, a, f, baseline, reference, seconds)
        for a, f in zip(sweep.arms, finals, strict=True)
    ]
    corrected = statistics.holm([row.test for row in found])
    return [dataclasses.replace(r, test=t) for r, t in zip(found, corrected, strict=True)]


def quickest(sweep: Sweep) -> float | None:
    """Seconds of training of the quickest arm; None unless all of several are done and timed."""
    compared = [arm for arm in sweep.arms if sweep.compares(arm)]
    seconds = [arm.seconds()[1] for arm in compared]
    if len(compared) < 2 or any(arm.state != 'done' for arm in compared):
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
    mean = difference = test = None
    remarks = []
    try:
        mean = _mean(sweep, arm, final)
        if arm.label != sweep.baseline:
            difference, test = against(sweep, arm, final, baseline, reference)
    except ValueError as error:
        remarks.append(f'{error}; no mean')
    if not final and arm.state == 'done':
        remarks.append(f'{arm.label}: no {sweep.metric} in the {sweep.split} records')
    if 0 < len(final) < len(arm.seeds):
        remarks.append(f'{arm.label}: {len(final)} of {len(arm.seeds)} seeds have a final record')
    if difference is not None and difference.n < max(len(final), len(baseline)):
        remarks.append(
            f'{arm.label}: the difference pairs the {difference.n} seeds that both arms have'
        )
    elif mean is not None and not sweep.compares(arm):
        remarks.append(f'{arm.label} learnt {others(arm.tasks, sweep.tasks)}: not compared')
    elif mean is not None and difference is None and sweep.baseline not in (None, arm.label):
        remarks.append(f'{arm.label}: no difference, {sweep.baseline} has no value to pair')
    secondary = {}
    names = [name for name in arm.names(sweep.split) if '/' not in name]
    for name in names if final else []:
        values = arm.finite(name, sweep.split).values()
        if name != sweep.metric and values:
            secondary[name] = math.fsum(values) / len(values)
    _, seconds = arm.seconds()
    return Row(
        arm=arm,
        final=final,
        metric=mean,
        difference=difference,
        test=test,
        verdict=statistics.verdict(difference, sweep.lower_is_better),
        summary=_summary(sweep, arm, reference),
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
    if seconds is None or not len(steps) or not sweep.compares(arm):
        return None
    reached = np.interp(steps, np.append(0, timed), np.append(0, passed)) <= seconds * 1.001
    if not reached.any():
        return None
    last = int(np.flatnonzero(reached)[-1])
    if not np.isfinite(values[:, last]).all():
        return None
    tasks, scores = arm.scores(sweep.metric, sweep.curves, int(steps[last]))
    if arm.own_runs and tasks:
        return statistics.over_runs(scores, statistics.mean)
    return statistics.estimate(dict(enumerate(values[:, last])), arm.label)


def _mean(sweep: Sweep, arm: Arm, final: dict[int, float]) -> Estimate | None:
    if not final:
        return None
    over_seeds = statistics.estimate(final, arm.label)
    tasks, scores = arm.scores(sweep.metric, sweep.split)
    if not (arm.own_runs and tasks and len(scores) == len(final)):
        return over_seeds
    return statistics.over_runs(scores, statistics.mean)


def against(
    sweep: Sweep,
    arm: Arm,
    final: dict[int, float],
    baseline: dict[int, float],
    reference: Arm | None,
) -> tuple[Estimate | None, Test | None]:
    """The difference to the baseline and its test, both paired by seed, or by task and seed.

    None where they have learnt other tasks, each by runs of its own.
    """
    if reference is not None and set(arm.tasks) != set(reference.tasks):
        return None, None
    seeds = sorted(final.keys() & baseline.keys())
    if reference is not None and arm.own_runs and seeds:
        names = [f'{sweep.metric}/{task}' for task in arm.tasks]
        pairs = [[a.final(name, sweep.split) for a in (arm, reference)] for name in names]
        gaps = np.array([[ours[s] - theirs[s] for ours, theirs in pairs] for s in seeds])
        over_runs = statistics.over_runs(gaps, statistics.mean)
        return over_runs, statistics.sign_flips(gaps)
    gaps = np.array([final[seed] - baseline[seed] for seed in seeds])
    return statistics.difference(final, baseline, arm.label), statistics.sign_flips(gaps)


def others(tasks: Sequence[str], wanted: Sequence[str]) -> str:
    """How the tasks of an arm differ from those that it would have to have learnt."""
    if set(tasks) < set(wanted):
        return f'{len(tasks)} of {len(wanted)} tasks'
    return 'other tasks'


def _summary(sweep: Sweep, arm: Arm, reference: Arm | None) -> Summary | None:
    tasks, scores = _scores(sweep, arm)
    if not len(scores):
        return None
    against = None
    own_runs = arm.own_runs and bool(tasks)
    if reference is not None and reference is not arm and sweep.compares(arm):
        theirs, baseline = _scores(sweep, reference)
        if theirs == tasks and len(baseline):
            against = statistics.probability_of_improvement(
                scores, baseline, sweep.lower_is_better, own_runs=own_runs
            )
    interval = statistics.over_runs if own_runs else statistics.over_seeds
    median, iqm = (interval(scores, f) for f in (statistics.median, statistics.iqm))
    return Summary(tasks, scores, own_runs, median, iqm, against)


def _scores(sweep: Sweep, arm: Arm) -> tuple[tuple[str, ...], np.ndarray]:
    """Of each seed and task; of each seed, [seeds, 1], where there is one task or none."""
    tasks, scores = arm.scores(sweep.metric, sweep.split)
    final = arm.finite(sweep.metric, sweep.split)
    if final and len(tasks) > 1:
        return tasks, scores
    return (), np.array([final[seed] for seed in sorted(final)], float).reshape(-1, 1)
