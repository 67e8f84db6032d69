"""Neural processes: the functions, the models, the sweep, and what they learn."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.neural_process import config as configs
from experiments.neural_process import likelihood, network, tasks
from experiments.neural_process import problem as neural_process
from experiments.neural_process import sweep as experiment
from experiments.neural_process.network import Points
from mi.config import UserError
from mi.fit import factory, train
from mi.report.arms import Arm
from tests import prng
from tests.experiments.neural_processes import (
    ATTENTIVE,
    NOISE,
    SMALL,
    config,
    draw_points,
    init_random,
    make_functions,
    make_kernel,
    make_problem,
)
from tests.fit.runs import finals, records

# The functions.


@pytest.mark.parametrize('family', tasks.FAMILIES)
def test_values_have_the_covariance_of_their_kernel_and_noise(family):
    kernel, x = make_kernel(family), jnp.array([-1.5, -0.2, 0.0, 0.9])
    keys = jax.random.split(prng.key(0), 40_000)
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


@pytest.mark.parametrize(
    'changes',
    [
        {},
        *(pytest.param(c, marks=pytest.mark.slow) for c in ({'model.paths': 'latent'}, ATTENTIVE)),
    ],
)
def test_the_loss_is_the_negative_bound_per_target_of_hidden_points(changes):
    """Recomputed from the model's parts, with the functions, counts and z that the key draws."""
    problem = make_problem(**changes, **{'train.batch': 3})
    params, key = init_random(problem), prng.key(3)
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
    metrics = jax.jit(problem.evaluate)(params, {}, prng.key(0))
    function_key, _ = jax.random.split(prng.key(0))
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
    """With many samples from the prior as the reference, for a decoder that uses z.

    The posterior is far enough from the prior, KL > 2, that the weights of the samples matter.
    """
    changes = {'model.paths': 'latent', 'problem.samples': 2000, 'model.min_std': 0.9}
    problem = make_problem(**changes)
    params = init_random(problem)
    functions = make_functions(6)
    score = jax.jit(problem.score)
    bound = score(params, functions, prng.key(0), 3).log_likelihood
    context, x, y = problem.split(functions, jnp.full(6, 3))
    prior, posterior = problem.infer_both(params, context, x, y)

    def average(gaussian, combine):
        keys = jax.random.split(prng.key(1), 4000)

        def evaluate(key):
            z = likelihood.draw_gaussian(key, gaussian)
            return likelihood.compute_log_density(y, problem.decode(params, None, z, x)).sum(-1)

        return combine(jax.jit(jax.vmap(evaluate))(keys))

    exact = average(prior, likelihood.compute_iw_bound) / 5
    divergence = likelihood.compute_kl(posterior, prior)
    assert divergence.max() > 2
    elbo = (average(posterior, lambda a: a.mean(0)) - divergence) / 5
    np.testing.assert_allclose(bound, exact, atol=0.2)
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


def test_the_figure_names_every_decoder_and_the_ceiling(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        experiment.plots, 'save', lambda figure, out, name: figures.append((name, figure))
    )
    arms = {
        experiment.make_key(arm): arm
        for arm in (make_arm(member, 0.5) for member in experiment.sweep())
    }
    experiment._draw_scores(arms, list(experiment.PATHS), tmp_path)
    ((name, figure),) = figures
    assert name == 'neural_process'
    (legend,) = figure.legends
    expected = [*experiment.DECODERS.values(), experiment.CEILING]
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(expected)
    assert len(figure.axes) == len(experiment.PANELS) * len(experiment.PATHS)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'problem.contexts': (0, 20)}, r'problem\.contexts = \(0, 20\): expected at most .* = 6'),
        ({'problem.functions': 2}, r'problem\.functions = 2: expected at least 3, one for each'),
        ({'problem.scale': (1.0, 0.5)}, r'problem\.scale = .*expected a tuple \(low, high\)'),
        ({'problem.family': 'rbv'}, r"problem\.family = 'rbv': .*did you mean 'rbf'"),
        ({'model.paths': 'latent', 'model.cross_attention': 2}, r"share one z.*paths = 'both'"),
        ({'model.self_attention': 3}, r'self_attention = 3: expected a divisor .*width = 8'),
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
    gain = {'deterministic': 0.2, 'latent': 0.1}[path]  # nats; a latent learns more slowly
    for seed in (0, 1):
        # The prior of a function: that of its values alone, without knowledge of its scale.
        assert likelihoods[8][seed] > likelihoods[0][seed] + gain
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
