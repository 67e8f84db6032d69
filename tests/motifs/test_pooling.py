"""Bilinear pooling against loops in NumPy, float64, written from the papers' equations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear
from mi.unify import as_mi
from tests import prng
from tests.motifs.checks import is_its_composition

N, M, K = 5, 3, 6
MODULES = {
    'mlb': functools.partial(MLB, rank=7),
    'mfb': functools.partial(MFB, factors=3),
    'mutan': functools.partial(MUTAN, rank=2, hidden=4),
    'block': functools.partial(BLOCK, rank=3, blocks=2, hidden=4),
    'compact': CompactBilinear,
}
all_modules = pytest.mark.parametrize('name', MODULES)


@functools.cache
def apply(module):
    return jax.jit(module.apply)  # one compilation for all tests


def random_variables(module, x, z):
    """Variables with all parameters random."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, z)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) / 2, shapes)


@functools.cache
def drawn(name):
    """The module, its variables, x [2, 4, N] and z [2, 1, M]."""
    module = MODULES[name](K)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 4, N)).astype(np.float32)
    z = rng.normal(size=(2, 1, M)).astype(np.float32)
    return module, random_variables(module, x, z), x, z


def tensor(module, variables, n, m):
    """W [m, n, k] of a module that is zᵀWx + b: its output for every pair of unit vectors."""
    y = apply(module)(variables, np.eye(n, dtype=np.float32), np.eye(m, dtype=np.float32)[:, None])
    return y - variables.get('params', {}).get('b', np.zeros(module.features))[None, None]


def mlb(p, x, z):
    y = np.zeros(K)
    for k in range(K):
        y[k] = p['b'][k]
        for r in range(7):
            y[k] += p['O'][r, k] * np.tanh(p['P'][:, r] @ z) * np.tanh(p['Q'][:, r] @ x)
    return y


def mfb(p, x, z):
    y = np.zeros(K)
    for k, f in itertools.product(range(K), range(3)):
        y[k] += (p['P'][:, 3 * k + f] @ z) * (p['Q'][:, 3 * k + f] @ x)
    return y


def mutan(p, x, z):
    s = np.zeros(4)
    for r in range(2):
        s += (p['M'][r].T @ (p['P'].T @ z)) * (p['N'][r].T @ (p['Q'].T @ x))
    return p['O'].T @ s + p['b']


def block(p, x, z):
    s = np.zeros(4)
    for c, r in itertools.product(range(2), range(3)):
        chunk = slice(2 * c, 2 * c + 2)
        z_map = p['M'][c, r].T @ (p['P'].T @ z)[chunk]
        x_map = p['N'][c, r].T @ (p['Q'].T @ x)[chunk]
        s[chunk] += z_map * x_map
    return p['O'].T @ s + p['b']


def compact(p, x, z):
    """The count sketch of z ⊗ x, with the hash and sign of each of its entries."""
    hash_z, sign_z, hash_x, sign_x = CompactBilinear(K).draw_hashes(M, N)
    y = np.zeros(K)
    for i, j in itertools.product(range(M), range(N)):
        y[(hash_z[i] + hash_x[j]) % K] += sign_z[i] * sign_x[j] * z[i] * x[j]
    return np.sqrt(K / (M * N)) * y


LOOPS = {'mlb': mlb, 'mfb': mfb, 'mutan': mutan, 'block': block, 'compact': compact}


@all_modules
def test_it_is_the_loop_of_its_paper_s_equation(name):
    module, variables, x, z = drawn(name)
    y = apply(module)(variables, x, z)
    p = {k: np.asarray(v, np.float64) for v in variables.values() for k, v in v.items()}
    x, z = x.astype(np.float64), z.astype(np.float64)
    assert y.shape == (2, 4, K)
    for b, t in itertools.product(range(2), range(4)):
        np.testing.assert_allclose(y[b, t], LOOPS[name](p, x[b, t], z[b, 0]), 1e-5, 1e-5)


@all_modules
def test_it_is_its_composition(name):
    module, variables, x, z = drawn(name)
    composition = is_its_composition(module, variables, x, z)
    assert len(composition.products) == 1
    if name != 'mlb':
        W, *_ = composition
        np.testing.assert_allclose(W, tensor(module, variables, N, M), rtol=1e-4, atol=1e-5)


def test_normalized_mfb_is_its_composition():
    _, variables, x, z = drawn('mfb')
    composition = is_its_composition(MFB(K, factors=3, normalize=True), variables, x, z)
    with pytest.raises(ValueError, match='not a single product'):
        list(composition)
    with pytest.raises(ValueError, match='without dropout'):
        as_mi(MFB(K, factors=3, dropout=0.5), variables, x, z, deterministic=False)


@functools.cache
def draws(count):
    return jax.random.split(prng.key(0), count)


@all_modules
@pytest.mark.parametrize('context', ['dense', 'one_hot'])
def test_unit_variance_at_initialization(name, context):
    n, m, batch = 24, 16, 128
    module = MODULES[name](32, context=context)
    if name in ('mutan', 'block'):
        module = module.clone(hidden=32)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, n)).astype(np.float32)
    z = rng.normal(size=(batch, m)).astype(np.float32)
    if context == 'one_hot':
        z = np.eye(m, dtype=np.float32)[np.arange(batch) % m]
    variance = jax.jit(jax.vmap(lambda key: module.init_with_output(key, x, z)[0].var()))
    variances = variance(draws(32))
    assert 0.75 < variances.mean() < 1.25, variances


@all_modules
def test_bf16_is_close_to_f32(name):
    module, variables, x, z = drawn(name)
    y = apply(module.clone(dtype=jnp.bfloat16))(variables, x, z)
    exact = apply(module)(variables, x, z)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 1e-2


@all_modules
def test_parameters_have_the_dtype_that_was_asked_for(name):
    module, _, x, z = drawn(name)
    module = module.clone(param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, z)
    assert {a.dtype for a in jax.tree.leaves(shapes)} <= {jnp.dtype('bfloat16')}


@all_modules
def test_gradients_are_those_of_finite_differences(name):
    module, variables, x, z = drawn(name)
    args = variables, x, z
    check_grads(apply(module), args, order=1, modes=['rev'], atol=2e-2, rtol=2e-2)


@all_modules
def test_vmap_over_rows_is_the_call_on_all(name):
    module, variables, x, z = drawn(name)
    rows = jax.vmap(apply(module), in_axes=(None, 0, 0))(variables, x, z)
    np.testing.assert_allclose(rows, apply(module)(variables, x, z), rtol=1e-5, atol=1e-5)


def test_mutan_is_block_with_one_block():
    module, variables, x, z = drawn('mutan')
    p = variables['params']
    as_block = p | {'M': p['M'][None], 'N': p['N'][None]}
    single_block = BLOCK(K, rank=2, blocks=1, hidden=4)
    np.testing.assert_allclose(
        apply(single_block)({'params': as_block}, x, z),
        apply(module)(variables, x, z),
        rtol=1e-5,
        atol=1e-6,
    )


def core(module):
    """W of the module where P, Q and O are the identity."""
    h = module.features
    variables = random_variables(module, np.zeros(h), np.zeros(h))
    eye = {name: np.eye(h, dtype=np.float32) for name in 'PQO'}
    return tensor(module, {'params': variables['params'] | eye}, h, h)


def test_the_slices_of_mutan_s_core_have_rank_r():
    W = core(MUTAN(5, rank=2))
    assert [np.linalg.matrix_rank(W[:, :, i], tol=1e-4) for i in range(5)] == [2] * 5


def test_block_s_core_is_zero_off_the_blocks_of_its_diagonal():
    W = core(BLOCK(6, rank=1, blocks=3))
    i, j, k = np.indices((6, 6, 6)) // 2
    np.testing.assert_array_equal(np.abs(W) > 1e-6, (i == j) & (j == k))


def test_normalized_mfb_has_length_1_and_the_signed_root_s_proportions():
    module, variables, x, z = drawn('mfb')
    y = apply(module)(variables, x, z)
    normed = apply(MFB(K, factors=3, normalize=True))(variables, x, z)
    np.testing.assert_allclose(jnp.linalg.norm(normed, axis=-1), 1, rtol=1e-5)
    expected = np.sign(y) * np.sqrt(np.abs(y))
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(normed, expected, rtol=1e-4, atol=1e-6)
    in_bf16 = apply(MFB(K, factors=3, normalize=True, dtype=jnp.bfloat16))(variables, x, z)
    np.testing.assert_allclose(in_bf16.astype(jnp.float32), normed, atol=3e-2)


def test_normalized_mfb_of_zero_is_zero_with_a_finite_gradient():
    _, variables, x, z = drawn('mfb')
    module = MFB(K, factors=3, normalize=True)
    x = x * np.array([0, 1], np.float32)[:, None, None]
    y, vjp = jax.vjp(lambda x: apply(module)(variables, x, z), x)
    assert not y[0].any() and y[1].any()
    assert jnp.isfinite(vjp(jnp.ones_like(y))[0]).all()


def test_mfb_drops_factors_before_the_sum():
    _, variables, x, z = drawn('mfb')
    module = MFB(K, factors=3, dropout=0.5)
    y, kept = apply(module)(variables, x, z), apply(MFB(K, factors=3))(variables, x, z)
    np.testing.assert_array_equal(y, kept)
    p = variables['params']
    factors = (2 * (z @ p['P']) * (x @ p['Q'])).reshape(2, 4, K, 3)
    subsets = np.array(list(itertools.product([0, 1], repeat=3)))
    possible = np.einsum('btkf,sf->btks', factors, subsets)  # [2, 4, K, 8]
    dropped = module.apply(variables, x, z, deterministic=False, rngs={'dropout': prng.key(0)})
    off = np.abs(np.asarray(dropped)[..., None] - possible)
    np.testing.assert_allclose(off.min(-1), 0, atol=1e-5)
    assert len(np.unique(off.argmin(-1))) > 4


def test_compact_pooling_keeps_inner_products_in_expectation():
    _, _, x, z = drawn('compact')
    x, z = jnp.stack([x[0, 0], x[0, 0] + 0.3]), jnp.stack([z[0, 0], z[0, 0] - 0.3])
    outputs = [CompactBilinear(16, seed=seed).apply({}, x, z) for seed in range(200)]
    products = np.array([float(y[0] @ y[1]) for y in outputs])
    expected = 16 / (M * N) * (x[0] @ x[1]) * (z[0] @ z[1])
    error = products.std() / np.sqrt(200)
    assert abs(products.mean() - expected) < 4 * error < 0.5 * abs(expected)


def test_compact_pooling_has_no_parameters_and_another_seed_has_other_hashes():
    module, variables, x, z = drawn('compact')
    assert not variables
    hash_z, sign_z, hash_x, sign_x = module.draw_hashes(1000, 1000)
    assert set(hash_z) == set(hash_x) == set(range(K))
    assert set(sign_z) == set(sign_x) == {-1, 1}
    y = module.apply({}, x, z)
    np.testing.assert_array_equal(module.apply({}, x, z), y)
    assert not np.allclose(CompactBilinear(K, seed=1).apply({}, x, z), y)


@all_modules
def test_bad_input_is_refused(name):
    module, variables, x, z = drawn(name)
    with pytest.raises(ValueError, match='do not broadcast'):
        module.apply(variables, x, np.zeros((3, 1, M)))
    with pytest.raises(ValueError, match="unknown context 'onehot'; did you mean 'one_hot'"):
        module.clone(context='onehot').apply(variables, x, z)


@pytest.mark.parametrize('blocks', [0, 4])
def test_blocks_that_do_not_divide_the_hidden_features_are_refused(blocks):
    with pytest.raises(ValueError, match=f'blocks = {blocks}: expected a divisor of hidden = 6'):
        BLOCK(6, rank=2, blocks=blocks).init(prng.key(0), np.zeros(N), np.zeros(M))
