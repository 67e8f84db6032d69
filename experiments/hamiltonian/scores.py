"""Scores of a predicted motion: its distance from the true one, and the drift of its energy.

Axes are [time, trajectories, …]. A score above CEILING or that is not a number counts as CEILING,
as a law without an energy may diverge.
"""

import jax.numpy as jnp
from jax import Array

CEILING = 100.0


def compute_error(predicted: Array, true: Array) -> Array:
    """Return the squared distance in units of the variance of the true ones: [T, N, features] → [T,
    N].

    It is 1 on average for a prediction that rests in the middle, 2 for a motion a quarter of a
    period off or of a phase that has nothing to do with the true one, and 4 for the opposite phase.
    """
    squared_distance = jnp.sum(jnp.square(predicted - true), -1)
    return clip_scores(squared_distance / jnp.sum(jnp.var(true, (0, 1))))


def compute_drift(energies: Array) -> Array:
    """Return |E(t) − E(0)| in units of the standard deviation of E(0) over trajectories: [T, N],
    both.

    The unit and the zero of an energy, which a learned one may choose, do not matter.
    """
    return clip_scores(jnp.abs(energies - energies[:1]) / jnp.std(energies[0]))


def compute_valid_share(error: Array, tolerance: float) -> Array:
    """Return the share of time before the error reaches the tolerance: [T, N] → [N]."""
    is_valid = jnp.cumprod((error < tolerance).astype(jnp.float32), 0)
    return is_valid.sum(0) / len(error)


def clip_scores(values: Array) -> Array:
    return jnp.minimum(jnp.nan_to_num(values, nan=CEILING, posinf=CEILING), CEILING)
