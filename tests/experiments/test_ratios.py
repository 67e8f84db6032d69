"""Geometric means, their ratios, and numbers of any size in two digits."""

import pytest

from experiments.figures import ratios
from mi.report.statistics import Estimate


def test_geometric_means_and_ratios():
    mean = ratios.estimate_geometric_mean({0: 1.0, 1: 100.0, 2: 10.0}, 'arm')
    assert mean.mean == pytest.approx(10) and mean.num_seeds == 3
    assert 0.999 < mean.low < 10 < mean.high < 100.001
    ratio = ratios.estimate_ratio({0: 2.0, 1: 600.0, 5: 1.0}, {0: 1.0, 1: 200.0, 2: 7.0}, 'arm')
    assert ratio.mean == pytest.approx(6**0.5) and ratio.num_seeds == 2
    assert ratios.estimate_ratio({0: 1.0}, {1: 1.0}, 'arm') is None
    with pytest.raises(
        ValueError, match=r'arm: expected positive finite values, but seed 3 has 0\.0'
    ):
        ratios.estimate_geometric_mean({1: 1.0, 3: 0.0}, 'arm')


@pytest.mark.parametrize(
    ('estimate', 'text'),
    [
        (Estimate(2.34567, 0.012345, 345.6, 5), '2.3 [0.012, 346]'),
        (Estimate(1.234e-5, None, None, 1), '1.2e−5'),
        (Estimate(12345.0, 99.6, 1.2e6, 5), '1.2e4 [100, 1.2e6]'),
        (None, '—'),
    ],
)
def test_estimates_are_written_in_two_significant_digits(estimate, text):
    assert ratios.format_estimate(estimate) == text
