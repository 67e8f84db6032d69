"""The numbers that the report shows for each arm of a sweep."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mi.report import statistics
from mi.report.arms import Arm, Sweep
from mi.report.statistics import Estimate, SignFlipTest


@dataclasses.dataclass(frozen=True)
class Summary:
    """Robust statistics of one arm's final scores.

    Attributes:
      tasks: names of the tasks, empty if there is only one score per seed.
      scores: final scores [seeds, tasks].
      has_separate_runs: whether each task has separate runs, which determines how to resample.
      median, iqm: estimates of `statistics.median` and `statistics.iqm`.
      improvement: probability that a seed beats a baseline seed on a task.
    """

    tasks: tuple[str, ...]
    scores: np.ndarray
    has_separate_runs: bool
    median: Estimate
    iqm: Estimate
    improvement: Estimate | None


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """Results of one arm, which form a row of the table. Missing results are None.

    Attributes:
      arm: the arm.
      final: final value of the compared metric for each seed, empty without final records.
      metric: mean of the metric over seeds.
      difference: difference from the baseline, paired by seed.
      test: test of the difference, corrected for the number of arms.
      verdict: verdict of `statistics.judge` on the difference.
      summary: statistics of the final scores.
      equal_time: mean of the learning curve at the time when the fastest arm finished.
      secondary: means of the other metrics in the final records, except those of single tasks.
      seconds: training time in seconds.
      rate: tokens or environment steps per second of training.
      remarks: reasons for missing results.
    """

    arm: Arm
    final: dict[int, float]
    metric: Estimate | None
    difference: Estimate | None
    test: SignFlipTest | None
    verdict: str | None
    summary: Summary | None
    equal_time: Estimate | None
    secondary: dict[str, float]
    seconds: float | None
    rate: float | None
    remarks: list[str]

    @property
    def task_summary(self) -> Summary | None:
        """The summary if it covers several tasks, or None otherwise."""
        return self.summary if self.summary is not None and self.summary.tasks else None


class Finals(NamedTuple):
    """Final values of an arm, {seed: value}."""

    arm: Arm
    values: dict[int, float]


def compute_results(sweep: Sweep) -> list[ArmResult]:
    """Compute the results of every arm, including arms without values, in the sweep's order."""
    # Every arm is compared with the finite values of the baseline.
    baseline_arm = next((arm for arm in sweep.arms if arm.label == sweep.baseline), None)
    baseline = None
    if baseline_arm is not None:
        baseline = Finals(baseline_arm, baseline_arm.finite_values(sweep.metric, sweep.split))
    # A test is corrected for the number of arms, so all arms come first.
    equal_time = find_equal_time(sweep)
    results = [
        _compute_result(
            sweep, Finals(arm, arm.final_values(sweep.metric, sweep.split)), baseline, equal_time
        )
        for arm in sweep.arms
    ]
    tests = statistics.correct_holm([result.test for result in results])
    return [
        dataclasses.replace(result, test=test) for result, test in zip(results, tests, strict=True)
    ]


def find_equal_time(sweep: Sweep) -> float | None:
    """Return the training seconds of the fastest arm, at which all arms are compared.

    The result is None unless there are several comparable arms and all are done and timed.
    """
    arms = [arm for arm in sweep.arms if sweep.is_comparable(arm)]
    arm_seconds = [arm.training_seconds()[1] for arm in arms]
    if len(arms) < 2 or any(arm.state != 'done' for arm in arms) or not all(map(len, arm_seconds)):
        return None
    return min(float(elapsed[-1]) for elapsed in arm_seconds)


def _compute_result(
    sweep: Sweep, finals: Finals, baseline: Finals | None, equal_time: float | None
) -> ArmResult:
    arm, values = finals
    mean = difference = test = None
    remarks = []
    # A seed that is not finite leaves its arm in the table, without a mean.
    try:
        mean = _estimate_mean(sweep, finals)
        if arm.label != sweep.baseline:
            difference, test = compare_finals(sweep, finals, baseline)
    except ValueError as error:
        remarks.append(f'{error}; no mean')
    remarks += _explain_missing(sweep, finals, baseline, mean, difference)
    _, seconds = arm.training_seconds()
    return ArmResult(
        arm=arm,
        final=values,
        metric=mean,
        difference=difference,
        test=test,
        verdict=statistics.judge(difference, sweep.lower_is_better),
        summary=_summarize_scores(sweep, arm, None if baseline is None else baseline.arm),
        equal_time=_estimate_at(sweep, arm, equal_time),
        secondary=_average_secondary(sweep, arm) if values else {},
        seconds=float(seconds[-1]) if len(seconds) else None,
        rate=arm.throughput(sweep.unit),
        remarks=remarks,
    )


def _explain_missing(
    sweep: Sweep,
    finals: Finals,
    baseline: Finals | None,
    mean: Estimate | None,
    difference: Estimate | None,
) -> list[str]:
    """Return a remark for each result that is missing or covers fewer seeds."""
    arm, values = finals
    num_baseline_seeds = 0 if baseline is None else len(baseline.values)
    remarks = []
    if not values and arm.state == 'done':
        remarks.append(f'{arm.label}: no {sweep.metric} in the {sweep.split} records')
    if 0 < len(values) < len(arm.seeds):
        remarks.append(f'{arm.label}: {len(values)} of {len(arm.seeds)} seeds have a final record')
    if difference is not None and difference.num_seeds < max(len(values), num_baseline_seeds):
        remarks.append(
            f'{arm.label}: the difference pairs the {difference.num_seeds} seeds '
            'that both arms have'
        )
    elif mean is not None and not sweep.is_comparable(arm):
        mismatch = describe_task_mismatch(arm.tasks, sweep.tasks)
        remarks.append(f'{arm.label} learned {mismatch}: not compared')
    elif mean is not None and difference is None and sweep.baseline not in (None, arm.label):
        remarks.append(f'{arm.label}: no difference, {sweep.baseline} has no value to pair')
    return remarks


def _average_secondary(sweep: Sweep, arm: Arm) -> dict[str, float]:
    """Average the other metrics over seeds, except those of single tasks."""
    averages = {}
    for metric_name in arm.metric_names(sweep.split):
        # Metrics of single tasks are called METRIC/TASK.
        if '/' in metric_name or metric_name == sweep.metric:
            continue
        if values := arm.finite_values(metric_name, sweep.split).values():
            averages[metric_name] = math.fsum(values) / len(values)
    return averages


def _estimate_at(sweep: Sweep, arm: Arm, seconds: float | None) -> Estimate | None:
    """Estimate the last point of the learning curve that an arm reached within `seconds`."""
    steps, values = arm.curve(sweep.metric, sweep.curves)
    timed_steps, elapsed = arm.training_seconds()
    if seconds is None or not len(steps) or not sweep.is_comparable(arm):
        return None

    # Find the last step reached; 0.1 % is allowed for rounding.
    step_seconds = np.interp(steps, np.append(0, timed_steps), np.append(0, elapsed))
    is_reached = step_seconds <= seconds * 1.001
    if not is_reached.any():
        return None
    last_index = int(np.flatnonzero(is_reached)[-1])
    if not np.isfinite(values[:, last_index]).all():
        return None

    # Tasks with separate runs are resampled independently.
    tasks, scores = arm.scores(sweep.metric, sweep.curves, int(steps[last_index]))
    if arm.has_separate_runs and tasks:
        return statistics.bootstrap_runs(scores, statistics.mean)
    return statistics.estimate(dict(enumerate(values[:, last_index])), arm.label)


def _estimate_mean(sweep: Sweep, finals: Finals) -> Estimate | None:
    arm, values = finals
    if not values:
        return None
    # Runs of single tasks are resampled task by task, unless a seed was left out.
    seed_mean = statistics.estimate(values, arm.label)
    tasks, scores = arm.scores(sweep.metric, sweep.split)
    if not (arm.has_separate_runs and tasks and len(scores) == len(values)):
        return seed_mean
    return statistics.bootstrap_runs(scores, statistics.mean)


def compare_finals(
    sweep: Sweep, finals: Finals, baseline: Finals | None
) -> tuple[Estimate | None, SignFlipTest | None]:
    """Estimate and test the difference from the baseline, paired by seed, or by task and seed.

    Both results are None without a baseline, or if the arms learned different tasks in separate
    runs.
    """
    if baseline is None or set(finals.arm.tasks) != set(baseline.arm.tasks):
        return None, None
    seeds = sorted(finals.values.keys() & baseline.values.keys())
    # Separate runs of a task share nothing but its seed, so each task and seed is a pair.
    if finals.arm.has_separate_runs and seeds:
        task_values = [
            [
                arm.final_values(f'{sweep.metric}/{task}', sweep.split)
                for arm in (finals.arm, baseline.arm)
            ]
            for task in finals.arm.tasks
        ]
        gaps = np.array(
            [
                [
                    arm_values[seed] - baseline_values[seed]
                    for arm_values, baseline_values in task_values
                ]
                for seed in seeds
            ]
        )
        difference = statistics.bootstrap_runs(gaps, statistics.mean)
        return difference, statistics.sign_flip_test(gaps)

    # One agent learned all tasks, or there is only one, so each seed is a pair.
    gaps = np.array([finals.values[seed] - baseline.values[seed] for seed in seeds])
    return (
        statistics.estimate_difference(finals.values, baseline.values, finals.arm.label),
        statistics.sign_flip_test(gaps),
    )


def describe_task_mismatch(tasks: Sequence[str], expected: Sequence[str]) -> str:
    """Describe how the tasks of an arm differ from the expected tasks."""
    if set(tasks) < set(expected):
        return f'{len(tasks)} of {len(expected)} tasks'
    return 'other tasks'


def _summarize_scores(sweep: Sweep, arm: Arm, baseline: Arm | None) -> Summary | None:
    tasks, scores = _final_scores(sweep, arm)
    if not len(scores):
        return None
    # An arm beats another one only on the same tasks.
    improvement = None
    has_separate_runs = arm.has_separate_runs and bool(tasks)
    if baseline is not None and baseline is not arm and sweep.is_comparable(arm):
        baseline_tasks, baseline_scores = _final_scores(sweep, baseline)
        if baseline_tasks == tasks and len(baseline_scores):
            improvement = statistics.probability_of_improvement(
                scores, baseline_scores, sweep.lower_is_better, has_separate_runs=has_separate_runs
            )
    bootstrap = statistics.bootstrap_runs if has_separate_runs else statistics.bootstrap_seeds
    return Summary(
        tasks=tasks,
        scores=scores,
        has_separate_runs=has_separate_runs,
        median=bootstrap(scores, statistics.median),
        iqm=bootstrap(scores, statistics.iqm),
        improvement=improvement,
    )


def _final_scores(sweep: Sweep, arm: Arm) -> tuple[tuple[str, ...], np.ndarray]:
    """Return tasks and scores [seeds, tasks], or () and [seeds, 1] for fewer than two tasks."""
    tasks, scores = arm.scores(sweep.metric, sweep.split)
    final = arm.finite_values(sweep.metric, sweep.split)
    if final and len(tasks) > 1:
        return tasks, scores
    return (), np.array([final[seed] for seed in sorted(final)], float).reshape(-1, 1)
