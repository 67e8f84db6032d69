"""PopArt, which normalizes the targets of each task so that values are learned on a common scale.

Sources: van Hasselt et al., Learning values across many orders of magnitude, 2016; for many tasks,
Hessel et al., Multi-task Deep Reinforcement Learning with PopArt, 2019. All functions are pure. A
value v of a task is represented as n in units of the task, with v = σ n + μ.

Unlike in the papers, `update` can correct the initial bias of the moments as Adam does (Kingma and
Ba, 2015). Without the correction, the initial units last for thousands of updates at β = 3e-4.
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
    """Mean and variance of each task's targets.

    The papers store the second moment ν and compute the variance as ν − μ². Here the variance
    itself is stored, because f32 loses this difference where μ is several hundred times σ.

    Attributes:
      mu, variance: mean and variance, f32 [tasks].
      updates: number of updates in which the task had targets, int32 [tasks].
    """

    mu: Array
    variance: Array
    updates: Array


def init(num_tasks: int) -> Statistics:
    """Return μ = 0 and σ = 1, which the first targets replace if `update` corrects the bias."""
    return Statistics(jnp.zeros(num_tasks), jnp.ones(num_tasks), jnp.zeros(num_tasks, jnp.int32))


def sigma(statistics: Statistics) -> Array:
    """Return the standard deviation σ [tasks], clipped to [1e-4, 1e6]."""
    return jnp.sqrt(jnp.clip(statistics.variance, LOWEST**2, HIGHEST**2))


def normalize(statistics: Statistics, values: Array, task: Array) -> Array:
    """Convert values v to the units of their tasks, n = (v − μ) / σ. `task` has the same shape."""
    return (values - statistics.mu[task]) / sigma(statistics)[task]


def unnormalize(statistics: Statistics, values: Array, task: Array) -> Array:
    """Convert normalized values n back, v = σ n + μ. `task` has the same shape."""
    return sigma(statistics)[task] * values + statistics.mu[task]


def update(
    statistics: Statistics,
    targets: Array,
    task: Array,
    weight: Array,
    beta: float = 3e-4,
    is_corrected: bool = True,
) -> Statistics:
    """Move the moments of each task towards the moments of its targets.

        μ ← (1 − β_k) μ + β_k mean(v),   ν ← (1 − β_k) ν + β_k mean(v²),   β_k = β / (1 − (1 − β)^k)

    k is the number of updates in which the task had targets. This equals the published moving
    averages with step size β, started from zero and divided by 1 − (1 − β)^k. Since β_1 = 1, the
    initial μ = 0 and σ = 1 are forgotten.

    To avoid the difference ν − μ², the code updates the variance instead of ν:

        variance ← (1 − β_k) variance + β_k var(v) + β_k (1 − β_k) (mean(v) − μ)²

    Each update makes one step with the *mean* over a task's targets. A step for each target, or
    with their sum, diverges at the batch sizes of an actor-learner. A task without targets keeps
    its moments.

    The moments stay finite for any target. A target beyond ±`LARGEST_TARGET` is clipped and sets σ
    to its upper bound. With a larger μ, the values σ n + μ would have no digits left.

    Args:
      targets: targets [...], in the units of the rewards.
      task: task of each target, [...].
      weight: 1 or True for targets that count, 0 for others, [...].
      beta: step size β.
      is_corrected: whether β_k is as above. Otherwise β_k = β, which gives the published moving
        averages, started from μ = 0 and σ = 1.
    """
    mu, variance, updates = statistics
    task, weight = task.ravel(), weight.astype(jnp.float32).ravel()
    targets = jnp.where(weight > 0, targets.ravel(), 0)
    bounded_targets = jnp.clip(targets, -LARGEST_TARGET, LARGEST_TARGET)

    def sum_weighted(*values: Array) -> tuple[Array, ...]:
        """Sum over the targets of each task, on all devices that share the batch."""
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
    """Convert normalized values n to the units of new statistics, (σ n + μ − μ') / σ'."""
    offset = (old.mu - new.mu)[task]
    return (sigma(old)[task] * values + offset) / sigma(new)[task]


def preserve(gain: Array, shift: Array, old: Statistics, new: Statistics) -> tuple[Array, Array]:
    """Return the gain and the shift that preserve every value under the new statistics.

        gain ← gain σ / σ',   shift ← (σ shift + μ − μ') / σ'

    Args:
      gain, shift: parameters of the last affine map of the values, n = gain · raw + shift, [tasks].
      old, new: statistics before and after the update.
    """
    old_sigma, new_sigma = sigma(old), sigma(new)
    new_shift = (old_sigma * shift + old.mu - new.mu) / new_sigma
    return gain * old_sigma / new_sigma, new_shift
