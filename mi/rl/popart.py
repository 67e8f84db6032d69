"""PopArt for each task: values are learned in units in which all tasks' targets are alike.

van Hasselt et al., Learning values across many orders of magnitude, 2016; for many tasks: Hessel
et al., Multi-task Deep Reinforcement Learning with PopArt, 2019. Pure functions; a value v of a
task is n in its units, v = σ n + μ.

`update` can correct the moments for their start as Adam does (Kingma and Ba, 2015), which the
papers do not do. Uncorrected, with β = 3e-4, the initial units last for thousands of updates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.rows import sum_over_rows

LOWEST, HIGHEST = 1e-4, 1e6  # bounds of σ, as published
LARGEST_TARGET = 1e3 * HIGHEST  # magnitude up to which a target moves the moments


class Statistics(NamedTuple):
    """Mean and variance of each task's targets; `update` can correct their bias as in Adam.

    The papers keep the second moment ν, and the variance is ν − μ². Here the variance itself is
    kept, because in f32 that difference is lost where μ is several hundred times σ.

    Attributes:
      mu, variance: [tasks] f32.
      updates: [tasks] int32, the number of updates in which the task had targets.
    """

    mu: Array
    variance: Array
    updates: Array


def init(num_tasks: int) -> Statistics:
    """Return μ = 0 and σ = 1; with the correction, the first targets replace them."""
    return Statistics(jnp.zeros(num_tasks), jnp.ones(num_tasks), jnp.zeros(num_tasks, jnp.int32))


def sigma(statistics: Statistics) -> Array:
    """Return σ [tasks], the root of the variance, clipped to [1e-4, 1e6]."""
    return jnp.sqrt(jnp.clip(statistics.variance, LOWEST**2, HIGHEST**2))


def normalize(statistics: Statistics, values: Array, task: Array) -> Array:
    """Normalize values to the units of their tasks: (v − μ) / σ; all arrays of one shape."""
    return (values - statistics.mu[task]) / sigma(statistics)[task]


def unnormalize(statistics: Statistics, values: Array, task: Array) -> Array:
    """Undo `normalize`: σ n + μ; all arrays of one shape."""
    return sigma(statistics)[task] * values + statistics.mu[task]


def update(
    statistics: Statistics,
    targets: Array,
    task: Array,
    weight: Array,
    beta: float = 3e-4,
    is_corrected: bool = True,
) -> Statistics:
    """Move the moments of each task towards those of its targets.

        μ ← (1 − β_k) μ + β_k mean(v),   ν ← (1 − β_k) ν + β_k mean(v²),   β_k = β / (1 − (1 − β)^k)

    k counts the updates in which the task had targets. These are the published moving averages, of
    step β from zero, divided by 1 − (1 − β)^k: β_1 = 1, so that μ = 0 and σ = 1 are forgotten.

    The code computes the second, without the difference ν − μ², as

        variance ← (1 − β_k) variance + β_k var(v) + β_k (1 − β_k) (mean(v) − μ)²

    The *means* over a task's targets are used once an update: a step for each target, or their sum,
    diverges at the batches of an actor-learner. A task without targets keeps its moments.

    The moments stay finite under any target: one beyond ±`LARGEST_TARGET` counts as that, and sets
    σ to its upper bound. A larger μ would leave the values, σ n + μ, no digits.

    Args:
      targets: [...], in the units of the rewards.
      task: [...], the task of each.
      weight: [...], 1 or True for targets that count, 0 for others.
      beta: β, the step.
      is_corrected: whether β_k is as above; False for β_k = β, the published moving averages from
        μ = 0 and σ = 1.
    """
    mu, variance, updates = statistics
    task, weight = task.ravel(), weight.astype(jnp.float32).ravel()
    targets = jnp.where(weight > 0, targets.ravel(), 0)
    bounded_targets = jnp.clip(targets, -LARGEST_TARGET, LARGEST_TARGET)

    def sum_weighted(*values: Array) -> tuple[Array, ...]:
        """Sum over each task's targets, on all devices that share the batch."""
        sum_by_task = functools.partial(jax.ops.segment_sum, segment_ids=task, num_segments=len(mu))
        return sum_over_rows(tuple(sum_by_task(weight * value) for value in values))

    # Sums over each task's targets, relative to μ.
    distance = bounded_targets - mu[task]
    is_unbounded = (bounded_targets != targets).astype(jnp.float32)
    sums = sum_weighted(jnp.ones_like(targets), distance, is_unbounded)
    num_targets, distance_sum, num_unbounded = sums
    is_present, divisor = num_targets > 0, jnp.maximum(num_targets, 1)
    updates = updates + is_present
    beta_k = jnp.where(is_present, _correct_beta(beta, updates) if is_corrected else beta, 0)

    # Two passes: in one, the first update would lose the digits of σ where μ is far from 0.
    mean = distance_sum / divisor
    (square_sum,) = sum_weighted((distance - mean[task]) ** 2)
    target_variance = square_sum / divisor
    variance = (1 - beta_k) * variance + beta_k * target_variance + beta_k * (1 - beta_k) * mean**2
    variance = jnp.where(num_unbounded > 0, HIGHEST**2, jnp.minimum(variance, HIGHEST**2))
    return Statistics(mu + beta_k * mean, variance, updates)


def _correct_beta(beta: float, updates: Array) -> Array:
    """Return β_k = β / (1 − (1 − β)^k) for k = `updates`."""
    # −expm1(k log1p(−β)) is 1 − (1 − β)^k with all its digits. The first step is 1 and not nearly:
    # of σ = 1 a rounding error would be more than some tasks' σ.
    correction = -jnp.expm1(jnp.maximum(updates, 1) * jnp.log1p(-jnp.float32(beta)))
    return jnp.where(updates == 1, 1, jnp.minimum(beta / correction, 1))


def rescale(values: Array, task: Array, old: Statistics, new: Statistics) -> Array:
    """Return normalized values in the units of new statistics: (σ n + μ − μ') / σ'."""
    offset = (old.mu - new.mu)[task]
    return (sigma(old)[task] * values + offset) / sigma(new)[task]


def preserve(gain: Array, shift: Array, old: Statistics, new: Statistics) -> tuple[Array, Array]:
    """Return gain and shift of the values' last affine map with which no value changes.

        gain ← gain σ / σ',   shift ← (σ shift + μ − μ') / σ'

    Args:
      gain, shift: [tasks], n = gain · raw + shift in the units of the task.
      old, new: statistics before and after their update.
    """
    old_sigma, new_sigma = sigma(old), sigma(new)
    new_shift = (old_sigma * shift + old.mu - new.mu) / new_sigma
    return gain * old_sigma / new_sigma, new_shift
