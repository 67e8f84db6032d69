"""Bounds on the likelihood of held-out targets, and the calibration of a predictive distribution.

Shapes: S samples of the latent, T targets, m features of the latent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from chex import Array, PRNGKey
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm


class Gaussian(NamedTuple):
    """Independent Gaussians with means and standard deviations [...]."""

    mean: Array
    std: Array


def draw_gaussian(key: PRNGKey, gaussian: Gaussian) -> Array:
    """Draw from independent Gaussians [...]; gradients pass through the draw."""
    return gaussian.mean + gaussian.std * jax.random.normal(key, gaussian.mean.shape)


def compute_log_density(values: Array, gaussian: Gaussian) -> Array:
    """Return the log-density of each value [...]."""
    log_density: Array = norm.logpdf(values, gaussian.mean, gaussian.std)
    return log_density


def compute_kl(q: Gaussian, p: Gaussian) -> Array:
    """Return KL(q ‖ p) [...] of independent Gaussians [..., m]."""
    ratio = q.std / p.std
    distance = (q.mean - p.mean) / p.std
    return jnp.sum((jnp.square(ratio) + jnp.square(distance) - 1) / 2 - jnp.log(ratio), -1)


def compute_elbo(log_density: Array, posterior: Gaussian, prior: Gaussian) -> Array:
    """Return log p(y | z) − KL(q(z | context, targets) ‖ q(z | context)) [...].

    The bound on the log-likelihood of targets given the context of Garnelo et al. (2018b), equation
    9, with one sample of z.

    Args:
      log_density: [...], of all targets of a function for a z that the posterior drew.
      posterior: q(z | context, targets), [..., m].
      prior: q(z | context), [..., m].
    """
    return log_density - compute_kl(posterior, prior)


def compute_iw_bound(log_weights: Array) -> Array:
    """Return log (1/S) Σ_s w_s [...], the importance-weighted bound of Burda et al. (2016).

    With w_s = p(y | z_s) p(z_s) / q(z_s) and z_s drawn from q, its expectation is at most log p(y),
    at least the ELBO, and grows with S. If q is the exact posterior, it is log p(y).

    Args:
      log_weights: log w_s, [S, ...].
    """
    bound: Array = logsumexp(log_weights, axis=0) - math.log(len(log_weights))
    return bound


def compute_mixture_log_density(y: Array, components: Gaussian) -> Array:
    """Return the log-density of each y [...] in the mixture of S Gaussians [S, ...]."""
    return compute_iw_bound(compute_log_density(y[None], components))


def compute_mixture_cdf(y: Array, components: Gaussian) -> Array:
    """Return the probability of less than y [...] in the mixture of S Gaussians [S, ...]."""
    probability: Array = norm.cdf(y[None], components.mean, components.std).mean(0)
    return probability


def compute_mixture_quantile(level: float, components: Gaussian, num_halvings: int = 30) -> Array:
    """Return the y [...] below which the mixture [S, ...] has this probability, by bisection."""
    reach = norm.ppf(level) * components.std
    low, high = (components.mean + reach).min(0), (components.mean + reach).max(0)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        is_below = compute_mixture_cdf(middle, components) < level
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    low, high = jax.lax.fori_loop(0, num_halvings, halve, (low, high))
    return (low + high) / 2


def compute_covered(cdf: Array, levels: Sequence[float]) -> Array:
    """Return whether central intervals of the levels [L] contain y, [..., L], given its CDF [...].

    The share of targets in them is their coverage; that of a calibrated prediction is the level.
    """
    level_row = jnp.asarray(levels).reshape((1,) * cdf.ndim + (-1,))
    return 2 * jnp.abs(cdf[..., None] - 0.5) <= level_row
