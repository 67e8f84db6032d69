"""Conclusions of a sweep, with one sentence for each arm compared with the baseline."""

import dataclasses

from mi.report import statistics, tables
from mi.report.analysis import ArmResult
from mi.report.arms import Sweep
from mi.report.statistics import Estimate, SignFlipTest


def write_conclusions(sweep: Sweep, results: list[ArmResult]) -> list[str]:
    """Write a sentence for each arm whose difference from the baseline is known.

    A comparison is settled if its p-value, corrected for the number of arms, is at most 0.05:

        mi beats concat by 0.033 bits per byte, p = 0.008, 8 seeds.
        mi loses to concat by 0.12 success, p = 0.016, 8 seeds.
        mi and concat: not settled, a difference of −0.03 success, p = 0.34, 8 seeds.
        mi and concat: not settled, a difference of −0.03 success, 3 seeds; expected at least 6.
    """
    decimals = tables.count_decimals(
        [result.metric for result in results], [result.difference for result in results]
    )
    num_tests = sum(result.test is not None for result in results)
    return [
        _conclude(sweep, result.arm.label, result.difference, result.test, decimals, num_tests)
        for result in results
        if result.difference is not None
    ]


def _conclude(
    sweep: Sweep,
    label: str,
    difference: Estimate,
    test: SignFlipTest | None,
    decimals: int,
    num_tests: int,
) -> str:
    """Write the sentence for one arm."""
    seeds = _count_seeds(difference, test)
    if test is not None and test.p_holm <= statistics.ALPHA:
        is_better = (difference.mean < 0) == sweep.lower_is_better
        size = dataclasses.replace(difference, mean=abs(difference.mean), low=None, high=None)
        amount = f'{tables.format_interval(size, decimals).main} {sweep.metric_title}'
        verb = 'beats' if is_better else 'loses to'
        return f'{label} {verb} {sweep.baseline} by {amount}, {_format_p(test)}, {seeds}.'

    amount = f'{tables.format_interval(difference, decimals, "+").main} {sweep.metric_title}'
    start = f'{label} and {sweep.baseline}: not settled, a difference of {amount}'
    if test is not None and test.can_be_significant:
        return f'{start}, {_format_p(test)}, {seeds}.'
    pairs_per_seed = test.pairs_per_seed if test is not None else 1
    num_needed = statistics.count_seeds_needed(max(num_tests, 1), pairs_per_seed)
    return f'{start}, {seeds}; expected at least {num_needed}.'


def _count_seeds(difference: Estimate, test: SignFlipTest | None) -> str:
    """Describe the number of seeds, and of tasks per seed if they have separate runs."""
    num_seeds = difference.num_seeds
    seeds = f'{num_seeds} {"seed" if num_seeds == 1 else "seeds"}'
    if test is not None and test.pairs_per_seed > 1:
        seeds += f' of {test.pairs_per_seed} tasks each'
    return seeds


def _format_p(test: SignFlipTest) -> str:
    """Format a p-value, as in 'p = 0.016' or 'p < 0.001'."""
    p_value = statistics.format_p(test.p_holm)
    return f'p < {p_value[1:]}' if p_value.startswith('<') else f'p = {p_value}'
