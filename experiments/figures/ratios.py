"""Geometric means over seeds and their ratios, for values that span orders of magnitude."""

import math
from collections.abc import Mapping

from mi.report import statistics
from mi.report.statistics import Estimate
from mi.report.tables import NONE


def estimate_geometric_mean(values: Mapping[int, float], arm: str) -> Estimate:
    """Estimate the geometric mean of {seed: value} with its interval.

    Raises:
      ValueError: if there are no values, or if a value is not positive and finite.
    """
    if invalid_seeds := [seed for seed, value in values.items() if not value > 0]:
        raise ValueError(
            f'{arm}: expected positive finite values, but seed {invalid_seeds[0]} has '
            f'{values[invalid_seeds[0]]}'
        )
    logarithms = {seed: math.log(value) for seed, value in values.items()}
    return _exponentiate(statistics.estimate(logarithms, arm))


def estimate_ratio(
    values: Mapping[int, float], baseline: Mapping[int, float], arm: str
) -> Estimate | None:
    """Estimate the geometric mean of value / baseline over common seeds, if there are any."""
    paired = {seed: values[seed] / baseline[seed] for seed in values if seed in baseline}
    return estimate_geometric_mean(paired, arm) if paired else None


def format_estimate(estimate: Estimate | None) -> str:
    """Format mean [low, high] with two significant digits."""
    if estimate is None:
        return NONE
    mean, low, high = map(_format_number, (estimate.mean, estimate.low, estimate.high))
    return mean if estimate.low is None else f'{mean} [{low}, {high}]'


def _exponentiate(log_estimate: Estimate) -> Estimate:
    low, high = (
        None if bound is None else math.exp(bound)
        for bound in (log_estimate.low, log_estimate.high)
    )
    return Estimate(math.exp(log_estimate.mean), low, high, log_estimate.num_seeds)


def _format_number(value: float | None) -> str:
    if value is None:
        return NONE
    if 10 <= value < 1000:
        return f'{value:.0f}'
    if 0.01 <= value < 10:
        return f'{value:#.2g}'
    mantissa, exponent = f'{value:.1e}'.split('e')
    return f'{mantissa}e{int(exponent)}'.replace('-', '−')
