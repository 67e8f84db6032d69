"""How far a predicted motion is from the true one, and how well it keeps its energy.

Axes are [time, trajectories, …]. A score above CEILING, or that is not a number, counts as CEILING:
a law without an energy may leave for infinity, and its mean with it.
"""

import jax.numpy as jnp
from jax import Array

CEILING = 100.0


def error(ours: Array, true: Array) -> Array:
    """Squared distance in units of the variance of the true ones: [T, N, features] → [T, N].

    It is 1 on average for a prediction that rests in the middle, 2 for a motion a quarter of a
    period off or of a phase that has nothing to do with the true one, and 4 for the opposite phase.
    """
    apart = jnp.sum(jnp.square(ours - true), -1)
    return ceiled(apart / jnp.sum(jnp.var(true, (0, 1))))


def drift(energies: Array) -> Array:
    """|E(t) − E(0)| in units of the standard deviation of E(0) over trajectories: [T, N], both.

    No unit of energy and no zero of it matters, which a learnt energy may choose as it likes.
    """
    return ceiled(jnp.abs(energies - energies[:1]) / jnp.std(energies[0]))


def valid(error: Array, tolerance: float) -> Array:
    """The share of time before the error reaches the tolerance: [T, N] → [N]."""
    below = jnp.cumprod((error < tolerance).astype(jnp.float32), 0)
    return below.sum(0) / len(error)


def ceiled(values: Array) -> Array:
    return jnp.minimum(jnp.nan_to_num(values, nan=CEILING, posinf=CEILING), CEILING)
