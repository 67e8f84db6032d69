"""What a run of any topology writes of its updates and episodes."""

from collections.abc import Iterable, Sequence

import numpy as np

from mi.rl import popart
from mi.rl.trajectory import Episodes

Record = dict[str, float | None]


def of_episodes(ended: Episodes, tasks: Sequence[str], has_success: bool = True) -> Record:
    """Return means over the episodes that ended since the last record, of all tasks and by task.

    That of all tasks is the mean over those of which an episode ended, however many did. None
    stands for what is unknown: no episode ended, or the environment has no notion of success.
    """
    number, *sums = (np.asarray(a, np.float64) for a in ended)
    has_ended = number > 0
    record: Record = {'episodes': float(number.sum())}
    for name, summed in zip(('return', 'length', 'success'), sums, strict=True):
        is_known = has_ended if name != 'success' or has_success else np.zeros_like(has_ended)
        means = np.divide(summed, number, out=np.zeros_like(summed), where=has_ended)
        record[name] = float(means[is_known].mean()) if is_known.any() else None
        if len(tasks) > 1 and name != 'length':
            for task, mean, known in zip(tasks, means, is_known, strict=True):
                record[f'{name}/{task}'] = float(mean) if known else None
    return record


def note(record: Record) -> str:
    """Return what the line on the screen says of a record: the success, or the return without."""
    for name in ('success', 'return'):
        value = record.get(name)
        if value is not None:
            return f'{name} {value:.3f}'
    return 'no episode ended yet'


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
