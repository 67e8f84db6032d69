"""Measurements between two log records, for topologies with actors."""

import time

import jax
import numpy as np

from mi.rl import episode_metrics
from mi.rl.actors.threads import QueueItem
from mi.rl.trajectory import Episodes


class Window:
    """Measurements since the last record.

    Attributes:
      updates: number of updates.
      transitions: number of valid transitions learned from in this process.
      lags: lags of the trajectories, in updates.
      dropped: number of trajectories dropped because they were too old.
      wait_seconds: time that the learner waited for trajectories.
    """

    def __init__(self) -> None:
        self._start_time = time.perf_counter()
        self._metrics: list[dict[str, jax.Array]] = []
        self._episodes: list[Episodes] = []
        self._actor_wait_seconds = 0.0
        self.lags: list[int] = []
        self.updates = self.transitions = 0
        self.dropped = 0
        self.wait_seconds = 0.0

    def add(self, metrics: dict[str, jax.Array], queue_items: list[QueueItem]) -> None:
        """Add the metrics of an update and the trajectories it was computed from."""
        self.updates += 1
        self._metrics.append(metrics)
        self._episodes += [item.episodes for item in queue_items]
        self._actor_wait_seconds += sum(item.wait_seconds for item in queue_items)
        self.transitions += sum(int(item.trajectory.valid.sum()) for item in queue_items)

    def take(self, is_complete: bool) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the metrics of the updates, [updates] each, and their timing in seconds.

        Unless `is_complete` is True, the metrics of the newest update are left out if there are
        others, because the learner would have to wait for them.
        """
        skips_newest = not is_complete and self.updates > 1
        update_metrics = jax.device_get(self._metrics[:-1] if skips_newest else self._metrics)
        values = {
            metric_name: np.stack([metrics[metric_name] for metrics in update_metrics])
            for metric_name in update_metrics[0]
        }
        values |= {
            'lag': np.asarray(self.lags),
            'lag_max': np.max(self.lags, keepdims=True),
            'dropped': np.asarray([self.dropped]),
        }
        timing = {
            'seconds': time.perf_counter() - self._start_time,
            'updates': self.updates,
            'learner_waited': self.wait_seconds,
            'actors_waited': self._actor_wait_seconds,
        }
        return values, timing

    def episodes(self) -> Episodes:
        """Return the sums over all episodes that ended."""
        return episode_metrics.add_episodes(self._episodes)
