"""Means over seeds with bootstrap intervals, and tests of differences paired by seed.

The seed is the only source of randomness measured here. The percentile bootstrap resamples the n
seeds with replacement, computes the statistic, and reports its 2.5 % and 97.5 % quantiles. Every
resampled mean is between the smallest and the largest seed, so that intervals over few seeds are
too short, see CAUTION.

Scores of many tasks, [seeds, tasks], are summarized as in Agarwal et al. (2021), "Deep
Reinforcement Learning at the Edge of the Statistical Precipice". There are two ways to resample:

    bootstrap_seeds   resamples whole rows, for agents that learn all tasks, because their scores
                      are correlated
    bootstrap_runs    resamples each column independently, for separate runs of each task; this is
                      the stratified bootstrap of the paper and of its library, rliable
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
    """A mean over seeds with its interval [low, high], which is None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def width(self) -> float:
        """The width of the interval, or 0 without an interval."""
        return 0.0 if self.low is None or self.high is None else self.high - self.low


def estimate(values: Mapping[int, float], arm: str) -> Estimate:
    """Compute the mean of {seed: value} with its bootstrap interval.

    Args:
      values: value of each seed.
      arm: label of the arm, for error messages.

    Raises:
      ValueError: if there are no values, or if a value is not finite.
    """
    # A seed that diverged must not be left out in silence.
    if not values:
        raise ValueError(f'{arm}: expected at least one value')
    for seed, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f'{arm}: the value of seed {seed} is {value}')

    # Without spread there is nothing to resample.
    sample = np.array([values[seed] for seed in sorted(values)], float)
    num_seeds = len(sample)
    if num_seeds == 1:
        return Estimate(float(sample[0]), None, None, num_seeds)
    # The mean of equal numbers may differ from them by rounding.
    if np.all(sample == sample[0]):
        return Estimate(float(sample[0]), float(sample[0]), float(sample[0]), num_seeds)

    # The generator is seeded, so that equal values have equal intervals.
    interval = scipy.stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method='percentile',
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(sample.mean()), float(interval.low), float(interval.high), num_seeds)


def estimate_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], arm: str
) -> Estimate | None:
    """Compute the mean of value − baseline over common seeds, or return None if there are none.

    Runs with the same seed share the data order and, where shapes agree, the initialization.
    Pairing cancels this shared variation, which intervals of two independent means would include.
    """
    paired = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return estimate(paired, arm) if paired else None


def judge(gap: Estimate | None, lower_is_better: bool) -> str | None:
    """Judge a difference by its interval: 'better', 'worse' or 'no difference seen'.

    Return None if there is no interval.
    """
    if gap is None or gap.low is None or gap.high is None:
        return None
    if gap.low <= 0.0 <= gap.high:
        return 'no difference seen'
    return 'better' if (gap.mean < 0.0) == lower_is_better else 'worse'


def estimate_band(
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Compute mean, low and high [N] of curves [seeds, N]. Low and high are None for one seed.

    Whole curves are resampled, so that a resample has the same seeds at every step. The interval is
    pointwise and does not cover all steps simultaneously.

    Raises:
      ValueError: if there are no seeds, or if a value is not finite.
    """
    num_seeds, num_steps = values.shape
    if num_seeds == 0 or not np.all(np.isfinite(values)):
        raise ValueError('values: expected finite values for at least one seed')
    mean = values.mean(axis=0)
    if num_seeds == 1:
        return mean, None, None
    rng = np.random.default_rng(0)
    weights = _draw_weights(rng, num_seeds)
    # Chunks of 256 steps bound the memory of [RESAMPLES, N].
    chunks = [
        np.quantile(weights @ values[:, start : start + 256], QUANTILES, axis=0)
        for start in range(0, num_steps, 256)
    ]
    low, high = np.concatenate(chunks, axis=1) if chunks else np.empty((2, 0))
    return mean, low, high


def _draw_weights(rng: np.random.Generator, num_seeds: int) -> np.ndarray:
    """Draw the weight of each seed in each resample, [RESAMPLES, seeds]."""
    probabilities = np.full(num_seeds, 1 / num_seeds)
    return rng.multinomial(num_seeds, probabilities, size=RESAMPLES) / num_seeds


def bootstrap_seeds(scores: np.ndarray, statistic: Statistic) -> Estimate:
    """Estimate a statistic of scores [seeds, tasks] by resampling whole seeds."""
    num_seeds = len(scores)

    def resample(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return scores[rng.integers(num_seeds, size=shape)]

    return _bootstrap(scores, statistic, resample)


def bootstrap_runs(scores: np.ndarray, statistic: Statistic) -> Estimate:
    """Estimate a statistic of scores [seeds, tasks] by resampling within each task."""
    num_seeds, num_tasks = scores.shape

    def resample(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return scores[rng.integers(num_seeds, size=(*shape, num_tasks)), np.arange(num_tasks)]

    return _bootstrap(scores, statistic, resample)


def _bootstrap(
    scores: np.ndarray,
    statistic: Statistic,
    resample: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
) -> Estimate:
    """Bootstrap a statistic with resample(rng, (count, seeds)) → [count, seeds, tasks]."""
    num_seeds = len(scores)
    point_estimate = float(statistic(scores))
    if num_seeds == 1:
        return Estimate(point_estimate, None, None, num_seeds)
    rng = np.random.default_rng(0)
    # Ten chunks bound the memory.
    chunks = [statistic(resample(rng, (RESAMPLES // 10, num_seeds))) for _ in range(10)]
    low, high = np.quantile(np.concatenate(chunks), QUANTILES)
    return Estimate(point_estimate, float(low), float(high), num_seeds)


def mean(scores: np.ndarray) -> np.ndarray:
    """Compute the mean of scores [..., seeds, tasks]."""
    return scores.mean((-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Compute the median over tasks of the means over seeds, for scores [..., seeds, tasks].

    This is the definition of Agarwal et al. (2021) and rliable. For a single task, it is the median
    over seeds.
    """
    task_scores = scores[..., 0] if scores.shape[-1] == 1 else scores.mean(-2)
    return np.median(task_scores, axis=-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Compute the interquartile mean of scores [..., seeds, tasks], which trims both quarters."""
    sorted_scores = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    num_cut = sorted_scores.shape[-1] // 4
    return sorted_scores[..., num_cut : sorted_scores.shape[-1] - num_cut].mean(-1)


def probability_of_improvement(
    scores: np.ndarray,
    baseline: np.ndarray,
    lower_is_better: bool,
    *,
    has_separate_runs: bool = False,
) -> Estimate:
    """Estimate the probability that a seed beats a baseline seed, averaged over tasks.

    A tie counts as half a win.

    Args:
      scores: scores [seeds, tasks].
      baseline: scores of the baseline [baseline seeds, tasks].
      lower_is_better: whether the lower score wins.
      has_separate_runs: whether each task has separate runs, which are then resampled
        independently, as in `bootstrap_runs`.
    """
    # Compare every seed with every baseline seed, task by task.
    sign = -1 if lower_is_better else 1
    gap = sign * (scores[:, None] - baseline[None])
    wins = np.where(gap == 0, 0.5, gap > 0)  # [seeds, baseline seeds, tasks]
    if not has_separate_runs:
        wins = wins.mean(-1, keepdims=True)
    num_seeds, num_baseline_seeds, num_strata = wins.shape
    point_estimate = float(wins.mean())
    if min(num_seeds, num_baseline_seeds) == 1:
        return Estimate(point_estimate, None, None, min(num_seeds, num_baseline_seeds))

    # Resample both sides, each stratum independently.
    rng = np.random.default_rng(0)
    stratum_sums = np.zeros(RESAMPLES)
    for stratum in range(num_strata):
        weights = _draw_weights(rng, num_seeds)
        baseline_weights = _draw_weights(rng, num_baseline_seeds)
        stratum_sums += ((weights @ wins[..., stratum]) * baseline_weights).sum(-1)
    low, high = np.quantile(stratum_sums / num_strata, QUANTILES)
    return Estimate(point_estimate, float(low), float(high), min(num_seeds, num_baseline_seeds))


@dataclasses.dataclass(frozen=True)
class SignFlipTest:
    """Result of a two-sided test that a mean difference is zero.

    Attributes:
      p: probability of a mean at least as far from zero by chance alone.
      min_p: smallest p that is possible with this number of differences.
      p_holm: p corrected for the number of tested arms by `correct_holm`, and p itself before that.
      min_p_holm: smallest p_holm that is possible given the other arms: its value if p were min_p.
      num_pairs: number of differences whose signs are flipped.
      pairs_per_seed: number of differences per seed: the number of tasks if each has separate runs,
        and 1 otherwise.
    """

    p: float
    min_p: float
    p_holm: float
    min_p_holm: float
    num_pairs: int = 0
    pairs_per_seed: int = 1

    @property
    def can_be_significant(self) -> bool:
        """Whether there are enough differences to reach significance at 5 %."""
        return self.min_p_holm <= ALPHA


def sign_flip_test(differences: np.ndarray) -> SignFlipTest | None:
    """Test n paired differences by permutation, or return None if there are fewer than two.

    If two arms do not differ, each difference is equally likely to have the opposite sign. All 2ⁿ
    choices of signs are then equally likely, and p is the fraction of choices whose mean is at
    least as far from zero as the observed mean. Nothing is assumed about the distribution over
    seeds. The test is exact up to 16 pairs, and samples signs for more pairs.

    Args:
      differences: differences [seeds], or [seeds, tasks] if each task has separate runs, in which
        case each task of each seed is a pair.
    """
    # Each task of each seed is a pair.
    pairs_per_seed = differences.shape[1] if differences.ndim == 2 else 1
    differences = differences.ravel()
    num_pairs = len(differences)
    if num_pairs < 2:
        return None
    observed = abs(differences.sum())
    # Sums of the same numbers in another order differ by rounding.
    tolerance = 1e-12 * np.abs(differences).sum()
    if num_pairs <= 16:
        # Half of the choices suffice: flipping all signs keeps the absolute sum.
        signs = 1 - 2 * (np.arange(2 ** (num_pairs - 1))[:, None] >> np.arange(num_pairs) & 1)
        p_value = float(np.mean(np.abs(signs @ differences) >= observed - tolerance))
    else:
        rng = np.random.default_rng(0)
        signs = 1 - 2 * rng.integers(2, size=(RESAMPLES, num_pairs))
        extreme = np.sum(np.abs(signs @ differences) >= observed - tolerance)
        p_value = float(extreme + 1) / (RESAMPLES + 1)
    min_p = max(2.0 ** (1 - num_pairs), 1 / (RESAMPLES + 1) if num_pairs > 16 else 0.0)
    return SignFlipTest(p_value, min_p, p_value, min_p, num_pairs, pairs_per_seed)


def correct_holm(tests: Sequence[SignFlipTest | None]) -> list[SignFlipTest | None]:
    """Correct the p-values for the number of tests by Holm's method (1979).

    The smallest p is multiplied by the number of tests, the next by one less, and so on. No
    corrected p is smaller than its predecessor. The probability of any false positive among the
    tests is at most ALPHA.
    """
    p_values = {index: test.p for index, test in enumerate(tests) if test is not None}
    p_holm = _multiply_by_rank(p_values)
    corrected: list[SignFlipTest | None] = []
    for index, test in enumerate(tests):
        if test is not None:
            min_p_holm = _multiply_by_rank(p_values | {index: test.min_p})[index]
            test = dataclasses.replace(test, p_holm=p_holm[index], min_p_holm=min_p_holm)
        corrected.append(test)
    return corrected


def _multiply_by_rank(p_values: Mapping[int, float]) -> dict[int, float]:
    """Return the p-values with Holm's correction."""
    corrected: dict[int, float] = {}
    largest_p = 0.0
    for rank, index in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest_p = max(largest_p, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest_p
    return corrected


def count_seeds_needed(num_arms: int, pairs_per_seed: int = 1) -> int:
    """Return the minimum number of seeds for significance at 5 % after Holm's correction.

    Args:
      num_arms: number of tested arms.
      pairs_per_seed: number of differences per seed, as in `SignFlipTest`.
    """
    num_pairs = next(count for count in range(2, 64) if num_arms * 2.0 ** (1 - count) <= ALPHA)
    return -(-num_pairs // pairs_per_seed)


def warn_too_few_seeds(tests: Sequence[SignFlipTest | None]) -> str | None:
    """Return a warning if there are too few seeds for any significance, or None."""
    valid_tests = [test for test in tests if test is not None]
    if not valid_tests or any(test.can_be_significant for test in valid_tests):
        return None
    best = min(valid_tests, key=lambda test: test.min_p_holm)
    num_seeds = count_seeds_needed(len(valid_tests), best.pairs_per_seed)
    correction = task_note = ''
    if len(valid_tests) > 1:
        correction = f', {format_p(best.min_p_holm)} after Holm for {len(valid_tests)} arms'
    if best.pairs_per_seed > 1:
        task_note = f' of {best.pairs_per_seed} tasks each'
    return (
        f'Too few seeds to call any difference significant: with {best.num_pairs} pairs even '
        f'differences that all agree in sign have p = {format_p(best.min_p)}{correction}. '
        f'{num_seeds} seeds{task_note} are the fewest that can reach {ALPHA}.'
    )


def format_p(value: float) -> str:
    """Format a p-value with two significant digits, because more are never meaningful."""
    return '<0.001' if value < 0.001 else f'{value:.{2 if value >= 0.0995 else 3}f}'
