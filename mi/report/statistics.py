"""Means over seeds with bootstrap intervals, and tests of differences that are paired by seed.

The only randomness that is measured is the seed's. The percentile bootstrap draws n of the n seeds
with replacement, takes the statistic, many times, and reports the 2.5 % and 97.5 % quantiles. All
means lie between the smallest and the largest seed, so the interval is too short for few seeds: see
CAUTION.

Scores of many tasks, [seeds, tasks], are summed up as in Agarwal et al. (2021), "Deep Reinforcement
Learning at the Edge of the Statistical Precipice". What is drawn depends on who learnt them:

    over_seeds   one agent learns all tasks, so that its scores hang together: whole seeds, rows
    over_runs    each task has runs of its own: each column on its own, which is that paper's
                 stratified bootstrap and what its library, rliable, computes
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95
QUANTILES = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
RESAMPLES = 10_000
ALPHA = 0.05  # of the tests
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
    """statistic([..., seeds, tasks]) → [...] of the scores; whole seeds are drawn."""
    n = len(scores)
    return _bootstrap(scores, statistic, lambda rng, draws: scores[rng.integers(n, size=draws)])


def over_runs(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """As `over_seeds`, but the runs of each task are drawn on their own: stratified by task."""
    n, tasks = scores.shape

    def draw(rng: np.random.Generator, draws: tuple[int, int]) -> np.ndarray:
        return scores[rng.integers(n, size=(*draws, tasks)), np.arange(tasks)]

    return _bootstrap(scores, statistic, draw)


def _bootstrap(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
) -> Estimate:
    """draw(rng, (count, n)) → [count, n, tasks]."""
    n = len(scores)
    here = float(statistic(scores))
    if n == 1:
        return Estimate(here, None, None, n)
    rng = np.random.default_rng(0)
    pieces = [statistic(draw(rng, (RESAMPLES // 10, n))) for _ in range(10)]  # for the memory
    low, high = np.quantile(np.concatenate(pieces), QUANTILES)
    return Estimate(here, float(low), float(high), n)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean of [..., seeds, tasks]."""
    return scores.mean((-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Of [..., seeds, tasks] the median over tasks of their means over seeds.

    So in the paper and its library; of a single task it is the median over the seeds.
    """
    each = scores[..., 0] if scores.shape[-1] == 1 else scores.mean(-2)
    return np.median(each, axis=-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean of [..., seeds, tasks]: a quarter of all is cut off at each end."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def probability_of_improvement(
    scores: np.ndarray, baseline: np.ndarray, lower_is_better: bool, *, own_runs: bool = False
) -> Estimate:
    """P(a seed is better than one of the baseline), ties counted half; the mean over tasks.

    Args:
      scores: [seeds, tasks].
      baseline: [other seeds, tasks].
      lower_is_better: of the scores.
      own_runs: whether each task has runs of its own, which are then drawn on their own, as in
        `over_runs`.
    """
    sign = -1 if lower_is_better else 1
    gap = sign * (scores[:, None] - baseline[None])
    wins = np.where(gap == 0, 0.5, gap > 0)  # [seeds, other seeds, tasks]
    if not own_runs:
        wins = wins.mean(-1, keepdims=True)
    n, m, strata = wins.shape
    here = float(wins.mean())
    if min(n, m) == 1:
        return Estimate(here, None, None, min(n, m))
    rng = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for i in range(strata):
        own, others = (rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES) / k for k in (n, m))
        total += ((own @ wins[..., i]) * others).sum(-1)
    low, high = np.quantile(total / strata, QUANTILES)
    return Estimate(here, float(low), float(high), min(n, m))


@dataclasses.dataclass(frozen=True)
class Test:
    """A two-sided test of a mean difference of zero.

    Attributes:
      p: how probably chance alone gives a mean at least as far from zero.
      least: the smallest p that so many differences can give, however large they are.
      holm: p corrected for the number of arms that are tested, by `holm`; p itself before.
      least_holm: the smallest that the first arm of these can reach.
      pairs: the number of differences whose signs are flipped.
      per_seed: how many of them a seed gives: the tasks, where each has runs of its own.
    """

    p: float
    least: float
    holm: float
    least_holm: float
    pairs: int = 0
    per_seed: int = 1

    @property
    def can_tell(self) -> bool:
        """Whether there are differences enough that any could be significant at 5 %."""
        return self.least_holm <= ALPHA


def sign_flips(differences: np.ndarray) -> Test | None:
    """The exact permutation test of n paired differences; None for less than two.

    If arms do not differ, each difference is as probable with the other sign: all 2ⁿ choices of
    signs are equally likely, and p is the share of them whose mean is at least as far from zero.
    Nothing is assumed about the distribution of the seeds. More than 2¹⁶ choices are sampled.

    Args:
      differences: [seeds], or [seeds, tasks] where each task has runs of its own: then each task
        of each seed is a pair.
    """
    per_seed = differences.shape[1] if differences.ndim == 2 else 1
    differences = differences.ravel()
    n = len(differences)
    if n < 2:
        return None
    observed = abs(differences.sum())
    close = 1e-12 * np.abs(differences).sum()  # sums of the same numbers in another order
    if n <= 16:
        signs = 1 - 2 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)  # half: ± are alike
        p = float(np.mean(np.abs(signs @ differences) >= observed - close))
    else:
        rng = np.random.default_rng(0)
        signs = 1 - 2 * rng.integers(2, size=(RESAMPLES, n))
        p = float(np.sum(np.abs(signs @ differences) >= observed - close) + 1) / (RESAMPLES + 1)
    least = max(2.0 ** (1 - n), 1 / (RESAMPLES + 1) if n > 16 else 0.0)
    return Test(p, least, p, least, n, per_seed)


def holm(tests: Sequence[Test | None]) -> list[Test | None]:
    """The same tests with p corrected for their number, by Holm's (1979) method.

    The smallest p is multiplied by their number, the next one by one less, and so on, and none ends
    below one before it: the probability of any false claim among them stays below ALPHA.
    """
    order = sorted((t.p, i) for i, t in enumerate(tests) if t is not None)
    corrected: list[Test | None] = list(tests)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        test = tests[i]
        assert test is not None
        least = min(1.0, len(order) * test.least)
        corrected[i] = dataclasses.replace(test, holm=largest, least_holm=least)
    return corrected


def seeds_needed(arms: int, per_seed: int = 1) -> int:
    """Of how many seeds on one of so many arms could be significant at 5 % after Holm.

    Args:
      arms: how many are tested.
      per_seed: how many pairs each seed gives, as in `Test`.
    """
    pairs = next(n for n in range(2, 64) if arms * 2.0 ** (1 - n) <= ALPHA)
    return -(-pairs // per_seed)


def too_few(tests: Sequence[Test | None]) -> str | None:
    """A warning where no difference could be significant, however large; None where one could."""
    known = [test for test in tests if test is not None]
    if not known or any(test.can_tell for test in known):
        return None
    best = min(known, key=lambda test: test.least_holm)
    corrected = f', {words_of_p(best.least_holm)} after Holm for {len(known)} arms'
    tasks = f' of {best.per_seed} tasks each' if best.per_seed > 1 else ''
    return (
        f'Too few seeds to call any difference significant: with {best.pairs} pairs even '
        f'differences that all agree in sign have p = {words_of_p(best.least)}'
        f'{corrected if len(known) > 1 else ""}. {seeds_needed(len(known), best.per_seed)} seeds'
        f'{tasks} are the fewest that can reach {ALPHA}.'
    )


def words_of_p(value: float) -> str:
    """Two significant digits, as more are never meant."""
    return '<0.001' if value < 0.001 else f'{value:.{2 if value >= 0.0995 else 3}f}'
