"""Geometric means over seeds, for numbers that differ by orders of magnitude, and their ratios."""

import math
from collections.abc import Mapping

from mi.report import statistics
from mi.report.statistics import Estimate
from mi.report.tables import NONE


def geometric(values: Mapping[int, float], arm: str) -> Estimate:
    """exp of the mean of logarithms with its interval, of {seed: positive value}.

    Raises:
      ValueError: if there is no value, or one is not positive and finite.
    """
    if low := [seed for seed, value in values.items() if not value > 0]:
        raise ValueError(f'{arm}: the value of seed {low[0]} is {values[low[0]]}')
    return _exp(statistics.estimate({seed: math.log(v) for seed, v in values.items()}, arm))


def ratio(values: Mapping[int, float], baseline: Mapping[int, float], arm: str) -> Estimate | None:
    """The geometric mean of value / baseline, paired by seed; None if no seed has both."""
    paired = {seed: values[seed] / baseline[seed] for seed in values if seed in baseline}
    return geometric(paired, arm) if paired else None


def text(estimate: Estimate | None) -> str:
    """mean [low, high], in two significant digits."""
    if estimate is None:
        return NONE
    mean, low, high = (_short(x) for x in (estimate.mean, estimate.low, estimate.high))
    return mean if estimate.low is None else f'{mean} [{low}, {high}]'


def _exp(of_logs: Estimate) -> Estimate:
    low, high = (None if x is None else math.exp(x) for x in (of_logs.low, of_logs.high))
    return Estimate(math.exp(of_logs.mean), low, high, of_logs.n)


def _short(value: float | None) -> str:
    if value is None:
        return NONE
    if 10 <= value < 1000:
        return f'{value:.0f}'
    if 0.01 <= value < 10:
        return f'{value:#.2g}'
    mantissa, power = f'{value:.1e}'.split('e')
    return f'{mantissa}e{int(power)}'.replace('-', '−')
