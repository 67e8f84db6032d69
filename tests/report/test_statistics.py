"""Intervals against values that are known without them: enumeration, symmetry, other libraries."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats

from mi.report import statistics
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / 'tests/golden/statistics.json').read_text())
THREE = {0: 1.0, 1: 2.0, 2: 4.5}


def enumerated(values):
    """The percentile bootstrap of the mean over all nⁿ equally likely resamples."""
    means = [np.mean(draw) for draw in itertools.product(values, repeat=len(values))]
    return np.quantile(means, [0.025, 0.975], method='inverted_cdf')


@pytest.mark.parametrize(
    'values', [[1.0, 2.0], [1.0, 2.0, 4.5], [0.3, -0.1, 0.2, 0.9], [0.0, 1.0, 1.0, 1.0, 7.0]]
)
def test_estimate_is_the_enumerated_bootstrap(values):
    result = statistics.estimate(dict(enumerate(values)), 'mi')
    low, high = enumerated(values)
    assert result.mean == pytest.approx(sum(values) / len(values))
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))
    assert min(values) <= result.low < result.mean < result.high <= max(values)


def test_three_seeds_give_their_range():
    """P(all three draws are the smallest) = 1/27 > 2.5 %: what the standing note warns of."""
    result = statistics.estimate(THREE, 'mi')
    assert (result.low, result.high, result.num_seeds) == (1.0, 4.5, 3)


def test_equal_values_have_an_interval_without_width():
    result = statistics.estimate({0: 0.1, 1: 0.1, 2: 0.1}, 'mi')
    assert (result.mean, result.low, result.high) == (0.1, 0.1, 0.1)


def test_one_seed_has_no_interval():
    result = statistics.estimate({3: 2.5}, 'mi')
    assert (result.mean, result.low, result.high, result.num_seeds) == (2.5, None, None, 1)
    assert statistics.judge(result, lower_is_better=True) is None


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_value_that_is_not_finite_names_arm_and_seed(bad):
    with pytest.raises(ValueError, match='film: the value of seed 7'):
        statistics.estimate({0: 1.0, 7: bad}, 'film')


def test_the_same_numbers_give_the_same_interval_in_any_order():
    reordered = {2: 4.5, 0: 1.0, 1: 2.0}
    assert statistics.estimate(THREE, 'mi') == statistics.estimate(reordered, 'mi')


def test_coverage_of_twenty_seeds_is_roughly_nominal():
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(300, 20))
    result = [statistics.estimate(dict(enumerate(sample)), 'mi') for sample in samples]
    covered = np.mean([e.low <= 0.0 <= e.high for e in result])
    # Known to be a little below 0.95 (about 0.93 at n = 20); its standard error here is 0.015.
    assert 0.88 < covered < 0.975


def test_difference_is_arm_minus_baseline_paired_by_seed():
    """What all seeds share cancels: unpaired, the interval would be as wide as the seeds are."""
    baseline = {0: 1.0, 1: 5.0, 2: 9.0}
    arm = {2: 8.75, 0: 0.5, 1: 4.75}
    result = statistics.estimate_difference(arm, baseline, 'mi')
    assert result.mean == pytest.approx(-1 / 3)
    assert (result.low, result.high, result.num_seeds) == (-0.5, -0.25, 3)


def test_difference_uses_the_seeds_that_both_have():
    result = statistics.estimate_difference({0: 1.0, 1: 2.0}, {1: 1.5, 2: 100.0}, 'mi')
    assert (result.mean, result.low, result.num_seeds) == (0.5, None, 1)
    assert statistics.estimate_difference({0: 1.0}, {1: 1.0}, 'mi') is None


@pytest.mark.parametrize(
    ('low', 'high', 'lower', 'higher'),
    [
        (-2.0, -1.0, 'better', 'worse'),
        (1.0, 2.0, 'worse', 'better'),
        (-1.0, 1.0, 'no difference seen', 'no difference seen'),
        (-1.0, 0.0, 'no difference seen', 'no difference seen'),
    ],
)
def test_verdict(low, high, lower, higher):
    gap = statistics.Estimate((low + high) / 2, low, high, 3)
    assert statistics.judge(gap, lower_is_better=True) == lower
    assert statistics.judge(gap, lower_is_better=False) == higher


def test_band_of_three_seeds_is_their_mean_and_range_at_each_step():
    values = np.random.default_rng(2).normal(size=(3, 600))  # more steps than one piece
    mean, low, high = statistics.estimate_band(values)
    np.testing.assert_allclose(mean, values.sum(axis=0) / 3)
    np.testing.assert_allclose(low, values.min(axis=0))
    np.testing.assert_allclose(high, values.max(axis=0))


def test_band_of_many_seeds_is_the_normal_interval():
    """At n = 400 the bootstrap is the textbook mean ± 1.96·σ/√n."""
    values = np.random.default_rng(3).normal(size=(400, 2))
    mean, low, high = statistics.estimate_band(values)
    half = 1.96 * values.std(axis=0) / 20
    np.testing.assert_allclose(low, mean - half, atol=0.01)
    np.testing.assert_allclose(high, mean + half, atol=0.01)


def test_band_of_one_seed_is_a_line():
    mean, low, high = statistics.estimate_band(np.array([[3.0, 2.0]]))
    assert mean.tolist() == [3.0, 2.0] and low is None and high is None


def test_band_refuses_nan():
    with pytest.raises(ValueError, match='finite'):
        statistics.estimate_band(np.array([[1.0, np.nan], [1.0, 2.0]]))


def drawn(seed, shift=0.0, seeds=5, tasks=8):
    return np.random.default_rng(seed).normal(shift, 1.0, (seeds, tasks)).round(1)


def test_the_interquartile_mean_is_the_trimmed_mean():
    scores = drawn(0)
    expected = scipy.stats.trim_mean(scores, 0.25, axis=None)
    assert statistics.iqm(scores) == pytest.approx(expected)
    both = statistics.iqm(np.stack([scores, scores + 1]))
    np.testing.assert_allclose(both, [expected, expected + 1])


@pytest.mark.parametrize('tasks', range(1, 10))
@pytest.mark.parametrize('seeds', [1, 3, 5])
def test_iqm_cuts_a_quarter_off_of_any_number_of_scores(seeds, tasks):
    """scipy cuts off floor(n / 4) at each end."""
    scores = np.random.default_rng(tasks).normal(size=(seeds, tasks))
    expected = scipy.stats.trim_mean(scores, 0.25, axis=None)
    assert statistics.iqm(scores) == pytest.approx(expected)


def test_probability_of_improvement_is_mann_whitneys():
    scores, baseline = drawn(1, shift=0.5), drawn(2, seeds=4)
    u = scipy.stats.mannwhitneyu(scores, baseline, axis=0).statistic  # ties count half
    result = statistics.probability_of_improvement(scores, baseline, lower_is_better=False)
    assert result.mean == pytest.approx(np.mean(u / (5 * 4)))
    assert result.low < result.mean < result.high
    less = statistics.probability_of_improvement(scores, baseline, lower_is_better=True)
    assert less.mean == pytest.approx(1 - result.mean)
    same = statistics.probability_of_improvement(scores, scores, lower_is_better=True)
    assert same.mean == pytest.approx(0.5)


def test_intervals_over_tasks_draw_whole_seeds():
    """Of the mean over tasks it is the interval of the seeds' means, however many tasks."""
    scores = drawn(3, seeds=4) + np.array([0.0, 1.0, 3.0, 9.0])[:, None]
    means = scores.mean(axis=1)
    result = statistics.bootstrap_seeds(scores, lambda drawn: drawn.mean((-2, -1)))
    low, high = enumerated(means)
    assert (result.mean, result.num_seeds) == (pytest.approx(means.mean()), 4)
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))
    alone = statistics.bootstrap_seeds(scores[:1], statistics.iqm)
    assert (alone.low, alone.high) == (None, None)


@pytest.mark.parametrize('arm', list(GOLDEN['scores']))
@pytest.mark.parametrize('name', ['mean', 'median', 'iqm'])
def test_statistics_of_many_tasks_are_rliables_and_archs(arm, name):
    """`bootstrap_runs` is rliable's stratified bootstrap, `bootstrap_seeds` arch's of rows.

    Theirs are 50,000 draws each. The quantiles of 10,000 draws differ from them by chance: by a few
    hundredths of a width.
    """
    scores = np.array(GOLDEN['scores'][arm])
    widths = {}
    bootstraps = {'over_runs': statistics.bootstrap_runs, 'over_seeds': statistics.bootstrap_seeds}
    for kind, bootstrap in bootstraps.items():
        point, low, high = GOLDEN[kind][arm][name]
        result = bootstrap(scores, getattr(statistics, name))
        assert result.mean == pytest.approx(point)
        widths[kind] = high - low
        tolerance = 0.05 * widths[kind]
        assert (result.low, result.high) == (
            pytest.approx(low, abs=tolerance),
            pytest.approx(high, abs=tolerance),
        )
    # Resampling each task alone misses seeds that are lucky in all tasks simultaneously.
    assert name == 'median' or widths['over_seeds'] > 1.1 * widths['over_runs']


@pytest.mark.parametrize('arm', ['better', 'same'])
def test_probability_of_improvement_is_rliables_where_tasks_have_their_own_runs(arm):
    scores, baseline = (np.array(GOLDEN['scores'][a]) for a in (arm, 'baseline'))
    point, low, high = GOLDEN['improvement'][arm]
    result = statistics.probability_of_improvement(scores, baseline, False, has_separate_runs=True)
    assert result.mean == pytest.approx(point)
    tolerance = 0.1 * (high - low)  # theirs are 2,000 draws
    assert (result.low, result.high) == (
        pytest.approx(low, abs=tolerance),
        pytest.approx(high, abs=tolerance),
    )
    seeds = statistics.probability_of_improvement(scores, baseline, False)
    assert seeds.mean == result.mean and seeds.width > result.width


@pytest.mark.parametrize('arm', ['better', 'same'])
def test_sign_flips_are_scipys_permutation_test(arm):
    scores, baseline = (np.array(GOLDEN['scores'][a]) for a in (arm, 'baseline'))
    result = statistics.sign_flip_test((scores - baseline).mean(1))
    assert result.p == pytest.approx(GOLDEN['sign_flips'][arm])
    assert result.min_p == 2 / 2**10 and result.can_be_significant


@pytest.mark.parametrize('n', range(2, 17))
def test_differences_of_one_sign_have_the_least_p(n):
    result = statistics.sign_flip_test(0.1 + np.arange(n) / 7)
    assert result.p == result.min_p == 2 / 2**n
    assert result.can_be_significant == (n >= 6)
    assert statistics.sign_flip_test(np.zeros(n)).p == 1.0


def test_more_than_sixteen_differences_are_tested_by_sampled_signs():
    rng = np.random.default_rng(5)
    differences = rng.normal(0.4, 1.0, 30)
    t = scipy.stats.ttest_1samp(differences, 0.0).pvalue  # nearly the same for normal ones
    assert statistics.sign_flip_test(differences).p == pytest.approx(t, abs=0.01)
    assert statistics.sign_flip_test(np.ones(30)).p == 1 / (statistics.RESAMPLES + 1)


def test_one_difference_is_not_tested():
    assert statistics.sign_flip_test(np.array([1.0])) is None


def test_holm_is_statsmodels():
    p = GOLDEN['holm']['p']
    tests = [statistics.SignFlipTest(x, 0.001, x, 0.001) for x in p]
    result = statistics.correct_holm([None, *tests])
    assert result[0] is None
    assert [test.p_holm for test in result[1:]] == pytest.approx(GOLDEN['holm']['corrected'])
    assert all(test.min_p_holm == pytest.approx(0.001 * len(p)) for test in result[1:])


@pytest.mark.parametrize(
    ('num_first', 'p_holm', 'min_p_holm'), [(8, 2 / 2**6, 2 / 2**6), (5, 4 / 2**6, 4 / 2**6)]
)
def test_an_arm_of_few_seeds_is_judged_by_the_rank_that_its_p_can_have(
    num_first, p_holm, min_p_holm
):
    """Six seeds suffice for the second rank, but not for the first of two."""
    first, second = statistics.correct_holm(
        [statistics.sign_flip_test(np.ones(n)) for n in (num_first, 6)]
    )
    assert (second.p_holm, second.min_p_holm) == (p_holm, min_p_holm)
    assert second.can_be_significant == first.can_be_significant == (num_first == 8)
    mixed = statistics.sign_flip_test(np.array([1.0, 1.0, 1.0, -1.0, -1.0, 2.0]))
    _, mixed = statistics.correct_holm([statistics.sign_flip_test(np.ones(num_first)), mixed])
    assert mixed.p_holm > statistics.ALPHA and mixed.min_p_holm == min_p_holm


@pytest.mark.parametrize('tasks', [None, 1, 2, 3, 5])
@pytest.mark.parametrize('arms', [1, 2, 5])
def test_the_seeds_needed_are_the_fewest_that_can_tell(arms, tasks):
    def can_tell(n):
        test = statistics.sign_flip_test(np.ones(n if tasks is None else (n, tasks)))
        return statistics.correct_holm([test] * arms)[0].can_be_significant

    n = statistics.count_seeds_needed(arms, tasks or 1)
    assert can_tell(n) and not can_tell(n - 1)
