"""Figures: what they leave out."""

import numpy as np
import pytest

from mi.report.plots import Line, _zoom


def curve(*values):
    mean = np.array(values)
    return Line(np.arange(1, len(values) + 1), mean, mean - 0.01, mean + 0.01)


def test_early_losses_that_would_hide_the_end_are_cut_off():
    low, high = _zoom([curve(9.0, 4.0, 2.2, 2.0), curve(9.0, 5.0, 2.4, 2.1)])
    # Steps 2 to 4 are the later half: from 1.99 to 5.01, of a whole range up to 9.01.
    assert (low, high) == pytest.approx((1.99 - 0.08 * 3.02, 5.01 + 0.08 * 3.02))


def test_a_score_that_was_lower_at_first_is_shown_whole():
    low, high = _zoom([curve(0.10, 0.05, 0.20, 0.30, 0.40)])
    assert low < 0.04 and high > 0.41


def test_a_flat_curve_has_room():
    low, high = _zoom([Line(np.array([1]), *[np.array([2.0])] * 3)])
    assert low < 2 < high
