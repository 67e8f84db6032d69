"""Bounds on the likelihood of held-out targets, and calibration of predictive distributions.

Shapes: S samples of the latent, T targets, m latent features.
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
    """Draw from independent Gaussians [...], with gradients through the draw."""
    return gaussian.mean + gaussian.std * jax.random.normal(key, gaussian.mean.shape)


def compute_log_density(values: Array, gaussian: Gaussian) -> Array:
    """Compute the log-density of each value [...]."""
    log_density: Array = norm.logpdf(values, gaussian.mean, gaussian.std)
    return log_density


def compute_kl(q: Gaussian, p: Gaussian) -> Array:
    """Compute KL(q ‖ p) [...] between independent Gaussians [..., m]."""
    ratio = q.std / p.std
    distance = (q.mean - p.mean) / p.std
    return jnp.sum((jnp.square(ratio) + jnp.square(distance) - 1) / 2 - jnp.log(ratio), -1)


def compute_elbo(log_density: Array, posterior: Gaussian, prior: Gaussian) -> Array:
    """Compute the evidence lower bound log p(y | z) − KL(posterior ‖ prior) [...].

    This bounds the log-likelihood of the targets given the context, with one sample of z (Garnelo
    et al., 2018b, equation 9).

    Args:
      log_density: log p(y | z) of all targets of a function, [...], for z from the posterior.
      posterior: q(z | context, targets), [..., m].
      prior: q(z | context), [..., m].
    """
    return log_density - compute_kl(posterior, prior)


def compute_iw_bound(log_weights: Array) -> Array:
    """Compute the importance-weighted bound log (1/S) Σ_s w_s [...] (Burda et al., 2016).

    Here w_s = p(y | z_s) p(z_s) / q(z_s), and z_s is drawn from q. The expectation of the bound is
    at most log p(y), at least the ELBO, and grows with S. If q is the exact posterior, the bound
    equals log p(y).

    Args:
      log_weights: log w_s, [S, ...].
    """
    bound: Array = logsumexp(log_weights, axis=0) - math.log(len(log_weights))
    return bound


def compute_mixture_log_density(y: Array, components: Gaussian) -> Array:
    """Compute the log-density of each y [...] under a mixture of S Gaussians [S, ...]."""
    return compute_iw_bound(compute_log_density(y[None], components))


def compute_mixture_cdf(y: Array, components: Gaussian) -> Array:
    """Compute the cumulative probability at y [...] under a mixture of S Gaussians [S, ...]."""
    probability: Array = norm.cdf(y[None], components.mean, components.std).mean(0)
    return probability


def compute_mixture_quantile(level: float, components: Gaussian, num_halvings: int = 30) -> Array:
    """Compute a quantile [...] of a mixture of S Gaussians [S, ...], by bisection."""
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
    """Return whether the central intervals of levels [L] contain y, [..., L], given the CDF at y.

    The coverage of an interval is the fraction of targets that it contains. For a calibrated
    prediction, the coverage equals the level.
    """
    level_row = jnp.asarray(levels).reshape((1,) * cdf.ndim + (-1,))
    return 2 * jnp.abs(cdf[..., None] - 0.5) <= level_row
