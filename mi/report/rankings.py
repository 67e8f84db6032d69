"""Rankings of the arms for each set of seeds, which show how much the order varies."""

import itertools
import math
from collections.abc import Sequence

import scipy.stats

from mi.report import statistics, tables
from mi.report.arms import Arm, Sweep


def to_markdown(sweep: Sweep) -> str:
    """Format a table of the mean and rank of every arm in each seed set, or '' without seed sets.

    Below it is Kendall's τ of each pair of rankings: 1 if they are equal, 0 on average if they are
    random, and −1 if one is the reverse of the other. Each problem has its own table, because arms
    of different problems are not ranked together.
    """
    problems = sweep.group_by_problem()
    ranking_tables = {
        problem: _rank_arms(sweep, arms) for problem, arms in problems.items() if len(arms) > 1
    }
    return '\n'.join(
        f'**{tables.humanize(problem)}**\n\n{ranking_table}' if len(problems) > 1 else ranking_table
        for problem, ranking_table in ranking_tables.items()
        if ranking_table
    )


def _rank_arms(sweep: Sweep, arms: Sequence[Arm]) -> str:
    """Format the table of one problem, or return '' until every arm has every seed."""
    # Leave out arms that diverged.
    finals = {arm.label: arm.final_values(sweep.metric, sweep.split) for arm in arms}
    diverged_labels = [
        arm.label
        for arm in arms
        if finals[arm.label] and not arm.finite_values(sweep.metric, sweep.split)
    ]
    finals = {label: values for label, values in finals.items() if label not in diverged_labels}
    seeds = set(itertools.chain.from_iterable(sweep.seed_sets))
    if (
        len(finals) < 2
        or not seeds
        or not all(seeds <= values.keys() for values in finals.values())
    ):
        return ''

    # Compute means and ranks, two columns per seed set.
    sign = 1 if sweep.lower_is_better else -1
    header, columns, rankings = ['arm'], [], []
    for seed_set in sweep.seed_sets:
        estimates = [
            statistics.estimate({seed: values[seed] for seed in seed_set}, label)
            for label, values in finals.items()
        ]
        means = [estimate.mean for estimate in estimates]
        decimals = tables.count_decimals(estimates)
        ranks = scipy.stats.rankdata([sign * mean for mean in means], method='min').astype(int)
        columns.append([str(tables.format_interval(estimate, decimals)) for estimate in estimates])
        columns.append([str(rank) for rank in ranks])
        metric_title = sweep.metric_title
        header += [f'{metric_title}, seeds {_format_seeds(seed_set)} [95 %]', 'rank']
        rankings.append(means)
    body = [list(cells) for cells in zip(finals, *columns, strict=True)]

    # Compare each pair of rankings.
    notes = []
    ranked_sets = zip(map(_format_seeds, sweep.seed_sets), rankings, strict=True)
    for (seeds_a, means_a), (seeds_b, means_b) in itertools.combinations(ranked_sets, 2):
        tau = _format_tau(means_a, means_b)
        notes.append(f"Kendall's τ of the ranking by seeds {seeds_a} and that by {seeds_b}: {tau}.")
    if diverged_labels:
        notes.append(f'Not ranked, because a seed is not finite: {"; ".join(diverged_labels)}.')
    return tables.format_markdown(header, body) + '\n\n' + '\n'.join(notes) + '\n'


def _format_tau(means_a: Sequence[float], means_b: Sequence[float]) -> str:
    tau = float(scipy.stats.kendalltau(means_a, means_b).statistic)
    return f'{tau:.2f}' if not math.isnan(tau) else 'undefined, because all means of one are equal'


def _format_seeds(seeds: tuple[int, ...]) -> str:
    """Format seeds as '0 to 4' if they are consecutive, and as '0, 3, 7' otherwise."""
    if seeds == tuple(range(seeds[0], seeds[-1] + 1)):
        return f'{seeds[0]} to {seeds[-1]}'
    return ', '.join(map(str, seeds))
