"""Means over seeds with bootstrap intervals, and tests of differences paired by seed.

The seed is the only source of randomness measured here. The percentile bootstrap resamples the n
seeds with replacement, computes the statistic, and reports its 2.5 % and 97.5 % quantiles. Every
resampled mean lies between the smallest and the largest seed, so intervals over few seeds are too
short: see CAUTION.

Scores of many tasks, [seeds, tasks], are summarized as in Agarwal et al. (2021), "Deep
Reinforcement Learning at the Edge of the Statistical Precipice". Who learned the tasks decides
what is resampled:

    bootstrap_seeds   one agent learns all tasks, so its scores are correlated: whole rows
    bootstrap_runs    each task has separate runs: each column independently, the stratified
                      bootstrap of that paper and of its library, rliable
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95
QUANTILES = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
RESAMPLES = 10_000
ALPHA = 0.05  # significance level of the tests
CAUTION = (
    'Intervals are 95 % percentile bootstrap intervals over the seeds. Such an interval cannot be '
    'wider than the range of the n seeds, and covers less than its nominal 95 % for small n '
    '(under 10): treat as descriptive.'
)


Statistic = Callable[[np.ndarray], np.ndarray]  # [..., seeds, tasks] → [...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its interval [low, high], None where n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def width(self) -> float:
        """Width of the interval; 0 without one."""
        return 0.0 if self.low is None or self.high is None else self.high - self.low


def estimate(values: Mapping[int, float], arm: str) -> Estimate:
    """Compute the mean of {seed: value} with its bootstrap interval.

    Args:
      values: {seed: value}.
      arm: label named in errors.

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
    # The mean of equal numbers may differ from them by rounding.
    if np.all(sample == sample[0]):
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


def estimate_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], arm: str
) -> Estimate | None:
    """Compute the mean of value − baseline over the seeds that both have; None if there are none.

    Equal seeds share the data order, and the initialization where shapes agree. Pairing cancels
    what they share; an interval of two independent means would keep it.
    """
    paired = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return estimate(paired, arm) if paired else None


def judge(gap: Estimate | None, lower_is_better: bool) -> str | None:
    """Return on which side of zero the interval of a difference lies; None without an interval."""
    if gap is None or gap.low is None or gap.high is None:
        return None
    if gap.low <= 0.0 <= gap.high:
        return 'no difference seen'
    return 'better' if (gap.mean < 0.0) == lower_is_better else 'worse'


def estimate_band(
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Compute mean, low and high [N] of curves [seeds, N]; low and high are None for one seed.

    Whole curves are resampled: a resample takes the same seeds at every step. The interval is
    pointwise; it does not cover all steps simultaneously.

    Raises:
      ValueError: if a value is NaN or infinite, or there is no seed.
    """
    n, num_steps = values.shape
    if n == 0 or not np.all(np.isfinite(values)):
        raise ValueError('values: expected at least one seed and finite values')
    mean = values.mean(axis=0)
    if n == 1:
        return mean, None, None
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n  # [RESAMPLES, seeds]
    # Chunks of 256 steps bound the memory of [RESAMPLES, N].
    chunks = [
        np.quantile(weights @ values[:, i : i + 256], QUANTILES, axis=0)
        for i in range(0, num_steps, 256)
    ]
    low, high = np.concatenate(chunks, axis=1) if chunks else np.empty((2, 0))
    return mean, low, high


def bootstrap_seeds(scores: np.ndarray, statistic: Statistic) -> Estimate:
    """Estimate a statistic of scores [seeds, tasks]; resamples take whole seeds."""
    n = len(scores)
    return _bootstrap(scores, statistic, lambda rng, shape: scores[rng.integers(n, size=shape)])


def bootstrap_runs(scores: np.ndarray, statistic: Statistic) -> Estimate:
    """Estimate a statistic of scores [seeds, tasks]; resamples are stratified by task."""
    n, num_tasks = scores.shape

    def resample(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return scores[rng.integers(n, size=(*shape, num_tasks)), np.arange(num_tasks)]

    return _bootstrap(scores, statistic, resample)


def _bootstrap(
    scores: np.ndarray,
    statistic: Statistic,
    resample: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
) -> Estimate:
    """Bootstrap a statistic; resample(rng, (count, n)) returns [count, n, tasks]."""
    n = len(scores)
    point = float(statistic(scores))
    if n == 1:
        return Estimate(point, None, None, n)
    rng = np.random.default_rng(0)
    # Ten chunks bound the memory.
    chunks = [statistic(resample(rng, (RESAMPLES // 10, n))) for _ in range(10)]
    low, high = np.quantile(np.concatenate(chunks), QUANTILES)
    return Estimate(point, float(low), float(high), n)


def mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of [..., seeds, tasks]."""
    return scores.mean((-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Return the median over tasks of the means over seeds, for [..., seeds, tasks].

    The definition of Agarwal et al. (2021) and rliable. With a single task, the median over seeds
    is returned.
    """
    task_scores = scores[..., 0] if scores.shape[-1] == 1 else scores.mean(-2)
    return np.median(task_scores, axis=-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean of [..., seeds, tasks]: a quarter is cut off at each end."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def probability_of_improvement(
    scores: np.ndarray, baseline: np.ndarray, lower_is_better: bool, *, separate_runs: bool = False
) -> Estimate:
    """Estimate P(a seed beats a baseline seed), averaged over tasks; ties count half.

    Args:
      scores: [seeds, tasks].
      baseline: [baseline seeds, tasks].
      lower_is_better: whether a lower score wins.
      separate_runs: whether each task has separate runs, which are then resampled independently,
        as in `bootstrap_runs`.
    """
    # Compare every seed with every baseline seed, task by task.
    sign = -1 if lower_is_better else 1
    gap = sign * (scores[:, None] - baseline[None])
    wins = np.where(gap == 0, 0.5, gap > 0)  # [seeds, baseline seeds, tasks]
    if not separate_runs:
        wins = wins.mean(-1, keepdims=True)
    n, m, num_strata = wins.shape
    point = float(wins.mean())
    if min(n, m) == 1:
        return Estimate(point, None, None, min(n, m))

    # Resample both sides, each stratum independently.
    rng = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for i in range(num_strata):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
        baseline_weights = rng.multinomial(m, np.full(m, 1 / m), size=RESAMPLES) / m
        total += ((weights @ wins[..., i]) * baseline_weights).sum(-1)
    low, high = np.quantile(total / num_strata, QUANTILES)
    return Estimate(point, float(low), float(high), min(n, m))


@dataclasses.dataclass(frozen=True)
class SignFlipTest:
    """A two-sided test that a mean difference is zero.

    Attributes:
      p: the probability that chance alone gives a mean at least as far from zero.
      min_p: the smallest p that this number of differences can give, however large they are.
      p_holm: p corrected for the number of tested arms, by `correct_holm`; p itself until then.
      min_p_holm: the smallest p_holm that the arm with the smallest p can reach.
      num_pairs: the number of differences whose signs are flipped.
      pairs_per_seed: the differences per seed: the number of tasks where each has separate runs.
    """

    p: float
    min_p: float
    p_holm: float
    min_p_holm: float
    num_pairs: int = 0
    pairs_per_seed: int = 1

    @property
    def can_be_significant(self) -> bool:
        """Whether there are enough differences for significance at 5 %."""
        return self.min_p_holm <= ALPHA


def sign_flip_test(differences: np.ndarray) -> SignFlipTest | None:
    """Run the permutation test of n paired differences; None for fewer than two.

    If two arms do not differ, each difference is as probable with the opposite sign. All 2ⁿ choices
    of signs are then equally likely, and p is the share whose mean is at least as far from zero.
    Nothing is assumed about the distribution over seeds. The test is exact up to 16 pairs; for more
    pairs, signs are sampled.

    Args:
      differences: [seeds], or [seeds, tasks] where each task has separate runs: each task of each
        seed is then a pair.
    """
    pairs_per_seed = differences.shape[1] if differences.ndim == 2 else 1
    differences = differences.ravel()
    n = len(differences)
    if n < 2:
        return None
    observed = abs(differences.sum())
    # Sums of the same numbers in another order differ by rounding.
    tolerance = 1e-12 * np.abs(differences).sum()
    if n <= 16:
        # Half of the choices suffice: flipping all signs keeps the absolute sum.
        signs = 1 - 2 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)
        p = float(np.mean(np.abs(signs @ differences) >= observed - tolerance))
    else:
        rng = np.random.default_rng(0)
        signs = 1 - 2 * rng.integers(2, size=(RESAMPLES, n))
        extreme = np.sum(np.abs(signs @ differences) >= observed - tolerance)
        p = float(extreme + 1) / (RESAMPLES + 1)
    min_p = max(2.0 ** (1 - n), 1 / (RESAMPLES + 1) if n > 16 else 0.0)
    return SignFlipTest(p, min_p, p, min_p, n, pairs_per_seed)


def correct_holm(tests: Sequence[SignFlipTest | None]) -> list[SignFlipTest | None]:
    """Return the tests with p corrected for their number, by Holm's (1979) method.

    The smallest p is multiplied by the number of tests, the next by one less, and so on; no
    corrected p falls below its predecessor. The probability of any false positive among the tests
    stays below ALPHA.
    """
    order = sorted((test.p, i) for i, test in enumerate(tests) if test is not None)
    corrected: list[SignFlipTest | None] = list(tests)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        test = tests[i]
        assert test is not None
        min_p_holm = min(1.0, len(order) * test.min_p)
        corrected[i] = dataclasses.replace(test, p_holm=largest, min_p_holm=min_p_holm)
    return corrected


def count_seeds_needed(num_arms: int, pairs_per_seed: int = 1) -> int:
    """Return the fewest seeds with which one arm could be significant at 5 % after Holm.

    Args:
      num_arms: the number of tested arms.
      pairs_per_seed: as in `SignFlipTest`.
    """
    num_pairs = next(n for n in range(2, 64) if num_arms * 2.0 ** (1 - n) <= ALPHA)
    return -(-num_pairs // pairs_per_seed)


def warn_too_few_seeds(tests: Sequence[SignFlipTest | None]) -> str | None:
    """Return a warning if no difference could be significant, however large; otherwise None."""
    known = [test for test in tests if test is not None]
    if not known or any(test.can_be_significant for test in known):
        return None
    best = min(known, key=lambda test: test.min_p_holm)
    num_seeds = count_seeds_needed(len(known), best.pairs_per_seed)
    corrected = tasks = ''
    if len(known) > 1:
        corrected = f', {format_p(best.min_p_holm)} after Holm for {len(known)} arms'
    if best.pairs_per_seed > 1:
        tasks = f' of {best.pairs_per_seed} tasks each'
    return (
        f'Too few seeds to call any difference significant: with {best.num_pairs} pairs even '
        f'differences that all agree in sign have p = {format_p(best.min_p)}{corrected}. '
        f'{num_seeds} seeds{tasks} are the fewest that can reach {ALPHA}.'
    )


def format_p(value: float) -> str:
    """Format a p-value with two significant digits; more are never meaningful."""
    return '<0.001' if value < 0.001 else f'{value:.{2 if value >= 0.0995 else 3}f}'
