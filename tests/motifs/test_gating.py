import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.motifs.gating import (
    ACTIVATIONS,
    GatedFeedForward,
    GatedLinearUnit,
    Highway,
    SqueezeExcitation,
)
from mi.unify import as_mi
from tests import prng
from tests.motifs.checks import is_its_composition, random

N, M, K = 5, 3, 4
X, Z = random(0, 2, 6, N), random(1, 2, 1, M)
IMAGES = random(2, 2, 3, 4, K)
KEY = prng.key(3)

SCALAR = {
    'sigmoid': lambda a: 1 / (1 + math.exp(-a)),
    'gelu': lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2,
    'silu': lambda a: a / (1 + math.exp(-a)),
    'relu': lambda a: max(a, 0.0),
    'tanh': math.tanh,
    'identity': lambda a: a,
}


def numpy(variables):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), variables['params'])


def parameters(module, *inputs):
    """Normal in place of the initial values: none is zero."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda p: jnp.asarray(draw(0, 0.5, p.shape), p.dtype), shapes)


def same(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def reference(activation, p, x, z):
    """act(Az + a) ⊙ (Bx + b), row by row and unit by unit."""
    y = np.zeros((*np.broadcast_shapes(x.shape[:-1], z.shape[:-1]), p['A'].shape[1]))
    x = np.broadcast_to(x, (*y.shape[:-1], x.shape[-1]))
    z = np.broadcast_to(z, (*y.shape[:-1], z.shape[-1]))
    zeros = np.zeros(y.shape[-1])
    a, b = p.get('a', zeros), p.get('b', zeros)
    for i in np.ndindex(y.shape):
        row, k = i[:-1], i[-1]
        gate = a[k] + sum(z[row][j] * p['A'][j, k] for j in range(z.shape[-1]))
        unit = b[k] + sum(x[row][j] * p['B'][j, k] for j in range(x.shape[-1]))
        y[i] = SCALAR[activation](gate) * unit
    return y


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_a_gated_linear_unit_of_two_streams_is_its_equation(activation):
    module = GatedLinearUnit(K, activation)
    variables = parameters(module, X, Z)
    expected = reference(activation, numpy(variables), np.asarray(X), np.asarray(Z))
    same(module.apply(variables, X, Z), expected)
    is_its_composition(module, variables, X, Z)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_a_gated_linear_unit_of_x_alone_is_gated_by_x(activation):
    module = GatedLinearUnit(K, activation, use_bias=False)
    variables = parameters(module, X)
    assert set(variables['params']) == {'A', 'B'}
    expected = reference(activation, numpy(variables), np.asarray(X), np.asarray(X))
    same(module.apply(variables, X), expected)
    is_its_composition(module, variables, X)


def test_the_sigmoid_gated_linear_unit_is_that_of_jax():
    module = GatedLinearUnit(K)
    variables = parameters(module, X)
    p = variables['params']
    both = jnp.concatenate([X @ p['B'] + p['b'][None, None], X @ p['A'] + p['a'][None, None]], -1)
    same(module.apply(variables, X), jax.nn.glu(both))


def test_the_gelu_is_the_exact_one():
    a = jnp.linspace(-4, 4, 33)
    same(ACTIVATIONS['gelu'](a), [SCALAR['gelu'](float(v)) for v in a], 1e-6)


def test_the_bilinear_unit_is_a_multiplicative_interaction_of_low_rank():
    module = GatedLinearUnit(K, 'identity')
    variables = parameters(module, X, Z)
    p = numpy(variables)
    W, U, V, b = is_its_composition(module, variables, X, Z)
    same(W, np.einsum('mk,nk->mnk', p['A'], p['B']))
    same(U, p['A'] * p['b'])
    same(V, p['B'] * p['a'])
    same(b, p['a'] * p['b'])


@pytest.mark.parametrize('use_bias', [False, True])
def test_the_gated_feed_forward_is_a_gated_unit_and_a_map(use_bias):
    module = GatedFeedForward(7, K, 'gelu', use_bias=use_bias)
    variables = parameters(module, X)
    p = numpy(variables)
    assert ('c' in p) == ('a' in p['glu']) == use_bias
    expected = reference('gelu', p['glu'], np.asarray(X), np.asarray(X)) @ p['C'] + p.get('c', 0)
    same(module.apply(variables, X), expected)
    is_its_composition(module, variables, X)


def test_the_bilinear_feed_forward_is_one_product_and_nothing_else():
    module = GatedFeedForward(K, activation='identity')
    variables = parameters(module, X)
    p = variables['params']
    W, U, V, b = is_its_composition(module, variables, X)
    same(W, np.einsum('mh,nh,hk->mnk', p['glu']['A'], p['glu']['B'], p['C']))
    assert W.shape == (N, N, N) and not U.any() and not V.any() and not b.any()


def test_dropout_drops_hidden_units_and_scales_up_the_rest():
    module = GatedFeedForward(N, dropout=0.5)
    variables = parameters(module, X)
    variables['params']['C'] = jnp.eye(N)
    kept = module.apply(variables, X)
    y = module.apply(variables, X, deterministic=False, rngs={'dropout': KEY})
    assert 0.2 < jnp.mean(y == 0) < 0.8
    same(y, jnp.where(y == 0, 0, 2 * kept))
    with pytest.raises(ValueError, match='cannot be drawn again'):
        as_mi(module, variables, X, deterministic=False)


@pytest.mark.parametrize('activation', ['relu', 'tanh'])
@pytest.mark.parametrize('inputs', [(X,), (X, Z)], ids=['x', 'x, z'])
def test_a_highway_layer_is_its_equation(activation, inputs):
    module = Highway(activation)
    variables = parameters(module, *inputs)
    p, x, z = numpy(variables), np.asarray(X), np.asarray(inputs[-1])
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape[:-1]):
        x_i, z_i = x[i], np.broadcast_to(z, (*x.shape[:-1], z.shape[-1]))[i]
        for k in range(N):
            H = SCALAR[activation](x_i @ p['H']['V'][:, k] + p['H']['b'][k])
            T = SCALAR['sigmoid'](z_i @ p['T']['V'][:, k] + p['T']['b'][k])
            y[(*i, k)] = T * H + (1 - T) * x_i[k]
    same(module.apply(variables, *inputs), y)
    is_its_composition(module, variables, *inputs)


def test_a_highway_layer_starts_with_the_gate_bias_and_carries_x_where_it_is_shut():
    variables = Highway(gate_bias=-2.0).init(KEY, X, Z)
    same(variables['params']['T']['b'], np.full(N, -2.0))
    module = Highway(gate_bias=-40.0)
    same(module.apply(module.init(KEY, X, Z), X, Z), X)


def squeeze_excitation(p, x, mask):
    """One example at a time: the mean, two maps, the gate."""
    y = np.zeros(x.shape)
    for b in range(len(x)):
        rows = [x[b][i] for i in np.ndindex(x.shape[1:-1]) if mask[b][i]]
        pooled = sum(rows, np.zeros(x.shape[-1])) / max(len(rows), 1)
        s = np.maximum(pooled @ p['W1'], 0) @ p['W2']
        y[b] = x[b] / (1 + np.exp(-s))
    return y


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('x', [IMAGES, IMAGES[:, 0]], ids=['images', 'sequences'])
def test_squeeze_and_excitation_is_its_equation(x, masked):
    module = SqueezeExcitation(ratio=2, axes=tuple(range(1 - x.ndim, -1)))
    variables = parameters(module, x)
    mask = random(4, *x.shape[:-1]) > 0 if masked else None
    valid = np.asarray(mask) if masked else np.ones(x.shape[:-1], bool)
    expected = squeeze_excitation(numpy(variables), np.asarray(x), valid)
    same(module.apply(variables, x, mask), expected)
    is_its_composition(module, variables, x, mask)


def test_masked_positions_do_not_reach_the_others_in_squeeze_and_excitation():
    module = SqueezeExcitation(ratio=2)
    variables = parameters(module, IMAGES)
    mask = random(4, *IMAGES.shape[:-1]) > 0
    garbage = jnp.where(mask[..., None], IMAGES, jnp.nan)
    y, other = module.apply(variables, IMAGES, mask), module.apply(variables, garbage, mask)
    same(other[mask], y[mask])

    def valid_sum(x):
        return jnp.where(mask[..., None], module.apply(variables, x, mask), 0).sum()

    assert not jax.grad(valid_sum)(IMAGES)[~mask].any()


def test_the_mean_over_no_position_is_zero_and_the_gate_one_half():
    module = SqueezeExcitation(ratio=2)
    variables = parameters(module, IMAGES)
    y = module.apply(variables, IMAGES, jnp.zeros(IMAGES.shape[:-1], bool))
    same(y, IMAGES / 2)


@pytest.mark.parametrize(
    ('module', 'inputs'),
    [
        (functools.partial(GatedLinearUnit, K, 'gelu'), (X, Z)),
        (functools.partial(GatedFeedForward, K, use_bias=True), (X,)),
        (Highway, (X, Z)),
        (functools.partial(SqueezeExcitation, 2), (IMAGES,)),
    ],
    ids=['GatedLinearUnit', 'GatedFeedForward', 'Highway', 'SqueezeExcitation'],
)
def test_in_bf16_the_gates_are_close_to_f32(module, inputs):
    variables = parameters(module(), *inputs)
    y = module(dtype=jnp.bfloat16).apply(variables, *inputs)
    assert y.dtype == jnp.bfloat16
    expected = module().apply(variables, *inputs)
    assert expected.dtype == jnp.float32
    same(y.astype(jnp.float32), expected, 4e-2)
    stored = jax.eval_shape(module(param_dtype=jnp.bfloat16).init, KEY, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize('context', ['one_hot', 'dense'])
def test_a_context_of_either_kind_starts_gates_of_unit_variance(context):
    z = jnp.eye(64) if context == 'one_hot' else random(5, 64, 64)
    module = GatedLinearUnit(256, context=context)
    A = module.init(KEY, jnp.ones((1, N)), z)['params']['A']
    np.testing.assert_allclose(jnp.std(z @ A), 1, rtol=0.05)


@pytest.mark.parametrize(
    ('module', 'inputs', 'message'),
    [
        (GatedLinearUnit(K, 'gleu'), (X,), "unknown activation 'gleu'; did you mean 'gelu'?"),
        (GatedFeedForward(K, activation='swish'), (X,), "unknown activation 'swish'; known: gelu"),
        (Highway('elu'), (X,), "unknown activation 'elu'"),
        (GatedLinearUnit(K), (X, random(1, 4, M)), 'do not broadcast'),
        (Highway(), (X, random(1, 4, M)), 'do not broadcast'),
        (SqueezeExcitation(3), (IMAGES,), 'ratio = 3: expected a divisor of the 4 channels'),
        (SqueezeExcitation(16), (IMAGES,), 'ratio = 16: expected a divisor of the 4 channels'),
        (SqueezeExcitation(0), (IMAGES,), 'ratio = 0: expected a divisor'),
        (SqueezeExcitation(2, axes=(-2, -1)), (IMAGES,), 'expected distinct spatial axes'),
        (SqueezeExcitation(2, axes=(1, -3)), (IMAGES,), 'expected distinct spatial axes'),
        (SqueezeExcitation(2, axes=()), (IMAGES,), 'expected distinct spatial axes'),
        (SqueezeExcitation(2), (IMAGES[0, 0],), 'expected distinct spatial axes'),
        (SqueezeExcitation(2), (IMAGES, jnp.ones((2, 3, 5), bool)), r'mask \(2, 3, 5\): expected'),
    ],
)
def test_bad_input_raises(module, inputs, message):
    with pytest.raises(ValueError, match=message.replace('?', r'\?')) as error:
        module.init(KEY, *inputs)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('valid', [1, 2])
def test_few_positions_are_squeezed_to_their_mean(valid):
    """Also one alone: sigmoid(W2ᵀ relu(W1ᵀ mean))."""
    x = random(4, 1, 3, 1, K)
    mask = np.arange(3).reshape(1, 3, 1) < valid
    module = SqueezeExcitation(ratio=2)
    variables = parameters(module, x)
    p = numpy(variables)
    mean = np.asarray(x, np.float64)[0, :valid, 0].mean(0)
    s = 1 / (1 + np.exp(-np.maximum(mean @ p['W1'], 0) @ p['W2']))
    got = module.apply(variables, x, mask=jnp.asarray(mask))
    same(got[0, :valid, 0], s * np.asarray(x)[0, :valid, 0])
