"""Records of episodes and of PopArt's statistics, as a run of any topology writes them."""

from collections.abc import Iterable, Sequence

import numpy as np

from mi.rl import popart
from mi.rl.trajectory import Episodes

Record = dict[str, float | None]


def summarize_episodes(
    episodes: Episodes, tasks: Sequence[str], has_success: bool = True
) -> Record:
    """Return means over episodes, by task and over all tasks.

    The mean over all tasks weights the tasks with an episode equally. None means unknown: no
    episode ended, or the environment does not define success.
    """
    number, *sums = (np.asarray(a, np.float64) for a in episodes)
    has_ended = number > 0
    record: Record = {'episodes': float(number.sum())}
    for name, total in zip(('return', 'length', 'success'), sums, strict=True):
        is_known = has_ended if name != 'success' or has_success else np.zeros_like(has_ended)
        means = np.divide(total, number, out=np.zeros_like(total), where=has_ended)
        record[name] = float(means[is_known].mean()) if is_known.any() else None
        if len(tasks) > 1 and name != 'length':
            for i, task in enumerate(tasks):
                record[f'{name}/{task}'] = float(means[i]) if is_known[i] else None
    return record


def make_note(record: Record) -> str:
    """Return a record's success, or its return if that is unknown, for the progress line."""
    for name in ('success', 'return'):
        value = record.get(name)
        if value is not None:
            return f'{name} {value:.3f}'
    return 'no episode ended yet'


def summarize_statistics(statistics: popart.Statistics, tasks: Sequence[str]) -> Record:
    """Return μ and σ of PopArt by task."""
    mu, sigma = np.asarray(statistics.mu), np.asarray(popart.sigma(statistics))
    record: Record = {}
    for i, task in enumerate(tasks):
        record[f'popart_mu/{task}'] = float(mu[i])
        record[f'popart_sigma/{task}'] = float(sigma[i])
    return record


def add_episodes(episodes: Iterable[Episodes]) -> Episodes:
    """Sum the episodes of several trajectories."""
    return Episodes(*(np.sum(np.stack(a), axis=0) for a in zip(*episodes, strict=True)))
