import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import DiagonalMultiplicativeInteraction
from mi.layers import Affine
from mi.motifs.normalization import (
    AdaLNZero,
    ConditionalBatchNorm,
    ConditionalLayerNorm,
    FeatureWiseModulation,
)
from tests import prng
from tests.motifs.checks import compose, is_its_composition, random

N, M = 5, 3
X, Z = 2 * random(0, 2, 3, 4, N) + 1, random(1, 2, 1, 1, M)  # images, one context each
MASK = random(2, 2, 3, 4) > -0.5
KEY = prng.key(3)


def numpy(tree):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), tree)


def parameters(module, *inputs):
    """Uniform in place of the initial values: none is zero, no variance is negative."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    draw = np.random.default_rng(0).uniform
    return jax.tree.map(lambda p: jnp.asarray(draw(0.2, 1, p.shape), p.dtype), shapes)


def same(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def modulated(p, x, z):
    """(1 + γ(z)) ⊙ x + β(z), entry by entry."""
    y = np.zeros(x.shape)
    z = np.broadcast_to(z, (*x.shape[:-1], z.shape[-1]))
    for i in np.ndindex(x.shape):
        z_i, k = z[i[:-1]], i[-1]
        gamma = z_i @ p['gamma']['V'][:, k] + p['gamma']['b'][k]
        beta = z_i @ p['beta']['V'][:, k] + p['beta']['b'][k]
        y[i] = (1 + gamma) * x[i] + beta
    return y


def over_features(x, epsilon):
    """Every position normalized on its own."""
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape[:-1]):
        y[i] = (x[i] - x[i].mean()) / np.sqrt(x[i].var() + epsilon)
    return y


@pytest.mark.parametrize(
    ('x', 'z'),
    [(X[0, 0, 0], Z[0, 0, 0]), (X[:, 0, 0], Z[:, 0, 0]), (X, Z), (X, Z[0, 0, 0])],
    ids=['[n]', '[B, n]', '[B, H, W, n]', 'one context for all'],
)
def test_modulation_is_its_equation_at_any_rank(x, z):
    module = FeatureWiseModulation()
    variables = parameters(module, x, z)
    expected = modulated(numpy(variables['params']), np.asarray(x), np.asarray(z))
    same(module.apply(variables, x, z), expected)
    is_its_composition(module, variables, x, z)


def test_modulation_is_the_diagonal_form_with_one_added_to_V():
    variables = parameters(FeatureWiseModulation(), X, Z)
    gamma, beta = variables['params']['gamma'], variables['params']['beta']
    diagonal = {'W': gamma['V'], 'V': 1 + gamma['b'], 'U': beta['V'], 'b': beta['b']}
    same(
        FeatureWiseModulation().apply(variables, X, Z),
        DiagonalMultiplicativeInteraction().apply({'params': diagonal}, X, Z),
    )
    W, U, V, b = compose(FeatureWiseModulation(), variables, X, Z)
    same(jnp.einsum('mnn->mn', W), gamma['V'])
    same(V, jnp.diag(1 + gamma['b']))
    same(U, beta['V'])
    same(b, beta['b'])


def test_the_conditional_layer_norm_is_its_equation():
    module = ConditionalLayerNorm(epsilon=0.1)
    variables = parameters(module, X, Z)
    p = numpy(variables['params']['modulation'])
    expected = modulated(p, over_features(np.asarray(X), 0.1), np.asarray(Z))
    same(module.apply(variables, X, Z), expected)
    is_its_composition(module, variables, X, Z)


def test_layer_norm_holds_far_from_zero():
    module = ConditionalLayerNorm()
    variables = module.init(KEY, X, Z)
    x = jnp.round(X * 64) / 64  # so that 4096 is added exactly
    same(module.apply(variables, x + 4096, Z), module.apply(variables, x, Z), 1e-3)


def statistics(x, mask):
    rows = np.asarray(x, np.float64)[np.asarray(mask)]
    return rows.mean(0), rows.var(0)


@pytest.mark.parametrize('mask', [None, MASK], ids=['all', 'masked'])
def test_in_training_the_conditional_batch_norm_is_its_equation(mask):
    module = ConditionalBatchNorm(use_running_average=False, momentum=0.8, epsilon=0.1)
    variables = parameters(module, X, Z)
    y, new_stats = module.apply(variables, X, Z, mask=mask, mutable='batch_stats')

    mean, variance = statistics(X, np.ones(X.shape[:-1], bool) if mask is None else mask)
    normalized = (np.asarray(X) - mean) / np.sqrt(variance + 0.1)
    same(y, modulated(numpy(variables['params']['modulation']), normalized, np.asarray(Z)))
    old_stats = numpy(variables['batch_stats']['norm'])
    same(new_stats['batch_stats']['norm']['mean'], 0.8 * old_stats['mean'] + 0.2 * mean)
    same(new_stats['batch_stats']['norm']['var'], 0.8 * old_stats['var'] + 0.2 * variance)
    same(compose(module, variables, X, Z, mask=mask).output, y, 2e-5)


def test_in_evaluation_the_conditional_batch_norm_uses_the_running_statistics():
    module = ConditionalBatchNorm(epsilon=0.1)
    variables = parameters(ConditionalBatchNorm(use_running_average=True), X, Z)
    running = numpy(variables['batch_stats']['norm'])
    normalized = (np.asarray(X) - running['mean']) / np.sqrt(running['var'] + 0.1)
    expected = modulated(numpy(variables['params']['modulation']), normalized, np.asarray(Z))
    same(module.apply(variables, X, Z, True), expected)
    is_its_composition(module, variables, X, Z, True)


def test_masked_positions_do_not_reach_the_others_in_the_batch_norm():
    module = ConditionalBatchNorm(use_running_average=False)
    variables = parameters(module, X, Z)
    run = functools.partial(module.apply, variables, mask=MASK, mutable='batch_stats')
    garbage = jnp.where(MASK[..., None], X, jnp.nan)
    (y, new_stats), (garbage_y, garbage_stats) = run(X, Z), run(garbage, Z)
    same(garbage_y[MASK], y[MASK])
    jax.tree.map(same, garbage_stats, new_stats)


def test_statistics_are_shared_over_the_named_axis():
    module = ConditionalBatchNorm(use_running_average=False, axis_name='devices')
    variables = parameters(module, X, Z)
    alone = ConditionalBatchNorm(use_running_average=False)
    expected, new_stats = alone.apply(variables, X, Z, mutable='batch_stats')

    def shard(x, z):
        return module.apply(variables, x, z, mutable='batch_stats')

    y, shared = jax.vmap(shard, axis_name='devices')(X[:, None], Z[:, None])
    same(y[:, 0], expected)
    jax.tree.map(lambda a, b: same(a, np.stack([b, b])), shared, new_stats)


@pytest.mark.parametrize(
    ('module', 'plain'),
    [
        (ConditionalLayerNorm(), nn.LayerNorm()),
        (ConditionalBatchNorm(False), nn.BatchNorm(False)),
    ],
    ids=['ConditionalLayerNorm', 'ConditionalBatchNorm'],
)
def test_a_conditional_norm_starts_as_the_plain_one_of_flax(module, plain):
    y, _ = module.init_with_output(KEY, X, Z)
    expected, _ = plain.init_with_output(KEY, X)
    same(y, expected)


@pytest.mark.parametrize(
    'module',
    [FeatureWiseModulation(), AdaLNZero(Affine(N))],
    ids=['FeatureWiseModulation', 'AdaLNZero'],
)
def test_modulation_and_the_adaptive_block_start_as_the_identity(module):
    y, _ = module.init_with_output(KEY, X, Z)
    np.testing.assert_array_equal(y, X)


def test_the_adaptive_block_is_its_equation():
    module = AdaLNZero(Affine(N), epsilon=0.1)
    variables = parameters(module, X, Z)
    p, x, z = numpy(variables['params']), np.asarray(X), np.asarray(Z)
    y, h = np.zeros(x.shape), over_features(x, 0.1)
    for i in np.ndindex(x.shape[:-1]):
        z_i = z[i[0], 0, 0]
        head_output = z_i / (1 + np.exp(-z_i)) @ p['head']['V'] + p['head']['b']
        b, s, g = head_output[:N], head_output[N : 2 * N], head_output[2 * N :]
        y[i] = x[i] + g * ((h[i] * (1 + s) + b) @ p['F']['V'] + p['F']['b'])
    same(module.apply(variables, X, Z), y)
    is_its_composition(module, variables, X, Z)


def test_at_the_start_the_adaptive_block_learns_to_open():
    module = AdaLNZero(Affine(N))
    variables = module.init(KEY, X, Z)
    gradient = jax.grad(lambda v: jnp.square(module.apply(v, X, Z)).sum())(variables)['params']
    *_, g = jnp.split(gradient['head']['V'], 3, axis=-1)
    assert jnp.abs(g).min() > 0


def test_the_adaptive_block_passes_further_inputs_on_to_a_module_or_a_function():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, by, *, sign=1):
            return sign * by * x

    def scaled(x, by, *, sign=1):
        return sign * by * x

    variables = parameters(AdaLNZero(jnp.tanh), X, Z)
    expected = X + 6 * (AdaLNZero(jnp.negative).apply(variables, X, Z) - X)
    for F in Scaled(), scaled:
        same(AdaLNZero(F).apply(variables, X, Z, 2.0, sign=-3), expected, 1e-4)
        is_its_composition(AdaLNZero(F), variables, X, Z, 2.0, sign=-3)


@pytest.mark.parametrize(
    'module',
    [
        FeatureWiseModulation,
        ConditionalLayerNorm,
        functools.partial(ConditionalBatchNorm, use_running_average=True),
        functools.partial(AdaLNZero, jnp.tanh),
    ],
    ids=['FeatureWiseModulation', 'ConditionalLayerNorm', 'ConditionalBatchNorm', 'AdaLNZero'],
)
def test_in_bf16_modulation_is_close_to_f32(module):
    variables = parameters(module(), X, Z)
    y, expected = module(dtype=jnp.bfloat16).apply(variables, X, Z), module().apply(variables, X, Z)
    assert y.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
    same(y.astype(jnp.float32), expected, 4e-2)
    stored = jax.eval_shape(module(param_dtype=jnp.bfloat16).init, KEY, X, Z)['params']
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


def test_the_adaptive_block_has_its_own_dtype_whatever_that_of_F():
    module = AdaLNZero(Affine(N, dtype=jnp.float32), dtype=jnp.bfloat16)
    assert module.apply(parameters(module, X, Z), X, Z).dtype == jnp.bfloat16


def test_in_bf16_the_batch_statistics_are_those_of_f32():
    x = X.astype(jnp.bfloat16)
    module = ConditionalBatchNorm(use_running_average=False, momentum=0.0, dtype=jnp.bfloat16)
    variables = parameters(module, x, Z)
    _, new_stats = module.apply(variables, x, Z, mutable='batch_stats')
    mean, variance = statistics(x.astype(jnp.float32), np.ones(X.shape[:-1], bool))
    same(new_stats['batch_stats']['norm']['mean'], mean)
    same(new_stats['batch_stats']['norm']['var'], variance)


@pytest.mark.parametrize(
    ('module', 'options', 'message'),
    [
        (FeatureWiseModulation(), {'z': Z[:, 0, 0]}, 'do not broadcast'),
        (ConditionalLayerNorm(), {'z': Z[:, 0, 0]}, 'do not broadcast'),
        (AdaLNZero(jnp.tanh), {'z': Z[:, 0, 0]}, 'do not broadcast'),
        (AdaLNZero(jnp.sum), {}, r'F maps \(2, 3, 4, 5\) to \(\)'),
        (ConditionalBatchNorm(), {}, 'use_running_average'),
        (ConditionalBatchNorm(True), {'use_running_average': True}, 'use_running_average'),
        (ConditionalBatchNorm(True), {'mask': MASK[:, :2]}, r'mask \(2, 2, 4\): expected'),
    ],
)
def test_bad_input_raises(module, options, message):
    with pytest.raises(ValueError, match=message) as error:
        module.init(KEY, **{'x': X, 'z': Z} | options)
    assert '\n' not in str(error.value)
