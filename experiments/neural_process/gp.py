"""Gaussian-process regression with the true kernel of a function, the ceiling for all models.

Given a context (x, y) and K = k(x, x) + σ²I, the values at x* are Gaussian with

    mean         k(x*, x) K⁻¹ y
    covariance   k(x*, x*) − k(x*, x) K⁻¹ k(x, x*), plus σ²I if the values are noisy

Source: Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, equations 2.22 to 2.24.

Shapes: N context points and T targets of one function.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from chex import Array, PRNGKey
from jax.scipy.linalg import cho_factor, cho_solve

from experiments.neural_process.network import Points
from experiments.neural_process.tasks import Kernel, compute_covariance, draw_values

JITTER = 0.01  # standard deviation that keeps the covariance of smooth functions positive definite


class Predictive(NamedTuple):
    """The predictive distribution of targets, with mean [T] and covariance [T, T]."""

    mean: Array
    covariance: Array


def compute_gain(kernel: Kernel, noise: float, context: Points, x: Array) -> Array:
    """Compute k(x*, x) K⁻¹ [T, N], with zero columns for points that the mask excludes."""
    pairs = context.mask[:, None] & context.mask[None]
    within = jnp.where(pairs, compute_covariance(kernel, context.x, context.x), 0)
    across = jnp.where(context.mask[:, None], compute_covariance(kernel, context.x, x), 0)
    factor = cho_factor(within + noise**2 * jnp.eye(len(context.x)), lower=True)
    gain: Array = cho_solve(factor, across).T
    return gain


def predict(kernel: Kernel, noise: float, context: Points, x: Array) -> Predictive:
    """Compute the predictive distribution of noisy targets at x [T]."""
    gain = compute_gain(kernel, noise, context, x)
    across = compute_covariance(kernel, context.x, x)
    prior = compute_covariance(kernel, x, x) + noise**2 * jnp.eye(len(x))
    return Predictive(gain @ jnp.where(context.mask, context.y, 0), prior - gain @ across)


def compute_log_density(predictive: Predictive, y: Array) -> Array:
    """Compute the joint log-density of all targets y [T]."""
    log_density: Array = jax.scipy.stats.multivariate_normal.logpdf(
        y, predictive.mean, predictive.covariance
    )
    return log_density


def draw_posterior(key: PRNGKey, kernel: Kernel, noise: float, context: Points, x: Array) -> Array:
    """Draw f [T] at x from the posterior, by Matheron's rule.

    A draw from the prior is corrected by its error on the context:
    f(x*) + k(x*, x) K⁻¹ (y − f(x) − noise). This avoids a square root of the posterior covariance,
    which is nearly singular.
    """
    num_context = len(context.x)
    jitter = jnp.full(x.shape, JITTER)
    noises = jnp.concatenate([jnp.full((num_context,), noise), jitter])
    draw = draw_values(key, kernel, jnp.concatenate([context.x, x]), noises)
    gain = compute_gain(kernel, noise, context, x)
    return draw[num_context:] + gain @ jnp.where(context.mask, context.y - draw[:num_context], 0)
