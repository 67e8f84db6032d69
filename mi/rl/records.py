"""What a run of any topology writes of its updates and episodes."""

from collections.abc import Iterable, Sequence

import numpy as np

from mi.rl import popart
from mi.rl.actor import Episodes

Record = dict[str, float | None]


def of_episodes(ended: Episodes, tasks: Sequence[str]) -> Record:
    """Means over the episodes that ended since the last record, all and by task; None for none."""
    number, *sums = (np.asarray(a, np.float64) for a in ended)
    names = 'return', 'length', 'success'
    count = number.sum()
    record: Record = {'episodes': float(count)}
    for name, values in zip(names, sums, strict=True):
        record[name] = float(values.sum() / count) if count else None
    if len(tasks) > 1:
        for name, values in zip(('return', 'success'), (sums[0], sums[2]), strict=True):
            for task, value, n in zip(tasks, values, number, strict=True):
                record[f'{name}/{task}'] = float(value / n) if n else None
    return record


def of_statistics(statistics: popart.Statistics, tasks: Sequence[str]) -> Record:
    """μ and σ of PopArt, by task."""
    mu, sigma = np.asarray(statistics.mu), np.asarray(popart.sigma(statistics))
    record: Record = {}
    for task, m, s in zip(tasks, mu, sigma, strict=True):
        record[f'popart_mu/{task}'], record[f'popart_sigma/{task}'] = float(m), float(s)
    return record


def total(episodes: Iterable[Episodes]) -> Episodes:
    """Sums of several."""
    return Episodes(*(np.sum(np.stack(a), axis=0) for a in zip(*episodes, strict=True)))
