import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi import FUSIONS, fusion
from mi.config import has_parameter
from mi.unify import as_mi
from tests import prng
from tests.motifs.checks import assert_float64, compose, drawn, random, wide

N, M, K = 12, 8, 16
OPTIONS = {'rank': 4, 'hidden': 12}
# The words that come with mi. The other tests are about all of FUSIONS, so that a word of your own
# is tested too.
SHIPPED = (
    *('none', 'concat', 'concat_mlp', 'film', 'layer_norm', 'gate', 'glu', 'swiglu', 'attention'),
    *('experts', 'hypernetwork', 'mlb', 'mfb', 'mutan', 'block', 'compact', 'mi', 'mi_low_rank'),
    *('mi_tucker', 'mi_block', 'mi_diagonal', 'mi_scalar', 'multi_head'),
)
# no term in x alone, as published, or a gate that is shut at zero
ZERO_AT_ZERO = {'mlb', 'mfb', 'mutan', 'block', 'compact', 'swiglu', 'hypernetwork', 'multi_head'}
AFFINE_IN_BOTH = {
    *('none', 'concat', 'film', 'mfb', 'mutan', 'block', 'compact', 'multi_head'),
    *('mi', 'mi_low_rank', 'mi_tucker', 'mi_block', 'mi_diagonal', 'mi_scalar'),
}
all_fusions = pytest.mark.parametrize('name', FUSIONS)


def make(name, features=K, **options):
    context = {'context': 'one_hot'} if name in fusion.ONE_HOT else {}
    return fusion.get(name, **OPTIONS)(features, **context | options)


@functools.cache
def make_apply(name, features=K):
    """The module, jitted, and random variables for x [..., N] and z [..., M]."""
    module = make(name, features)
    return jax.jit(module.apply), drawn(module, jnp.zeros((1, N)), jnp.zeros((1, M)))


@functools.cache
def make_gradient(name, features=K):
    """The gradients of Σ y² for the variables, x and z, jitted."""
    apply, _ = make_apply(name, features)
    return jax.jit(jax.grad(lambda *arrays: (apply(*arrays) ** 2).sum(), (0, 1, 2)))


def contexts(name, *lead):
    """[..., M]: what the word takes."""
    if name in fusion.ONE_HOT:
        return jax.nn.one_hot(jax.random.randint(prng.key(1), lead, 0, M), M)
    return random(1, *lead, M)


@all_fusions
@pytest.mark.parametrize(
    'x_lead, z_lead', [((), ()), ((6,), (6,)), ((2, 5), (2, 1)), ((2, 5), (5,))]
)
def test_broadcast_context_is_the_context_repeated(name, x_lead, z_lead):
    x, z = random(0, *x_lead, N), contexts(name, *z_lead)
    apply, variables = make_apply(name)
    y = apply(variables, x, z)
    assert y.shape == (*x_lead, K)
    repeated = jnp.broadcast_to(z, (*x_lead, M))
    np.testing.assert_allclose(y, apply(variables, x, repeated), rtol=2e-5, atol=1e-5)


@all_fusions
def test_jit_vmap_and_eval_shape_agree_with_the_call(name):
    x, z = random(0, 6, N), contexts(name, 6)
    apply, variables = make_apply(name)
    y = make(name).apply(variables, x, z)
    assert jax.eval_shape(apply, variables, x, z).shape == y.shape
    np.testing.assert_allclose(apply(variables, x, z), y, rtol=1e-5, atol=1e-5)
    row_outputs = jax.vmap(apply, in_axes=(None, 0, 0))(variables, x, z)
    np.testing.assert_allclose(row_outputs, y, rtol=1e-5, atol=1e-5)


@all_fusions
@pytest.mark.parametrize('features', [K, pytest.param(N, marks=pytest.mark.slow)])
def test_every_parameter_and_both_streams_get_a_gradient(name, features):
    x, z = random(0, 6, N), contexts(name, 6)
    _, variables = make_apply(name, features)
    *other_grads, z_grad = jax.tree.leaves(make_gradient(name, features)(variables, x, z))
    assert all(np.any(g) for g in other_grads)
    assert np.any(z_grad) == (name != 'none')


def test_every_word_that_ships_is_there():
    assert set(SHIPPED) <= set(FUSIONS)


def outcome(name, x, z, **options):
    """The shape of the output of a freshly initialized module, or what it raises."""
    try:
        shapes = jax.eval_shape(make(name, **options).init_with_output, jax.random.key(0), x, z)
    except ValueError as error:
        return str(error).split('\n')[0]
    return shapes[0].shape


@all_fusions
@pytest.mark.parametrize('ids', [(5,), (5, 4), ()], ids=str)
def test_integers_are_ids_of_contexts_or_refused(name, ids):
    x, z = jnp.zeros((*ids, N) if ids else (5, N)), jnp.zeros(ids, jnp.int32)
    assert outcome(name, x, z, context='one_hot').startswith('z is int32')
    if has_parameter(FUSIONS[name], 'contexts'):
        assert outcome(name, x, z, context='one_hot', contexts=M) == (*x.shape[:-1], K)


@all_fusions
def test_an_integer_is_the_one_hot_context_and_out_of_range_the_nearest(name):
    if not has_parameter(FUSIONS[name], 'contexts'):
        pytest.skip('takes no integers')
    x, ids = random(0, 5, N), jnp.array([0, 3, M - 1, -1, M + 4])
    module = make(name, context='one_hot', contexts=M)
    _, variables = make_apply(name)
    expected = module.apply(variables, x, jax.nn.one_hot(jnp.clip(ids, 0, M - 1), M))
    np.testing.assert_allclose(module.apply(variables, x, ids), expected, rtol=1e-5, atol=1e-5)


@all_fusions
@pytest.mark.parametrize(
    'x_lead, z_lead',
    [((0,), ()), ((0,), (1,)), ((1,), (0,)), ((2, 0), (2, 1)), ((), (0,))],
    ids=str,
)
def test_an_empty_batch_beside_a_shared_stream_is_empty(name, x_lead, z_lead):
    x, z = jnp.zeros((*x_lead, N)), jnp.zeros((*z_lead, M))
    _, variables = make_apply(name)
    lead = np.broadcast_shapes(x_lead, z_lead)
    assert jax.eval_shape(make(name).apply, variables, x, z).shape == (*lead, K)


@pytest.mark.parametrize(
    'name, context',
    [
        pytest.param(name, context, marks=() if is_first else pytest.mark.slow)
        for name in FUSIONS
        for context, is_first in (
            [('one_hot', True)] if name in fusion.ONE_HOT else [('dense', True), ('one_hot', False)]
        )
    ],
)
def test_unit_variance_at_initialization(name, context):
    """Over draws of parameters and inputs; at sizes that do not divide each other."""
    n, m, k, rows = 17, 5, 24, 40

    def second_moment(seed):
        keys = jax.random.split(prng.key(seed), 3)
        x, z = (jax.random.normal(key, (rows, size)) for key, size in zip(keys, (n, m)))  # noqa: B905
        z = z if context == 'dense' else jax.nn.one_hot(jnp.arange(rows) % m, m)
        module = make(name, k, context=context)
        return (module.init_with_output(keys[2], x, z)[0] ** 2).mean()

    moments = jax.jit(jax.vmap(second_moment))(jnp.arange(256))
    assert 0.85 < np.mean(moments) < 1.15, (np.mean(moments), np.std(moments))


@pytest.mark.parametrize('features', [1, 3])
def test_attention_over_few_features_has_unit_variance(features):
    """E[(k softmax(m)_1)²] is 1 for one feature and 1.44 for three, far from its limit e."""

    def second_moment(seed):
        keys = jax.random.split(prng.key(seed), 3)
        x, z = (jax.random.normal(key, (40, 9)) for key in keys[:2])
        module = make('attention', features)
        return (module.init_with_output(keys[2], x, z)[0] ** 2).mean()

    moments = jax.jit(jax.vmap(second_moment))(jnp.arange(1024))
    assert 0.9 < moments.mean() < 1.1


@pytest.mark.parametrize('context', ['dense', 'one_hot'])
def test_a_gate_has_logits_of_unit_variance_for_either_kind_of_context(context):
    """The sigmoid hides it: its second moment hardly changes with them."""
    m, k = 16, 4096
    z = random(1, m, m) if context == 'dense' else jnp.eye(m)
    module = make('gate', k, context=context)
    variables = module.init(prng.key(0), jnp.ones((m, N)), z)
    logits = z @ variables['params']['gate']['V']
    size = (z**2).sum(-1).mean() / (m if context == 'dense' else 1)
    np.testing.assert_allclose((logits**2).mean(), size, rtol=0.05)


@all_fusions
def test_bf16_is_close_to_f32(name):
    x, z = random(0, 64, N), contexts(name, 64)
    apply, variables = make_apply(name)
    exact = apply(variables, x, z)
    y = jax.jit(make(name, dtype=jnp.bfloat16).apply)(variables, x, z)
    assert y.dtype == jnp.bfloat16
    error = np.asarray(y, np.float32) - exact
    assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(exact)


@all_fusions
def test_the_context_of_zeros_gives_finite_values_and_gradients(name):
    x, z = random(0, 6, N), jnp.zeros((6, M))
    apply, _ = make_apply(name)
    variables = jax.jit(make(name).init)(prng.key(0), x, z)
    y, gradients = apply(variables, x, z), make_gradient(name)(variables, x, z)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((y, gradients)))
    if name in SHIPPED:
        assert np.any(y) == (name not in ZERO_AT_ZERO)


@all_fusions
def test_it_is_a_composition_of_the_one_equation(name):
    x, z = random(0, 2, 5, N), contexts(name, 2, 5)
    apply, variables = make_apply(name)
    if name in SHIPPED:
        composition = compose(make(name), variables, x, z)
    else:
        try:
            composition = as_mi(make(name), variables, x, z)
        except ValueError as error:
            pytest.skip(f'not affine, and no function is registered for it: {error}')
    expected = apply(variables, x, z)
    np.testing.assert_allclose(composition.output, expected, rtol=1e-4, atol=1e-4)
    if name in SHIPPED:
        assert (not composition.around) == (name in AFFINE_IN_BOTH)
    if not composition.around and len(composition.products) == 1:
        W, U, V, b, x, z = map(np.asarray, (*composition, x, z))
        expected_sum = np.einsum('...m,mnk,...n->...k', z, W, x) + z @ U + x @ V + b
        np.testing.assert_allclose(expected_sum, expected, rtol=1e-4, atol=1e-4)


@all_fusions
def test_float64_is_computed_in_float64(name):
    """Its derivatives are finite differences of steps of 1e-5, which f32 does not resolve."""
    with jax.enable_x64(True):
        module = make(name, dtype=jnp.float64, param_dtype=jnp.float64)
        assert_float64(
            module.apply, *wide((make_apply(name)[1], random(0, 3, N), contexts(name, 3)))
        )


@pytest.mark.parametrize('name', ['attention', 'experts', 'layer_norm'])
def test_in_bf16_softmax_and_statistics_are_f32(name):
    x, z = jnp.zeros((6, N), jnp.bfloat16), jnp.zeros((6, M), jnp.bfloat16)
    module = make(name, dtype=jnp.bfloat16)
    program = str(jax.make_jaxpr(module.apply)(make_apply(name)[1], x, z))
    assert re.search(r'f32\[[\d,]*\] = (exp|rsqrt)', program)
    assert not re.search(r'bf16\[[\d,]*\] = (exp|rsqrt|reduce_sum|div)', program)


@all_fusions
@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_lowers_for(name, platform):
    x, z = jax.ShapeDtypeStruct((6, N), jnp.float32), jax.ShapeDtypeStruct((6, M), jnp.float32)
    module = make(name)
    variables = jax.eval_shape(module.init, jax.random.key(0), x, z)
    exported = jax.export.export(jax.jit(module.apply), platforms=[platform])(variables, x, z)
    assert exported.out_avals[0].shape == (6, K)


def test_film_starts_as_the_affine_map_and_is_modulated_by_its_equation():
    x, z = random(0, 6, N), random(1, 6, M)
    module = make('film')
    y, variables = module.init_with_output(prng.key(2), x, z)
    p = variables['params']
    h = x @ p['x']['V']
    np.testing.assert_allclose(y, h, rtol=1e-5, atol=1e-5)
    gamma, beta = random(3, M, K), random(4, M, K)
    p = {**p, 'gamma': {**p['gamma'], 'V': gamma}, 'beta': {**p['beta'], 'V': beta}}
    expected = (1 + z @ gamma) * h + z @ beta
    np.testing.assert_allclose(module.apply({'params': p}, x, z), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('context', ['dense', 'one_hot'])
@pytest.mark.parametrize('g', [0.25, 1.0])
def test_film_can_start_at_random_with_unit_variance(context, g):
    """γ has variance g, and the three terms of y have their shares; over draws of everything."""
    n, m, k, rows = 17, 5, 24, 40
    film = fusion.get('film', {'gamma_variance': g})(k, context=context)

    def moments(seed):
        keys = jax.random.split(prng.key(seed), 3)
        x, z = (jax.random.normal(key, (rows, size)) for key, size in zip(keys, (n, m)))  # noqa: B905
        z = z if context == 'dense' else jax.nn.one_hot(jnp.arange(rows) % m, m)
        y, variables = film.init_with_output(keys[2], x, z)
        p = variables['params']
        gamma, beta, h = z @ p['gamma']['V'], z @ p['beta']['V'], x @ p['x']['V']
        return jnp.array([(term**2).mean() for term in (gamma, h, gamma * h, beta, y)])

    means = jax.jit(jax.vmap(moments))(jnp.arange(256)).mean(0)
    share = 1 / (1 + 2 * g)
    np.testing.assert_allclose(means, [g, share, g * share, g * share, 1], rtol=0.1)


def test_film_at_random_has_the_parameters_and_the_equation_of_film():
    x, z = random(0, 6, N), random(1, 6, M)
    film, at_random = make('film'), fusion.get('film', {'gamma_variance': 1.0})(K)
    variables = at_random.init(prng.key(2), x, z)
    shapes = jax.eval_shape(film.init, jax.random.key(2), x, z)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(film.apply(variables, x, z), at_random.apply(variables, x, z))
    with pytest.raises(ValueError, match=r'gamma_variance = -1\.0: expected at least 0'):
        fusion.get('film', {'gamma_variance': -1.0})(K).init(prng.key(2), x, z)


def test_gate_at_rest_passes_its_input():
    x, z = random(0, 6, N), random(1, 6, M)
    module = make('gate')
    p = module.init(prng.key(2), x, z)['params']
    closed_gate = {**p, 'gate': jax.tree.map(jnp.zeros_like, p['gate'])}
    np.testing.assert_allclose(
        module.apply({'params': closed_gate}, x, z), x @ p['x']['V'], rtol=1e-5, atol=1e-5
    )
    gate = 1 / (1 + np.exp(-np.asarray(z @ p['gate']['V'])))
    expected = 2 * gate * np.asarray(x @ p['x']['V'])
    np.testing.assert_allclose(module.apply({'params': p}, x, z), expected, rtol=1e-5, atol=1e-5)


def test_unknown_words_name_the_nearest():
    with pytest.raises(ValueError, match="unknown fusion 'filmm'; did you mean 'film'"):
        fusion.get('filmm')
    with pytest.raises(ValueError, match="unknown fusion option 'rnak'; did you mean 'rank'"):
        fusion.get('mi_low_rank', rnak=3)
