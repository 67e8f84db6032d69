"""Neural processes: the ceiling of their likelihood, the bounds of it, and calibration."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from experiments.neural_process import gp, likelihood, scores, tasks
from experiments.neural_process.likelihood import Gaussian
from tests import prng
from tests.experiments.neural_processes import (
    NOISE,
    draw_points,
    make_functions,
    make_kernel,
    make_problem,
)

# The ceiling.


def make_reference(family, kernel, x):
    """The kernel of scikit-learn, and the inputs it takes."""
    kernels = pytest.importorskip('sklearn.gaussian_process.kernels')
    scale, length, period = (float(value) for value in kernel[1:])
    amplitude = kernels.ConstantKernel(scale**2)
    if family == 'rbf':
        return amplitude * kernels.RBF(length), x[:, None]
    if family == 'periodic':
        return amplitude * kernels.ExpSineSquared(length, period), x[:, None]
    turns = 2 * np.pi * x / period  # a linear function of cosine and sine
    return amplitude * kernels.DotProduct(1e-6), np.stack([np.cos(turns), np.sin(turns)], -1)


@pytest.mark.parametrize('family', tasks.FAMILIES)
def test_the_ceiling_is_the_regression_of_scikit_learn(family):
    process = pytest.importorskip('sklearn.gaussian_process')
    kernel, context, targets = make_kernel(family), draw_points(7, 0, 5), draw_points(6, 1)
    visible = [np.asarray(values[:5], np.float64) for values in context[:2]]
    reference, x = make_reference(family, kernel, visible[0])
    regressor = process.GaussianProcessRegressor(reference, alpha=NOISE**2, optimizer=None)
    regressor.fit(x, visible[1])
    _, x_targets = make_reference(family, kernel, np.asarray(targets.x, np.float64))
    mean, covariance = regressor.predict(x_targets, return_cov=True)
    covariance += NOISE**2 * np.eye(6)
    predictive = jax.jit(gp.predict, static_argnums=1)(kernel, NOISE, context, targets.x)
    np.testing.assert_allclose(predictive.mean, mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(predictive.covariance, covariance, atol=1e-4)
    log_density = gp.compute_log_density(predictive, targets.y)
    expected = stats.multivariate_normal(mean, covariance).logpdf(np.asarray(targets.y, 'd'))
    assert log_density == pytest.approx(expected, rel=5e-3)


def test_without_context_the_ceiling_is_the_prior():
    kernel, context, targets = make_kernel('rbf'), draw_points(3, 0, 0), draw_points(4, 1)
    predictive = gp.predict(kernel, NOISE, context._replace(y=context.y + jnp.nan), targets.x)
    expected = tasks.compute_covariance(kernel, targets.x, targets.x) + NOISE**2 * jnp.eye(4)
    np.testing.assert_allclose(predictive.covariance, expected, atol=1e-6)
    assert not predictive.mean.any()


def test_draws_given_the_context_have_the_mean_and_the_variance_of_the_ceiling():
    kernel, context, targets = make_kernel('rbf'), draw_points(4, 0, 3), draw_points(5, 1)
    draw = jax.vmap(lambda key: gp.draw_posterior(key, kernel, NOISE, context, targets.x))
    samples = np.asarray(jax.jit(draw)(jax.random.split(prng.key(0), 20_000)))
    predictive = gp.predict(kernel, NOISE, context, targets.x)
    expected = predictive.covariance - (NOISE**2 - gp.JITTER**2) * np.eye(5)
    np.testing.assert_allclose(samples.mean(0), predictive.mean, atol=0.04)
    np.testing.assert_allclose(np.cov(samples.T), expected, atol=0.05)


def test_the_ceiling_is_calibrated_and_gains_from_context():
    problem = make_problem(**{'problem.functions': 900})
    functions = make_functions(900)
    score = jax.jit(lambda count: problem.score_gp(functions, count))
    previous = -math.inf
    for count in (0, 2, 6):
        summary = scores.summarize(score(count))
        assert summary['coverage_50'] == pytest.approx(0.5, abs=0.03)
        assert summary['coverage_90'] == pytest.approx(0.9, abs=0.02)
        assert summary['calibration_error'] < 0.02
        assert summary['log_likelihood'] > previous + 0.05
        previous = summary['log_likelihood']
    assert summary['log_likelihood'] > summary['marginal_log_likelihood']  # targets inform targets


# The bounds.


def test_the_elbo_is_that_of_a_case_by_hand():
    """Two features: KL = Σ log(σ_p/σ_q) + (σ_q² + (μ_q − μ_p)²)/2σ_p² − 1/2, and by quadrature."""
    posterior = Gaussian(jnp.array([0.5, -1.0]), jnp.array([0.5, 1.0]))
    prior = Gaussian(jnp.array([0.0, 1.0]), jnp.array([1.0, 2.0]))
    by_hand = (math.log(2) + (0.25 + 0.25) / 2 - 0.5) + (math.log(2) + (1 + 4) / 8 - 0.5)
    by_quadrature = 0.0
    for q_mean, q_std, p_mean, p_std in zip(*posterior, *prior, strict=True):
        q, p = stats.norm(float(q_mean), float(q_std)), stats.norm(float(p_mean), float(p_std))
        by_quadrature += integrate.quad(
            lambda z, q=q, p=p: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), -12, 12
        )[0]
    assert by_hand == pytest.approx(by_quadrature, rel=1e-6)
    elbo = likelihood.compute_elbo(jnp.float32(-3.0), posterior, prior)
    assert elbo == pytest.approx(-3 - by_hand, rel=1e-6)


def draw_linear_gaussian(num_samples, q_mean, q_std, seed=0):
    """Weights of z ~ q for z ~ N(0, 1), y = z + N(0, 0.5²) and y = 1, and log p(y), by hand."""
    q = Gaussian(jnp.full(num_samples, q_mean), jnp.full(num_samples, q_std))
    z = likelihood.draw_gaussian(prng.key(seed), q)
    zeros, ones = jnp.zeros_like(z), jnp.ones_like(z)
    log_density = likelihood.compute_log_density(ones, Gaussian(z, 0.5 * ones))
    log_weights = log_density + likelihood.compute_log_density(z, Gaussian(zeros, ones))
    log_weights -= likelihood.compute_log_density(z, q)
    return log_density, log_weights, stats.norm(0, math.sqrt(1.25)).logpdf(1)


def test_the_importance_weighted_bound_is_exact_with_the_exact_posterior():
    _, log_weights, expected = draw_linear_gaussian(5, 0.8, math.sqrt(0.2))
    assert likelihood.compute_iw_bound(log_weights) == pytest.approx(expected, abs=1e-5)


def test_the_importance_weighted_bound_is_between_the_elbo_and_the_likelihood():
    """With q wider than the posterior, the means of both bounds, by hand and from draws."""
    log_density, log_weights, log_likelihood = draw_linear_gaussian(200_000, 0.3, 1.0)
    posterior, prior = Gaussian(*jnp.array([[0.3], [1.0]])), Gaussian(*jnp.array([[0.0], [1.0]]))
    elbo = likelihood.compute_elbo(log_density, posterior, prior).mean()
    expected = stats.norm(0, 0.5).logpdf(0) - (0.7**2 + 1) / (2 * 0.25) - 0.3**2 / 2
    assert elbo == pytest.approx(expected, abs=0.02)
    bounds = [
        float(likelihood.compute_iw_bound(log_weights.reshape(samples, -1)).mean())
        for samples in (1, 8, 64)
    ]
    assert elbo == pytest.approx(bounds[0], abs=0.02)
    assert elbo < bounds[1] - 0.1 and bounds[1] < bounds[2] - 0.01
    assert bounds[2] < log_likelihood < bounds[2] + 0.05


def test_quantiles_and_coverage_of_a_mixture():
    components = Gaussian(jnp.array([[-2.0], [2.0]]), jnp.array([[0.5], [1.0]]))
    for level in (0.05, 0.3, 0.5, 0.95):
        y = likelihood.compute_mixture_quantile(level, components)
        expected = (stats.norm(-2, 0.5).cdf(y) + stats.norm(2, 1).cdf(y)) / 2
        assert expected[0] == pytest.approx(level, abs=1e-4)
        assert likelihood.compute_mixture_cdf(y, components)[0] == pytest.approx(level, abs=1e-4)
    density = likelihood.compute_mixture_log_density(jnp.array([0.5]), components)[0]
    expected = (stats.norm(-2, 0.5).pdf(0.5) + stats.norm(2, 1).pdf(0.5)) / 2
    assert density == pytest.approx(math.log(expected), rel=1e-5)
    covered = likelihood.compute_covered(jnp.array([0.02, 0.2, 0.5, 0.8]), (0.5, 0.9))
    assert covered.tolist() == [[False, False], [False, True], [True, True], [False, True]]


def test_scores_are_those_of_a_prediction_by_hand():
    """Two functions of two targets, one far outside the central intervals."""
    y = jnp.array([[0.0, 1.0], [2.0, 9.0]])
    components = Gaussian(jnp.zeros((1, 2, 2)), jnp.full((1, 2, 2), 2.0))
    score = scores.score_mixture(y, components, jnp.array([-3.0, -5.0]))
    summary = {name: float(value) for name, value in scores.summarize(score).items()}
    assert summary['log_likelihood'] == -2
    assert summary['mse'] == pytest.approx((0 + 1 + 4 + 81) / 4)
    expected = stats.norm(0, 2).logpdf([0, 1, 2, 9]).mean()
    assert summary['marginal_log_likelihood'] == pytest.approx(expected, rel=1e-5)
    # |y|/σ = 0, 0.5, 1 and 4.5, of levels 0, 0.383, 0.683 and 1.
    assert summary['coverage_50'] == 0.5 and summary['coverage_90'] == 0.75
    coverage = np.array([1, 1, 1, 2, 2, 2, 3, 3, 3]) / 4
    expected = np.abs(coverage - np.array(scores.LEVELS)).mean()
    assert summary['calibration_error'] == pytest.approx(expected, rel=1e-5)
