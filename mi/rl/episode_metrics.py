"""Metrics of episodes and PopArt statistics, in the format in which all topologies log them."""

from collections.abc import Iterable, Sequence

import numpy as np

from mi.rl import popart
from mi.rl.trajectory import Episodes

Record = dict[str, float | None]


def summarize_episodes(
    episodes: Episodes, tasks: Sequence[str], has_success: bool = True
) -> Record:
    """Return mean episode results for each task and over all tasks.

    The mean over all tasks gives equal weight to each task in which an episode ended. A value is
    None if it is unknown, because no episode ended or the environment does not define success.
    """
    num_episodes, *sums = (np.asarray(task_sums, np.float64) for task_sums in episodes)
    has_ended = num_episodes > 0
    record: Record = {'episodes': float(num_episodes.sum())}
    for metric_name, task_sums in zip(('return', 'length', 'success'), sums, strict=True):
        is_defined = metric_name != 'success' or has_success
        is_known = has_ended if is_defined else np.zeros_like(has_ended)
        means = np.divide(task_sums, num_episodes, out=np.zeros_like(task_sums), where=has_ended)
        record[metric_name] = float(means[is_known].mean()) if is_known.any() else None
        if len(tasks) > 1 and metric_name != 'length':
            for task, task_name in enumerate(tasks):
                mean = float(means[task]) if is_known[task] else None
                record[f'{metric_name}/{task_name}'] = mean
    return record


def make_note(record: Record) -> str:
    """Return the success in a record, or the return if it has none, for the progress line."""
    for metric_name in ('success', 'return'):
        mean = record.get(metric_name)
        if mean is not None:
            return f'{metric_name} {mean:.3f}'
    return 'no episode ended yet'


def summarize_statistics(statistics: popart.Statistics, tasks: Sequence[str]) -> Record:
    """Return PopArt's μ and σ for each task."""
    mu, sigma = np.asarray(statistics.mu), np.asarray(popart.sigma(statistics))
    record: Record = {}
    for task, task_name in enumerate(tasks):
        record[f'popart_mu/{task_name}'] = float(mu[task])
        record[f'popart_sigma/{task_name}'] = float(sigma[task])
    return record


def add_episodes(episodes: Iterable[Episodes]) -> Episodes:
    """Add up the episodes of several trajectories."""
    return Episodes(*(np.sum(np.stack(sums), axis=0) for sums in zip(*episodes, strict=True)))
