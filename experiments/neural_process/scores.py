"""Scores of predictions by likelihood, error and calibration.

Shapes: F functions, T targets, S samples; y [F, T].
"""

from typing import NamedTuple

import jax.numpy as jnp
from chex import Array

from experiments.neural_process import likelihood
from experiments.neural_process.likelihood import Gaussian
from mi.fit.problem import Metrics

LEVELS = tuple(tenths / 10 for tenths in range(1, 10))  # of central intervals
REPORTED_LEVELS = {'coverage_50': 0.5, 'coverage_90': 0.9}


class Scores(NamedTuple):
    """Scores of each function, [..., F], and coverage of its intervals, [..., F, LEVELS]."""

    log_likelihood: Array
    marginal_log_likelihood: Array
    mse: Array
    coverage: Array


def score_mixture(y: Array, components: Gaussian, log_density: Array) -> Scores:
    """Score a mixture of S Gaussians [S, F, T] on targets y [F, T].

    Args:
      y: targets [F, T].
      components: Gaussians of the mixture, with equal weights.
      log_density: joint log-density of each function's targets [F], or a bound on it.
    """
    marginal = likelihood.compute_mixture_log_density(y, components)
    error = jnp.square(components.mean.mean(0) - y)
    covered = likelihood.compute_covered(likelihood.compute_mixture_cdf(y, components), LEVELS)
    return Scores(
        log_likelihood=log_density / y.shape[-1],
        marginal_log_likelihood=marginal.mean(-1),
        mse=error.mean(-1),
        coverage=covered.mean(-2),
    )


def summarize(scores: Scores) -> Metrics:
    """Average scores over all axes except the levels."""
    coverage = scores.coverage.reshape(-1, len(LEVELS)).mean(0)
    metrics = {name: getattr(scores, name).mean() for name in Scores._fields if name != 'coverage'}
    metrics |= {name: coverage[LEVELS.index(level)] for name, level in REPORTED_LEVELS.items()}
    return metrics | {'calibration_error': jnp.abs(coverage - jnp.array(LEVELS)).mean()}
