"""Scores of a predicted motion: its distance from the true motion, and the drift of its energy.

Axes are [time, trajectories, …]. Scores that are above CEILING or not finite become CEILING,
because a law without an energy may diverge.
"""

import jax.numpy as jnp
from jax import Array

CEILING = 100.0


def compute_error(predicted: Array, true: Array) -> Array:
    """Compute squared distances in units of the true variance: [T, N, features] → [T, N].

    The mean is 1 for a prediction that rests at the center, 2 for a motion that is a quarter of a
    period off or has an independent phase, and 4 for a motion with the opposite phase.
    """
    squared_distance = jnp.sum(jnp.square(predicted - true), -1)
    return clip_scores(squared_distance / jnp.sum(jnp.var(true, (0, 1))))


def compute_drift(energies: Array) -> Array:
    """Compute |E(t) − E(0)| [T, N] in units of the standard deviation of E(0) over trajectories.

    The result does not depend on the unit and the zero of the energy, which are arbitrary if the
    energy is learned.
    """
    return clip_scores(jnp.abs(energies - energies[:1]) / jnp.std(energies[0]))


def compute_valid_share(error: Array, tolerance: float) -> Array:
    """Compute the fraction of time before the error reaches the tolerance: [T, N] → [N]."""
    is_valid = jnp.cumprod((error < tolerance).astype(jnp.float32), 0)
    return is_valid.sum(0) / len(error)


def clip_scores(values: Array) -> Array:
    return jnp.minimum(jnp.nan_to_num(values, nan=CEILING, posinf=CEILING), CEILING)
