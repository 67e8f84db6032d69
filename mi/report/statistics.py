"""Means over seeds with bootstrap intervals: the only randomness that is measured is the seed's.

The percentile bootstrap draws n of the n seeds with replacement, takes the mean, many times, and
reports the 2.5 % and 97.5 % quantiles of these means. All of them lie between the smallest and the
largest seed, so the interval is too short for few seeds: see CAUTION. `rows` applies this to the
arms of a sweep.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import scipy.stats

from mi.report.runs import Arm, Sweep

LEVEL = 0.95
RESAMPLES = 10_000
CAUTION = (
    'Intervals are 95 % percentile bootstrap intervals over the seeds. Such an interval cannot be '
    'wider than the range of the n seeds, and covers less than its nominal 95 % for small n '
    '(under 10): treat as descriptive.'
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its interval [low, high], None where n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def width(self) -> float:
        """Of the interval; 0 where there is none."""
        return 0.0 if self.low is None or self.high is None else self.high - self.low


def estimate(values: Mapping[int, float], arm: str) -> Estimate:
    """The mean of {seed: value} with its interval.

    Raises:
      ValueError: if there is no value, or one is NaN or infinite; names the arm and the seed.
    """
    if not values:
        raise ValueError(f'{arm}: no values')
    for seed, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f'{arm}: the value of seed {seed} is {value}')
    sample = np.array([values[seed] for seed in sorted(values)], float)
    n = len(sample)
    if n == 1:
        return Estimate(float(sample[0]), None, None, n)
    if np.all(sample == sample[0]):  # the mean of equal numbers may differ from them by rounding
        return Estimate(float(sample[0]), float(sample[0]), float(sample[0]), n)
    interval = scipy.stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method='percentile',
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(sample.mean()), float(interval.low), float(interval.high), n)


def difference(
    values: Mapping[int, float], baseline: Mapping[int, float], arm: str
) -> Estimate | None:
    """The mean of value − baseline, paired by seed, over the seeds that both have; None if none.

    Equal seeds share the order of the data, and the initialisation where shapes are the same, so
    what they have in common cancels; the interval of two independent means would keep it.
    """
    paired = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return estimate(paired, arm) if paired else None


def verdict(gap: Estimate | None, lower_is_better: bool) -> str | None:
    """Whether the interval of a difference excludes zero, and on which side; None without one."""
    if gap is None or gap.low is None or gap.high is None:
        return None
    if gap.low <= 0.0 <= gap.high:
        return 'no difference seen'
    return 'better' if (gap.mean < 0.0) == lower_is_better else 'worse'


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Mean, low and high [N] of curves [seeds, N]; no low and high for one seed.

    Whole curves are drawn: a resample takes the same seeds at every step. The interval holds for
    each step on its own, not for all of them at once.

    Raises:
      ValueError: if a value is NaN or infinite, or there is no seed.
    """
    n, steps = values.shape
    if n == 0 or not np.all(np.isfinite(values)):
        raise ValueError('a curve needs one seed at least and finite values')
    mean = values.mean(axis=0)
    if n == 1:
        return mean, None, None
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n  # [RESAMPLES, seeds]
    quantiles = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
    # In pieces of 256 steps, for [RESAMPLES, N] of a long run would fill the memory.
    pieces = [
        np.quantile(weights @ values[:, i : i + 256], quantiles, axis=0)
        for i in range(0, steps, 256)
    ]
    low, high = np.concatenate(pieces, axis=1) if pieces else np.empty((2, 0))
    return mean, low, high


@dataclasses.dataclass(frozen=True)
class Row:
    """What the table says of an arm; None where there is nothing to say yet.

    Attributes:
      final: the compared metric per seed, empty where the arm has no final record.
      metric: mean of these, difference: to the baseline, paired by seed.
      secondary: means of the other numbers in the final records, but those of single tasks.
      rate: tokens, or steps of environments, per second of training.
      remarks: why something is missing here.
    """

    arm: Arm
    final: dict[int, float]
    metric: Estimate | None
    difference: Estimate | None
    verdict: str | None
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
    return [_row(sweep, a, f, baseline) for a, f in zip(sweep.arms, finals, strict=True)]


def _row(sweep: Sweep, arm: Arm, final: dict[int, float], baseline: dict[int, float]) -> Row:
    mean = against = None
    remarks = []
    try:
        mean = estimate(final, arm.label) if final else None
        if arm.label != sweep.baseline:
            against = difference(final, baseline, arm.label)
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
        verdict=verdict(against, sweep.lower_is_better),
        secondary=secondary,
        seconds=float(seconds[-1]) if len(seconds) else None,
        rate=arm.rate(sweep.unit),
        remarks=remarks,
    )
