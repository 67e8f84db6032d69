"""Whether a ranking is one of the arms or of the seeds: each set of seeds reported by itself."""

import itertools
from collections.abc import Sequence

import scipy.stats

from mi.report import statistics, tables
from mi.report.runs import Arm, Sweep


def to_markdown(sweep: Sweep) -> str:
    """A table with the means and ranks of every arm in each set of seeds; '' unless there are sets.

    Under it, Kendall's τ of the rankings of each two sets: 1 where they are the same, 0 on average
    where they are drawn at random, −1 where one is the reverse of the other. A table for each
    problem, if there are several: arms of different problems have no ranks among each other.
    """
    problems = sweep.by_problem()
    texts = {name: _table(sweep, arms) for name, arms in problems.items() if len(arms) > 1}
    return '\n'.join(
        f'**{tables.words(name)}**\n\n{text}' if len(problems) > 1 else text
        for name, text in texts.items()
        if text
    )


def _table(sweep: Sweep, arms: Sequence[Arm]) -> str:
    finals = {arm.label: arm.final(sweep.metric, sweep.split) for arm in arms}
    diverged = [
        arm.label for arm in arms if finals[arm.label] and not arm.finite(sweep.metric, sweep.split)
    ]
    finals = {label: final for label, final in finals.items() if label not in diverged}
    if (
        len(finals) < 2
        or not sweep.draws
        or not all(
            seed in final for final in finals.values() for seeds in sweep.draws for seed in seeds
        )
    ):
        return ''
    sign = 1 if sweep.lower_is_better else -1
    header, columns, rankings = ['arm'], [], []
    for seeds in sweep.draws:
        means = [
            statistics.estimate({seed: final[seed] for seed in seeds}, label)
            for label, final in finals.items()
        ]
        digits = tables.digits(means)
        ranks = scipy.stats.rankdata([sign * e.mean for e in means], method='min').astype(int)
        columns += [[str(tables.interval(e, digits)) for e in means], [str(r) for r in ranks]]
        header += [f'{tables.words(sweep.metric)}, seeds {_span(seeds)} [95 %]', 'rank']
        rankings.append([e.mean for e in means])
    body = [list(line) for line in zip(finals, *columns, strict=True)]
    agree = [
        f"Kendall's τ of the ranking by seeds {_span(a)} and that by {_span(b)}: "
        f'{_tau(of_a, of_b)}.'
        for (a, of_a), (b, of_b) in itertools.combinations(
            zip(sweep.draws, rankings, strict=True), 2
        )
    ]
    said = [f'Not ranked, as a seed is not finite: {"; ".join(diverged)}.'] if diverged else []
    return tables.markdown(header, body) + '\n\n' + '\n'.join([*agree, *said]) + '\n'


def _tau(of_a: Sequence[float], of_b: Sequence[float]) -> str:
    tau = float(scipy.stats.kendalltau(of_a, of_b).statistic)
    return f'{tau:.2f}' if tau == tau else 'not defined, as all means of one are equal'


def _span(seeds: tuple[int, ...]) -> str:
    """0 to 4, or 0, 3, 7 where some between are left out."""
    if seeds == tuple(range(seeds[0], seeds[-1] + 1)):
        return f'{seeds[0]} to {seeds[-1]}'
    return ', '.join(map(str, seeds))
