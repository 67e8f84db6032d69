"""Neural processes: the functions, the ceiling, the bounds, the models, and what they learn."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from experiments.neural_process import config as configs
from experiments.neural_process import gp, likelihood, network, scores, tasks
from experiments.neural_process import problem as neural_process
from experiments.neural_process import sweep as experiment
from experiments.neural_process.likelihood import Gaussian
from experiments.neural_process.network import Points
from mi.config import UserError
from mi.fit import factory, train
from mi.report.arms import Arm
from tests.fit.runs import edited, finals, records

SMALL = {
    'problem.max_context': 6, 'problem.targets': 5, 'problem.functions': 12,
    'problem.contexts': (0, 2, 6), 'problem.samples': 4, 'model.parameters': 0, 'model.width': 6,
    'model.features': 4, 'model.encoder_width': 8, 'model.encoder_depth': 1,
}  # fmt: skip
ATTENTIVE = {'model.paths': 'both', 'model.self_attention': 2, 'model.cross_attention': 4}
NOISE = 0.1


def config(**changes):
    return edited(configs.get_config(), **changes)


def make_problem(**changes):
    return neural_process.make(config(**(SMALL | changes)))


def init_random(problem, seed=0):
    """Parameters of which none is zero, so that every part shows in the output."""
    shapes = jax.eval_shape(problem.init_params, jax.random.key(0), {})
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), 'f'), shapes)


def make_kernel(family, scale=1.3, length=0.6, period=1.7):
    values = tasks.FAMILIES.index(family), scale, length, period
    return tasks.Kernel(*map(jnp.asarray, values))


def draw_points(num_points, seed=0, num_visible=None):
    x, y = np.random.default_rng(seed).uniform(-2, 2, (2, num_points)).astype('f')
    mask = np.arange(num_points) < (num_points if num_visible is None else num_visible)
    return Points(*map(jnp.asarray, (x, y, mask)))


# The functions.


@pytest.mark.parametrize('family', tasks.FAMILIES)
def test_values_have_the_covariance_of_their_kernel_and_noise(family):
    kernel, x = make_kernel(family), jnp.array([-1.5, -0.2, 0.0, 0.9])
    keys = jax.random.split(jax.random.key(0), 40_000)
    draw = jax.jit(jax.vmap(lambda key: tasks.draw_values(key, kernel, x, jnp.full(4, 0.5))))
    y = np.asarray(draw(keys), np.float64)
    d = np.subtract.outer(*[np.asarray(x, np.float64)] * 2)
    correlation = {
        'rbf': np.exp(-(d**2) / (2 * 0.6**2)),
        'periodic': np.exp(-2 * np.sin(np.pi * d / 1.7) ** 2 / 0.6**2),
        'sinusoid': np.cos(2 * np.pi * d / 1.7),
    }[family]
    np.testing.assert_allclose(np.cov(y.T), 1.69 * correlation + 0.25 * np.eye(4), atol=0.06)
    np.testing.assert_allclose(y.mean(0), 0, atol=0.03)


def test_functions_are_of_the_families_by_turns_with_parameters_in_their_intervals():
    functions = make_functions(600, **{'problem.scale': (0.5, 1.5)})
    assert functions.kernel.family[:6].tolist() == [0, 1, 2, 0, 1, 2]
    problem = configs.get_config().problem
    is_periodic = np.asarray(functions.kernel.family) == 1
    intervals = {
        (0.5, 1.5): functions.kernel.scale,
        problem.length: functions.kernel.length[~is_periodic],
        problem.periodic_length: functions.kernel.length[is_periodic],
        problem.period: functions.kernel.period,
    }
    for (low, high), drawn in intervals.items():
        assert low <= drawn.min() < low + 0.05 * (high - low)
        assert high >= drawn.max() > high - 0.05 * (high - low)
    assert -2 <= functions.x.min() < -1.99 and 1.99 < functions.x.max() <= 2


def make_functions(num_functions, **changes):
    distribution = neural_process.make(config(**(SMALL | changes))).distribution
    draw = jax.jit(tasks.draw_functions, static_argnums=(1, 2, 3))
    return draw(jax.random.key(1), distribution, num_functions, 11)


def test_a_sinusoid_is_a_sinusoid():
    """Least squares on cos(2πx/p) and sin(2πx/p) leaves the noise, and nothing of a rbf."""
    for family, expected in (('sinusoid', NOISE**2), ('rbf', None)):
        changes = {'problem.family': family}
        functions = make_functions(50, **changes)
        residuals = []
        for x, y, period in zip(functions.x, functions.y, functions.kernel.period, strict=True):
            turns = 2 * np.pi * np.asarray(x) / float(period)
            rows = np.stack([np.cos(turns), np.sin(turns)], -1)
            fit, *_ = np.linalg.lstsq(rows, np.asarray(y), rcond=None)
            residuals.append(np.sum((rows @ fit - y) ** 2) / (11 - 2))
        if expected:
            assert np.mean(residuals) == pytest.approx(expected, rel=0.2)
        else:
            assert np.mean(residuals) > 5 * NOISE**2


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
    samples = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000)))
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
    z = likelihood.draw_gaussian(jax.random.key(seed), q)
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


# The models.


@pytest.mark.parametrize(
    'changes',
    [{}, {'model.paths': 'latent'}, ATTENTIVE, {'model.cross_attention': 2}],
    ids=['deterministic', 'latent', 'attentive', 'cross_attention'],
)
@pytest.mark.parametrize('count', [0, 3])
def test_order_and_padding_of_the_context_change_nothing(changes, count):
    problem = make_problem(**changes)
    params = init_random(problem)
    context, targets = draw_points(6, 0, count), draw_points(5, 1).x
    epsilon = jnp.linspace(-1, 1, 4)
    apply = jax.jit(problem.model.apply)
    prediction = apply(params, *context, targets, epsilon)
    # Other padding, less of it, and another order.
    padding = ~context.mask
    others = [Points(context.x + 9 * padding, jnp.where(padding, jnp.nan, context.y), context.mask)]
    others += [Points(*(values[::-1] for values in context))]
    others += [Points(*(values[: max(count, 1)] for values in context))]
    for other in others:
        other_prediction = apply(params, *other, targets, epsilon)
        np.testing.assert_allclose(prediction.mean, other_prediction.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(prediction.std, other_prediction.std, rtol=1e-4, atol=1e-5)
    # Visible points are used, and so are the targets, each alone.
    moved = apply(params, context.x, context.y.at[0].add(1.0), context.mask, targets, epsilon)
    assert (np.abs(moved.mean - prediction.mean).max() > 1e-3) == bool(count)
    moved = apply(params, *context, targets.at[0].add(0.5), epsilon)
    is_equal = np.isclose(moved.mean, prediction.mean, atol=1e-6)
    assert is_equal.tolist() == [False, True, True, True, True]


def test_the_aggregation_is_the_mean_of_the_visible_points():
    rows = jnp.array([[1.0, 2.0], [3.0, 6.0], [jnp.nan, jnp.inf]])
    mask = jnp.array([True, True, False])
    assert network.average_points(rows, mask).tolist() == [2, 4]
    assert network.average_points(rows, mask & False).tolist() == [0, 0]


def test_a_conditional_neural_process_is_its_equation():
    """r = mean_i h(x_i, y_i), and the decoder is two maps of [x; r], by NumPy."""
    problem = make_problem(
        **{'model.fusion.name': 'concat', 'model.site': 'first', 'model.depth': 1}
    )
    params = init_random(problem)
    context, targets = draw_points(6, 0, 4), draw_points(5, 1).x
    prediction = problem.model.apply(params, *context, targets, jnp.zeros(4))
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params['params'])
    hidden = np.stack([context.x[:4], context.y[:4]], -1)
    dense = weights['encoder']['mlp']['Dense_0']
    hidden = np.maximum(hidden @ dense['kernel'] + dense['bias'], 0)
    dense = weights['encoder']['out']
    r = (hidden @ dense['kernel'] + dense['bias']).mean(0)
    first, last = weights['decoder']['fusion_0'], weights['decoder']['affine_1']
    hidden = np.asarray(targets)[:, None] @ first['V'] + r @ first['U'] + first['b']
    mean, raw = (np.maximum(hidden, 0) @ last['kernel'] + last['bias']).T
    np.testing.assert_allclose(prediction.mean, mean, rtol=1e-4, atol=1e-5)
    expected = 0.05 + 0.95 * np.log1p(np.exp(raw))
    np.testing.assert_allclose(prediction.std, expected, rtol=1e-4)


@pytest.mark.parametrize('changes', [{}, {'model.paths': 'latent'}, ATTENTIVE])
def test_the_loss_is_the_negative_bound_per_target_of_hidden_points(changes):
    """Recomputed from the model's parts, with the functions, counts and z that the key draws."""
    problem = make_problem(**changes, **{'train.batch': 3})
    params, key = init_random(problem), jax.random.key(3)
    loss, metrics = jax.jit(problem.loss)(params, {}, key)
    function_key, count_key, z_key = jax.random.split(key, 3)
    functions = tasks.draw_functions(function_key, problem.distribution, 3, 11)
    counts = jax.random.randint(count_key, (3,), 0, 7)
    noise = jax.random.normal(z_key, (3, 4))
    bounds, errors, kls = [], [], []
    for x, y, count, epsilon in zip(functions.x, functions.y, counts, noise, strict=True):
        context = Points(x[:6], y[:6], jnp.arange(6) < count)
        visible = [jnp.concatenate([values[:count], values[6:]]) for values in (x, y)]
        everything = Points(*visible, jnp.ones(5 + int(count), bool))
        z, kl = None, 0.0
        if problem.has_latent:
            prior, posterior = problem.infer(params, context), problem.infer(params, everything)
            z = posterior.mean + posterior.std * epsilon
            ratio = np.square(posterior.std / prior.std)
            distance = np.square((posterior.mean - prior.mean) / prior.std)
            kl = float(np.sum(ratio + distance - 1 - np.log(ratio)) / 2)
        r = problem.represent(params, context, x[6:])
        prediction = problem.decode(params, r, z, x[6:])
        log_density = stats.norm(prediction.mean, prediction.std).logpdf(y[6:]).sum()
        bounds.append(log_density - kl)
        errors.append(np.mean(np.square(prediction.mean - y[6:])))
        kls.append(kl / 5)
    assert loss == pytest.approx(-np.mean(bounds) / 5, rel=1e-3)
    assert metrics['mse'] == pytest.approx(np.mean(errors), rel=1e-3)
    if problem.has_latent:
        assert metrics['kl'] == pytest.approx(np.mean(kls), rel=1e-3)


def test_a_latent_that_is_ignored_has_the_scores_of_its_prediction():
    """With zeros for parameters z changes nothing, so that all bounds are the likelihood itself."""
    problem = make_problem(**{'model.paths': 'latent'})
    params = jax.tree.map(jnp.zeros_like, init_random(problem))
    metrics = jax.jit(problem.evaluate)(params, {}, jax.random.key(0))
    function_key, _ = jax.random.split(jax.random.key(0))
    functions = tasks.draw_functions(function_key, problem.distribution, 12, 11)
    std = 0.05 + 0.95 * math.log(2)
    for split, first, stride in (('eval', 0, 1), ('rbf', 0, 3), ('sinusoid', 2, 3)):
        y = np.asarray(functions.y[first::stride, 6:], np.float64)
        expected = stats.norm(0, std).logpdf(y).mean()
        for name in ('log_likelihood', 'marginal_log_likelihood'):
            assert metrics[split][name] == pytest.approx(expected, rel=1e-4)
        assert metrics[split]['mse'] == pytest.approx(np.mean(y**2), rel=1e-4)
    assert metrics['contexts']['mse/0'] == metrics['contexts']['mse/6']
    assert metrics['gp_eval']['log_likelihood'] > metrics['eval']['log_likelihood']
    ceiling = [metrics['gp_contexts'][f'log_likelihood/{count}'] for count in (0, 2, 6)]
    assert ceiling[0] < ceiling[1] < ceiling[2]


def test_the_bound_of_an_evaluation_is_below_the_likelihood_and_above_the_elbo():
    """With many samples from the prior as the reference, for a decoder that uses z."""
    changes = {'model.paths': 'latent', 'problem.samples': 400, 'model.min_std': 0.9}
    problem = make_problem(**changes)
    params = jax.tree.map(lambda leaf: 0.6 * leaf, init_random(problem))
    functions = make_functions(6)
    score = jax.jit(problem.score)
    bound = score(params, functions, jax.random.key(0), 3).log_likelihood
    context, x, y = problem.split(functions, jnp.full(6, 3))
    prior, posterior = problem.infer_both(params, context, x, y)

    def average(gaussian, combine):
        keys = jax.random.split(jax.random.key(1), 4000)

        def evaluate(key):
            z = likelihood.draw_gaussian(key, gaussian)
            return likelihood.compute_log_density(y, problem.decode(params, None, z, x)).sum(-1)

        return combine(jax.jit(jax.vmap(evaluate))(keys))

    exact = average(prior, likelihood.compute_iw_bound) / 5
    elbo = (average(posterior, lambda a: a.mean(0)) - likelihood.compute_kl(posterior, prior)) / 5
    np.testing.assert_allclose(bound, exact, atol=0.1)
    assert (elbo < bound - 0.01).all()


@pytest.mark.slow
@pytest.mark.parametrize('preset', configs.PRESETS)
def test_every_preset_counts_its_parameters(preset):
    problem = factory.make_problem(configs.get_config(preset))
    num_params = factory.count_parameters(problem)
    assert num_params == problem.costs()['parameters']['model']
    assert num_params == pytest.approx(configs.get_config(preset).model.parameters, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize('path', experiment.PATHS)
def test_all_decoders_of_the_sweep_have_the_same_size(path):
    members = experiment.sweep()
    assert len(members) == len(experiment.PATHS) * len(experiment.DECODERS)
    sizes = []
    for overrides in members:
        if overrides['model.paths'] == path:
            problem = factory.make_problem(config(**overrides))
            sizes.append(factory.count_parameters(problem))
            assert sizes[-1] == problem.costs()['parameters']['model']
    assert len(sizes) == len(experiment.DECODERS)
    assert max(sizes) < 1.03 * min(sizes)
    assert np.mean(sizes) == pytest.approx(experiment.PARAMETERS[path], rel=0.02)


def make_arm(overrides, level):
    """An arm whose likelihood is its level, with the same spread over seeds for every arm."""
    names = ('log_likelihood', 'mse', 'marginal_log_likelihood', 'calibration_error')
    names += ('coverage_50', 'coverage_90')
    metrics = []
    for seed in range(10):
        for split in ('eval', 'contexts', *experiment.FAMILIES):
            for prefix, offset in (('', level), ('gp_', 1.0)):
                full_names = [f'{name}/{count}' for name in names for count in (0, 2)]
                full_names = full_names if split == 'contexts' else names
                values = dict.fromkeys(full_names, offset + seed / 100)
                metrics.append({'step': 1, 'seed': seed, 'split': prefix + split} | values)
    cost = {'parameters': {'model': 30_000}}
    return Arm('label', 'done', None, tuple(range(10)), overrides, cost=cost, metrics=metrics)


def test_the_report_tabulates_differences_paired_by_seed_beside_the_ceiling():
    all_arms = [make_arm(member, index / 10) for index, member in enumerate(experiment.sweep())]
    arms = {experiment.make_key(arm): arm for arm in all_arms}
    assert len(arms) == len(all_arms)
    sections = experiment.tabulate_path(arms, 'latent')
    assert [section.count('\n| ') for section in sections] == [2 + len(experiment.DECODERS) + 1] * 4
    lines = {line.split(' | ')[0]: line for line in sections[0].splitlines()}
    # Differences of 0.2 and 0.1 in every seed: p = 2/2¹⁰, times four tests.
    mi_line = lines['| MI at every layer'].split(' | ')
    assert mi_line[1:] == [
        '30,000', '0.745 [0.727, 0.763]', '0.200 [0.200, 0.200]', '0.100 [0.100, 0.100]', '0.008 |'
    ]  # fmt: skip
    assert '1.04' in lines[f'| {experiment.CEILING}'] or '1.05' in lines[f'| {experiment.CEILING}']
    assert '1.0' in sections[3].splitlines()[-1] and experiment.CEILING in sections[3]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'problem.contexts': (0, 20)}, r'problem\.contexts = \(0, 20\): expected at most .* = 6'),
        ({'problem.functions': 2}, r'problem\.functions = 2: expected at least 3, one of each'),
        ({'problem.scale': (1.0, 0.5)}, r'problem\.scale = .*expected a tuple \(low, high\)'),
        ({'problem.family': 'rbv'}, r"problem\.family = 'rbv': .*did you mean 'rbf'"),
        ({'model.paths': 'latent', 'model.cross_attention': 2}, r"one z for all .*paths = 'both'"),
        ({'model.self_attention': 3}, r'self_attention = 3: expected a divisor of .*width = 8'),
        ({'model.fusion.name': 'multi_head'}, r"'multi_head': expected a fusion for dense"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(config(**(SMALL | changes)), str(tmp_path / 'run'))


# What they learn.

TOY = {
    'problem.max_context': 8, 'problem.targets': 12, 'problem.functions': 60,
    'problem.contexts': (0, 2, 8), 'problem.samples': 16, 'model.parameters': 4000,
    'model.features': 16, 'model.encoder_width': 24, 'seeds': (0, 1), 'train.steps': 1500,
    'train.log_every': 500, 'train.eval_every': 1500, 'train.save_every': 1500, 'train.batch': 16,
    'optim.learning_rate': 5e-3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('path', ['deterministic', 'latent'])
def test_more_context_gives_a_higher_likelihood_and_less_error(path, tmp_path):
    train.train(config(**(TOY | {'model.paths': path})), str(tmp_path))
    likelihoods, errors = (
        {count: finals(tmp_path, f'{name}/{count}', 'contexts') for count in (0, 2, 8)}
        for name in ('log_likelihood', 'mse')
    )
    ceiling = finals(tmp_path, 'log_likelihood/8', 'gp_contexts')
    for seed in (0, 1):
        # The prior of a function: that of its values alone, without knowledge of its scale.
        assert likelihoods[8][seed] > likelihoods[0][seed] + 0.2
        assert likelihoods[8][seed] > likelihoods[2][seed] > likelihoods[0][seed]
        assert errors[8][seed] < errors[2][seed] < errors[0][seed]
        assert likelihoods[8][seed] < ceiling[seed]
        assert finals(tmp_path, 'coverage_90', 'eval')[seed] == pytest.approx(0.9, abs=0.08)
    cost = json.loads((tmp_path / 'cost.json').read_text())
    assert cost['parameters']['model'] == pytest.approx(4000, rel=0.06)
    arrays = np.load(tmp_path / 'artefacts.npz')
    assert arrays['mean'].shape == arrays['gp_mean'].shape == (2, 3, neural_process.GRID_SIZE)
    assert all(np.isfinite(arrays[name]).all() for name in arrays.files)
    inside = (arrays['gp_low'] < arrays['f']) & (arrays['f'] < arrays['gp_high'])
    assert inside.mean() > 0.8
    assert len(records(tmp_path, 'train')) == 6
