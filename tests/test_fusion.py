import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi import FUSIONS, fusion

N, M, K = 12, 8, 16
OPTIONS = {'rank': 4, 'hidden': 10}
each = pytest.mark.parametrize('name', FUSIONS)


def make(name, features=K, **options):
    return fusion.get(name, **OPTIONS)(features, **options)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@each
@pytest.mark.parametrize(
    'x_lead, z_lead', [((), ()), ((6,), (6,)), ((2, 5), (2, 1)), ((2, 5), (5,))]
)
def test_broadcast_context_is_the_context_repeated(name, x_lead, z_lead):
    x, z = random(0, *x_lead, N), random(1, *z_lead, M)
    module = make(name)
    y, variables = module.init_with_output(jax.random.key(2), x, z)
    assert y.shape == (*x_lead, K)
    repeated = jnp.broadcast_to(z, (*x_lead, M))
    np.testing.assert_allclose(y, module.apply(variables, x, repeated), rtol=2e-5, atol=1e-5)


@each
def test_jit_vmap_and_eval_shape_agree_with_the_call(name):
    x, z = random(0, 6, N), random(1, 6, M)
    module = make(name)
    y, variables = module.init_with_output(jax.random.key(2), x, z)
    assert jax.eval_shape(module.apply, variables, x, z).shape == y.shape
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x, z), y, rtol=1e-5, atol=1e-5)
    each_row = jax.vmap(module.apply, in_axes=(None, 0, 0))(variables, x, z)
    np.testing.assert_allclose(each_row, y, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize('features', [K, N])
def test_every_parameter_and_both_streams_get_a_gradient(name, features):
    x, z = random(0, 6, N), random(1, 6, M)
    module = make(name, features)
    params = module.init(jax.random.key(2), x, z)
    params = jax.tree.map(lambda p: p + 0.1 * random(p.size, *p.shape), params)  # off the zeros
    grads = jax.grad(lambda p, x, z: (module.apply(p, x, z) ** 2).sum(), argnums=(0, 1, 2))(
        params, x, z
    )
    *of_params_and_x, of_z = jax.tree.leaves(grads)
    assert all(bool((g != 0).any()) for g in of_params_and_x)
    assert bool((of_z != 0).any()) == (name != 'none')


@each
@pytest.mark.parametrize('context', ['dense', 'one_hot'])
def test_unit_variance_at_initialisation(name, context):
    variances = []
    for seed in range(8):
        x = random(seed, 256, N)
        one_hot = jax.nn.one_hot(jnp.arange(256) % M, M)
        z = random(seed + 8, 256, M) if context == 'dense' else one_hot
        y, _ = make(name, 64, context=context).init_with_output(jax.random.key(seed), x, z)
        variances.append(float(y.var()))
    # a sigmoid gate spreads the scale of what it gates: E[(2σ(g))²] = 1.17 for g ~ N(0, 1)
    assert 0.85 < np.mean(variances) < 1.3, variances


@each
def test_bf16_is_close_to_f32(name):
    x, z = random(0, 64, N), random(1, 64, M)
    exact, variables = make(name).init_with_output(jax.random.key(2), x, z)
    y = make(name, dtype=jnp.bfloat16).apply(variables, x, z)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 1e-2


@each
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
    y, variables = module.init_with_output(jax.random.key(2), x, z)
    p = variables['params']
    h = x @ p['x']['V']
    np.testing.assert_allclose(y, h, rtol=1e-5, atol=1e-5)
    gamma, beta = random(3, M, K), random(4, M, K)
    p = {**p, 'gamma': {**p['gamma'], 'V': gamma}, 'beta': {**p['beta'], 'V': beta}}
    expected = (1 + z @ gamma) * h + z @ beta
    np.testing.assert_allclose(module.apply({'params': p}, x, z), expected, rtol=1e-5, atol=1e-5)


def test_gate_at_rest_passes_its_input():
    x, z = random(0, 6, N), random(1, 6, M)
    module = make('gate')
    p = module.init(jax.random.key(2), x, z)['params']
    at_rest = {**p, 'gate': jax.tree.map(jnp.zeros_like, p['gate'])}
    np.testing.assert_allclose(
        module.apply({'params': at_rest}, x, z), x @ p['x']['V'], rtol=1e-5, atol=1e-5
    )
    gate = 1 / (1 + np.exp(-np.asarray(z @ p['gate']['V'])))
    expected = 2 * gate * np.asarray(x @ p['x']['V'])
    np.testing.assert_allclose(module.apply({'params': p}, x, z), expected, rtol=1e-5, atol=1e-5)


def test_unknown_words_name_the_nearest():
    with pytest.raises(ValueError, match="unknown fusion 'filmm'; did you mean 'film'"):
        fusion.get('filmm')
    with pytest.raises(ValueError, match="unknown fusion option 'rnak'; did you mean 'rank'"):
        fusion.get('mi_low_rank', rnak=3)
