"""PopArt for each task: values are learnt in units in which every task's targets are alike.

van Hasselt et al., Learning values across many orders of magnitude, 2016; for many tasks: Hessel
et al., Multi-task Deep Reinforcement Learning with PopArt, 2019. Pure functions; a value v of a
task is n in its units, v = σ n + μ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LOWEST, HIGHEST = 1e-4, 1e6  # of σ, as published


class Statistics(NamedTuple):
    """Mean and variance of each task's targets, [tasks] f32.

    The variance is ν − μ² of the published second moment ν. It is kept itself, because in f32 that
    difference is lost where μ is some hundred times σ.
    """

    mu: Array
    variance: Array


def init(tasks: int) -> Statistics:
    """μ = 0 and σ = 1: units of one."""
    return Statistics(jnp.zeros(tasks), jnp.ones(tasks))


def sigma(statistics: Statistics) -> Array:
    """σ, the root of the variance, between 1e-4 and 1e6; [tasks]."""
    return jnp.sqrt(jnp.clip(statistics.variance, LOWEST**2, HIGHEST**2))


def normalise(statistics: Statistics, values: Array, task: Array) -> Array:
    """Values in the units of their tasks: (v − μ) / σ; all arrays of one shape."""
    return (values - statistics.mu[task]) / sigma(statistics)[task]


def unnormalise(statistics: Statistics, values: Array, task: Array) -> Array:
    """Values from the units of their tasks: σ n + μ; all arrays of one shape."""
    return sigma(statistics)[task] * values + statistics.mu[task]


def update(
    statistics: Statistics, targets: Array, task: Array, weight: Array, beta: float = 3e-4
) -> Statistics:
    """Moves the moments of each task by β towards those of its targets.

        μ ← (1 − β) μ + β mean(v),   ν ← (1 − β) ν + β mean(v²)

    The second is the same as: variance ← (1 − β) variance + β mean(d²) − β² mean(d)², d = v − μ,
    without that difference.

    The *means* over a task's targets are used once an update: a step for each target, or their sum,
    diverges at the batches of an actor-learner. A task without targets keeps its moments.

    Args:
      targets: [...], in the units of the rewards.
      task: [...], the task of each.
      weight: [...], 1 or True for what counts, 0 for what does not.
      beta: β, the step.
    """
    task, weight = task.ravel(), weight.astype(jnp.float32).ravel()
    mu, variance = statistics
    distance = targets.ravel() - mu[task]

    def total(values: Array) -> Array:
        return jax.ops.segment_sum(weight * values, task, num_segments=len(mu))

    count = total(jnp.ones_like(distance))
    some = jnp.maximum(count, 1)
    step = jnp.where(count > 0, beta, 0)
    move = step * total(distance) / some
    spread = total(distance**2) / some
    return Statistics(mu + move, variance + step * (spread - variance) - move**2)


def preserve(gain: Array, shift: Array, old: Statistics, new: Statistics) -> tuple[Array, Array]:
    """Gain and shift of the values' last affine map with which no value changes.

        gain ← gain σ / σ',   shift ← (σ shift + μ − μ') / σ'

    Args:
      gain, shift: [tasks], n = gain · raw + shift in the units of the task.
      old, new: statistics before and after their update.
    """
    before, after = sigma(old), sigma(new)
    return gain * before / after, (before * shift + old.mu - new.mu) / after
