"""Means over seeds with bootstrap intervals: the only randomness that is measured is the seed's.

The percentile bootstrap draws n of the n seeds with replacement, takes the mean, many times, and
reports the 2.5 % and 97.5 % quantiles of these means. All of them lie between the smallest and the
largest seed, so the interval is too short for few seeds: see CAUTION.

Scores of many tasks, [seeds, tasks], are summed up as in Agarwal et al. (2021), "Deep Reinforcement
Learning at the Edge of the Statistical Precipice", with another bootstrap. There each task has runs
of its own, which are drawn on their own. Here one agent learns all tasks, so that its scores hang
together, and whole seeds are drawn.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import scipy.stats

LEVEL = 0.95
QUANTILES = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
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
    # In pieces of 256 steps, for [RESAMPLES, N] of a long run would fill the memory.
    pieces = [
        np.quantile(weights @ values[:, i : i + 256], QUANTILES, axis=0)
        for i in range(0, steps, 256)
    ]
    low, high = np.concatenate(pieces, axis=1) if pieces else np.empty((2, 0))
    return mean, low, high


def over_seeds(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """statistic([..., seeds, tasks]) → [...] of the scores, with its interval."""
    n = len(scores)
    here = float(statistic(scores))
    if n == 1:
        return Estimate(here, None, None, n)
    rng = np.random.default_rng(0)
    draws = (rng.integers(n, size=(RESAMPLES // 10, n)) for _ in range(10))  # for the memory
    low, high = np.quantile(np.concatenate([statistic(scores[d]) for d in draws]), QUANTILES)
    return Estimate(here, float(low), float(high), n)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean of [..., seeds, tasks]: a quarter of all is cut off at each end."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def probability_of_improvement(
    scores: np.ndarray, baseline: np.ndarray, lower_is_better: bool
) -> Estimate:
    """P(a seed is better than one of the baseline), ties counted half; the mean over tasks.

    Args:
      scores: [seeds, tasks].
      baseline: [other seeds, tasks].
      lower_is_better: of the scores.
    """
    sign = -1 if lower_is_better else 1
    gap = sign * (scores[:, None] - baseline[None])
    wins = np.where(gap == 0, 0.5, gap > 0).mean(-1)  # [seeds, other seeds]
    n, m = wins.shape
    if min(n, m) == 1:
        return Estimate(float(wins.mean()), None, None, min(n, m))
    rng = np.random.default_rng(0)
    own, others = (rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES) / k for k in (n, m))
    low, high = np.quantile(np.einsum('ri,ij,rj->r', own, wins, others), QUANTILES)
    return Estimate(float(wins.mean()), float(low), float(high), min(n, m))
