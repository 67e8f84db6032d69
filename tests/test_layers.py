import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import mi
from mi.kernels.bilinear import ID_ORDERS, bilinear
from mi.kernels.linear import linear
from mi.layers import Affine, compute_gradients_early, one_hot
from tests import prng
from tests.motifs.checks import drawn, random

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden/bilinear.json').read_text())
FORMS = {
    'full': lambda n, **options: mi.MultiplicativeInteraction(n, **options),
    'low_rank': lambda n, **options: mi.LowRankMultiplicativeInteraction(n, rank=7, **options),
    'tucker': lambda n, **options: mi.TuckerMultiplicativeInteraction(n, rank=6, **options),
    'block': lambda n, **options: mi.BlockMultiplicativeInteraction(n, blocks=3, **options),
    'diagonal': lambda n, **options: mi.DiagonalMultiplicativeInteraction(**options),
    'scalar': lambda n, **options: mi.ScalarMultiplicativeInteraction(**options),
}


def test_full_form_is_torch_bilinear_plus_linear_terms():
    values = {k: jnp.asarray(v, jnp.float32) for k, v in GOLDEN.items() if k != 'torch'}
    params = {name: values[name] for name in 'WUVb'}
    layer = mi.MultiplicativeInteraction(2)
    y, vjp = jax.vjp(
        lambda p, x, z: layer.apply({'params': p}, x, z), params, values['x'], values['z']
    )
    dparams, dx, dz = vjp(values['dy'])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    close(y, values['y'])
    close(dx, values['dx'])
    close(dz, values['dz'])
    for name, gradient in dparams.items():
        close(gradient, values[f'd{name}'])


def test_without_W_it_is_a_dense_layer_on_the_concatenation():
    x, z = random(0, 6, 4), random(1, 6, 3)
    layer = mi.MultiplicativeInteraction(5)
    params = drawn(layer, x, z)['params']
    params = {**params, 'b': random(3, 5), 'W': jnp.zeros_like(params['W'])}
    kernel = jnp.concatenate([params['V'], params['U']])
    dense = nn.Dense(5).apply(
        {'params': {'kernel': kernel, 'bias': params['b']}}, jnp.concatenate([x, z], axis=-1)
    )
    np.testing.assert_allclose(layer.apply({'params': params}, x, z), dense, rtol=1e-5, atol=1e-6)
    concat = mi.MultiplicativeInteraction(5, use_W=False)
    del params['W']
    np.testing.assert_allclose(concat.apply({'params': params}, x, z), dense, rtol=1e-5, atol=1e-6)


def test_one_hot_context_is_a_multi_head_read_out():
    x, task = random(0, 6, 4), jnp.array([0, 2, 1, 1, 0, 2])
    layer = mi.MultiplicativeInteraction(5, context='one_hot')
    params = layer.init(prng.key(2), x, jax.nn.one_hot(task, 3))['params']
    heads = jnp.einsum('bn,bnk->bk', x, params['W'][task] + params['V'][None])
    heads += params['U'][task]
    y = layer.apply({'params': params}, x, jax.nn.one_hot(task, 3))
    np.testing.assert_allclose(y, heads, rtol=1e-5, atol=1e-6)


def test_low_rank_form_is_the_full_form_of_its_tensor():
    x, z = random(0, 6, 4), random(1, 6, 3)
    layer = mi.LowRankMultiplicativeInteraction(5, rank=7)
    p = drawn(layer, x, z)['params']
    full = {'W': jnp.einsum('mr,nr,rk->mnk', p['P'], p['Q'], p['O'])} | {k: p[k] for k in 'UVb'}
    np.testing.assert_allclose(
        layer.apply({'params': p}, x, z),
        mi.MultiplicativeInteraction(5).apply({'params': full}, x, z),
        rtol=1e-5,
        atol=1e-5,
    )


def test_diagonal_form_is_the_full_form_of_its_tensor():
    x, z = random(0, 6, 4), random(1, 6, 3)
    layer = mi.DiagonalMultiplicativeInteraction()
    p = drawn(layer, x, z)['params']
    p = {**p, 'b': random(3, 4)}
    eye = jnp.eye(4)
    full = {
        'W': p['W'][:, :, None] * eye[None],
        'V': p['V'][:, None] * eye,
        'U': p['U'],
        'b': p['b'],
    }
    np.testing.assert_allclose(
        layer.apply({'params': p}, x, z),
        mi.MultiplicativeInteraction(4).apply({'params': full}, x, z),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize('context', ['dense', pytest.param('one_hot', marks=pytest.mark.slow)])
@pytest.mark.parametrize('form', FORMS)
def test_the_sum_of_the_terms_has_the_variance_of_a_dense_layer(form, context):
    n, m, batch, draws = 64, 32, 256, 64

    def output_and_dense(seed):
        key, x_key, z_key = jax.random.split(prng.key(seed), 3)
        x = jax.random.normal(x_key, (batch, n))
        if context == 'dense':
            z = jax.random.normal(z_key, (batch, m))
        else:
            z = jax.nn.one_hot(jnp.arange(batch) % m, m)
        y, _ = FORMS[form](n, context=context).init_with_output(key, x, z)
        dense, _ = nn.Dense(n).init_with_output(key, x)
        return y.var(), dense.var()

    variances = np.transpose(jax.jit(jax.vmap(output_and_dense))(jnp.arange(draws)))
    ours, theirs = np.mean(variances, axis=0)
    assert abs(ours / theirs - 1) < 0.08, variances


def test_tucker_form_is_the_full_form_of_its_tensor():
    x, z = random(0, 6, 4), random(1, 6, 3)
    layer = mi.TuckerMultiplicativeInteraction(5, rank=2)
    p = drawn(layer, x, z)['params']
    W = np.einsum('ma,nb,abc,ck->mnk', p['P'], p['Q'], p['G'], p['O'])
    is_the_full_form(layer, p, x, z, W=W, U=p['U'], V=p['V'], b=p['b'])


@pytest.mark.parametrize('n, k', [(6, 3), (5, 4)], ids=['divides', 'last block cut'])
def test_block_form_is_the_full_form_of_its_tensor(n, k):
    x, z = random(0, 6, n), random(1, 6, 3)
    layer = mi.BlockMultiplicativeInteraction(k, blocks=3)
    p = drawn(layer, x, z)['params']
    rows, columns = p['W'].shape[2:]
    W = np.zeros((3, 3 * rows, 3 * columns))
    for i in range(3):
        W[:, i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = p['W'][i]
    is_the_full_form(layer, p, x, z, W=W[:, :n, :k], U=p['U'], V=p['V'], b=p['b'])


def test_scalar_form_is_the_full_form_of_its_tensor():
    x, z = random(0, 6, 4), random(1, 6, 3)
    layer = mi.ScalarMultiplicativeInteraction()
    p = {**drawn(layer, x, z)['params'], 'b': random(3, 4)}
    eye = np.eye(4)
    W = np.asarray(p['W'])[:, :, None] * eye[None]
    is_the_full_form(layer, p, x, z, W=W, U=p['U'], V=np.asarray(p['V']) * eye, b=p['b'])


def is_the_full_form(layer, params, x, z, W, U, V, b):
    expected = np.einsum('bm,mnk,bn->bk', *(np.asarray(a, np.float64) for a in (z, W, x)))
    expected += z @ U + x @ V + np.asarray(b)[None]
    y = layer.apply({'params': params}, x, z)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('lead, ids', [((90,), (90,)), ((3, 40), (3, 1)), ((40,), ())], ids=str)
@pytest.mark.parametrize('form', FORMS)
def test_integers_are_one_hot_contexts(form, lead, ids):
    x, z = random(0, *lead, 4), jax.random.randint(prng.key(1), ids, 0, 3)
    layer = FORMS[form](4, context='one_hot', contexts=3)
    variables = drawn(layer, x, z)
    y = jax.jit(layer.apply)(variables, x, z)
    expected = jax.jit(layer.apply)(variables, x, jax.nn.one_hot(z, 3))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_multi_head_computes_the_chosen_head_alone():
    x, ids = random(0, 64, 16), jnp.arange(64) % 30
    layer = mi.MultiHead(8, contexts=30)
    y, variables = layer.init_with_output(prng.key(2), x, ids)
    p = variables['params']
    assert set(p) == {'W', 'U'}
    expected = np.einsum('bn,bnk->bk', x, np.asarray(p['W'])[ids]) + np.asarray(p['U'])[ids]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    one_hot = jax.nn.one_hot(ids, 30)
    np.testing.assert_allclose(layer.apply(variables, x, one_hot), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer.apply(variables, x, 0 * one_hot), 0)
    jaxpr = str(jax.make_jaxpr(layer.apply)(variables, x, one_hot))
    assert '64,30,' not in jaxpr  # no [B, m, k] and no [B, m, n]


def test_integers_need_the_number_of_contexts_and_heads_need_one_hot_contexts():
    x, ids = random(0, 6, 4), jnp.arange(6) % 3
    with pytest.raises(ValueError, match=r'z is int32.*contexts=m'):
        mi.MultiplicativeInteraction(5).init(prng.key(0), x, ids)
    with pytest.raises(ValueError, match=r"MultiHead\.context = 'dense': expected 'one_hot'"):
        mi.MultiHead(5, context='dense').init(prng.key(0), x, random(1, 6, 3))


@pytest.mark.parametrize('form', FORMS)
def test_gradients(form):
    layer = FORMS[form](4)
    x, z = random(0, 2, 3, 4), random(1, 2, 1, 3)
    variables = drawn(layer, x, z)
    check_grads(
        jax.jit(layer.apply), (variables, x, z), order=1, modes=['rev'], atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize('form', FORMS)
def test_context_shared_over_time_equals_the_context_at_each_step(form):
    x, z = random(0, 2, 5, 4), random(1, 2, 1, 3)
    layer = FORMS[form](4)
    variables = drawn(layer, x, z)
    shared = jax.jit(layer.apply)(variables, x, z)
    step = jax.jit(layer.apply)
    steps = [step(variables, x[:, t], z[:, 0]) for t in range(5)]
    np.testing.assert_allclose(shared, jnp.stack(steps, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form', FORMS)
def test_parameters_are_f32_and_the_computation_bf16(form):
    x, z = random(0, 64, 16), random(1, 64, 8)
    layer = FORMS[form](16, dtype=jnp.bfloat16)
    y, variables = layer.init_with_output(prng.key(2), x, z)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    assert y.dtype == jnp.bfloat16
    exact = FORMS[form](16).apply(variables, x, z)
    assert float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 1e-2


@pytest.mark.parametrize('use', ['use_W', 'use_U', 'use_V', 'use_b'])
def test_a_term_that_is_switched_off_is_gone(use):
    x, z = random(0, 6, 4), random(1, 6, 3)
    layer = mi.MultiplicativeInteraction(5, **{use: False})
    params = drawn(layer, x, z)['params']
    name = use.removeprefix('use_')
    assert name not in params
    shape = {'W': (3, 4, 5), 'U': (3, 5), 'V': (4, 5), 'b': (5,)}[name]
    full = mi.MultiplicativeInteraction(5).apply(
        {'params': {**params, name: jnp.zeros(shape)}}, x, z
    )
    np.testing.assert_allclose(layer.apply({'params': params}, x, z), full, rtol=1e-5, atol=1e-6)


def test_streams_that_do_not_fit_are_refused():
    layer = mi.MultiplicativeInteraction(5)
    with pytest.raises(ValueError, match=r'x \(6, 4\) and z \(5, 3\) do not broadcast'):
        layer.init(prng.key(0), random(0, 6, 4), random(1, 5, 3))
    with pytest.raises(ValueError, match=r'x must be \[..., n\]'):
        layer.init(prng.key(0), jnp.float32(1), random(1, 3))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
    ('x_dtype', 'z_dtype', 'param_dtype', 'expected'),
    [
        (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.int32, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_without_a_dtype_it_is_that_of_both_streams_and_the_parameters(
    form, x_dtype, z_dtype, param_dtype, expected
):
    layer = FORMS[form](4, context='one_hot', contexts=3, param_dtype=param_dtype)
    z = jnp.zeros(6, z_dtype) if z_dtype == jnp.int32 else jnp.zeros((6, 3), z_dtype)
    x = jnp.zeros((6, 4), x_dtype)
    y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x, z)
    assert y.dtype == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}


def test_an_unknown_context_is_refused_before_it_decides_a_scale():
    x, z = random(0, 6, 4), random(1, 6, 3)
    for layer in (
        mi.MultiplicativeInteraction(5, 'onehot'),
        mi.DiagonalMultiplicativeInteraction('onehot'),
    ):
        with pytest.raises(ValueError, match="unknown context 'onehot'; did you mean 'one_hot'"):
            layer.init(prng.key(0), x, z)


def test_the_gradient_of_an_affine_map_is_in_operations_that_are_fast_on_cpu():
    """A sum over one axis for b; for V a product whose rows in memory are the longer axis."""
    x = jnp.zeros((32, 64, 96))
    layer = Affine(48)
    variables = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda variables: (layer.apply(variables, x) ** 2).sum())
    program = jax.jit(gradient).lower(variables).compile().as_text()
    assert re.search(r'f32\[(48,96\]\{1,0\}|96,48\]\{0,1\}) dot\(', program)
    assert not re.search(r'window=\{size=\d+x(?!1 )\d+', program)  # 32x32x1 over two axes
    assert not re.search(r' reduce\(.*dimensions=\{0,1\}', program)


@pytest.mark.parametrize('rows, is_wide', [(2048, True), (64, False)])
def test_the_gradient_of_an_output_embedding_is_a_wide_product_if_it_has_many_rows(rows, is_wide):
    """xᵀdy, transposed afterwards, and not dyᵀx, into which XLA turns it by itself."""
    x, table = jnp.ones((rows, 32)), jnp.ones((96, 32))
    gradient = jax.grad(lambda table: (linear(x, table.T) ** 2).sum())
    program = jax.jit(gradient).lower(table).compile().as_text()
    wide = re.search(r'f32\[(32,96\]\{1,0\}|96,32\]\{0,1\})[^\n]*(dot|fusion)\(', program)
    assert bool(wide) == is_wide


@pytest.mark.parametrize('form', ['low_rank', 'tucker'])
def test_a_form_of_factors_refuses_an_initializer_of_W(form):
    layer = FORMS[form](5, W_init=nn.initializers.ones)
    with pytest.raises(ValueError, match=r'Interaction\.W_init = .* expected None'):
        layer.init(jax.random.key(0), jnp.zeros((1, 6)), jnp.zeros((1, 4)))


def test_the_block_form_initializes_all_blocks_in_one_call():
    shapes = []
    layer = FORMS['block'](
        5, W_init=lambda key, shape, dtype: shapes.append(shape) or jnp.ones(shape, dtype)
    )
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 7)), jnp.zeros((1, 4)))
    assert shapes == [(3, 4, 3, 2)] and bool((variables['params']['W'] == 1).all())


@pytest.mark.parametrize('dtype', [jnp.int8, jnp.uint8])
def test_ids_of_few_bits_are_those_of_many_contexts(dtype):
    ids, x, W = jnp.asarray([0, 7, 100]), random(0, 3, 4), random(1, 300, 4, 5)
    for order in ID_ORDERS:
        y = bilinear(x, ids.astype(dtype), W, order=order)
        np.testing.assert_array_equal(y, bilinear(x, ids, W, order=order))
    np.testing.assert_array_equal(linear(ids.astype(dtype), W[:, 0]), W[ids, 0])
    np.testing.assert_array_equal(one_hot(ids.astype(dtype), 300, x.dtype), jnp.eye(300)[ids])


def test_early_gradients_come_before_those_of_the_layer_below():
    """XLA would compute all gradients of V after the last cotangent of a hidden layer."""
    num_layers, num_rows, num_features, num_hidden = 4, 1024, 32, 256

    def compile_update(is_early):
        def loss(params, x):
            for V, A in zip(*params, strict=True):
                if is_early:
                    x, V = compute_gradients_early(x, V)
                x = x + linear(jnp.tanh(linear(x, V)), A)
            return (x**2).sum()

        def update(params, x):
            gradients = jax.grad(loss)(params, x)
            norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients)))
            return jax.tree.map(lambda leaf: leaf / norm, gradients)

        return jax.jit(update).lower(params, x).compile()

    def count_early(compiled):
        """Count gradients of V and A before the last cotangent of a hidden layer."""
        program = compiled.as_text().split('ENTRY')[1]  # in the order of execution
        lines = [line for line in program.splitlines() if 'transpose(jvp' in line]
        shapes = [re.search(r'= f32\[([\d,]+)\]', line) for line in lines]
        sizes = [match and sorted(map(int, match[1].split(','))) for match in shapes]
        last_cotangent = max(i for i, size in enumerate(sizes) if size == [num_hidden, num_rows])
        return sizes[:last_cotangent].count([num_features, num_hidden])

    x = random(0, num_rows, num_features)
    V = 0.1 * random(1, num_layers, num_features, num_hidden)
    A = 0.1 * random(2, num_layers, num_hidden, num_features)
    params = list(V), list(A)
    late, early = compile_update(False), compile_update(True)
    assert (count_early(late), count_early(early)) == (0, num_layers - 1)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
        early(params, x),
        late(params, x),
    )
