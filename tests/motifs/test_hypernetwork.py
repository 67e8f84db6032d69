import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mi.unify.hypernetwork
from mi import MultiplicativeInteraction
from mi.layers import Affine
from mi.motifs.hypernetwork import Hypernetwork, LinearHypernetwork, MLPHypernetwork
from tests import prng
from tests.motifs.checks import is_its_composition


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


R, T, N, M, K = 2, 5, 4, 3, 6
X, Z = random(0, R, T, N), random(1, R, M)
KEY = prng.key(2)


def run(module, variables, *inputs):
    """module.apply, compiled as a whole."""
    return jax.jit(module.apply)(variables, *inputs)


def start(module, *inputs):
    return jax.jit(module.init_with_output)(KEY, *inputs)


def parameters(module, *inputs):
    """Random values for all parameters, none of them zero."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    return jax.tree.map(lambda p: random(p.size, *p.shape) / 2, shapes)


def numpy(variables):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), variables['params'])


@pytest.mark.parametrize(
    'x_axes, z_axes', [((), ()), ((R, T), (R, 1)), ((R, T), (T,)), ((1, T), (R, 1))]
)
def test_the_linear_hypernetwork_is_the_full_form_with_the_same_parameters(x_axes, z_axes):
    x, z = random(3, *x_axes, N), random(4, *z_axes, M)
    module, full = LinearHypernetwork(K), MultiplicativeInteraction(K)
    variables = parameters(full, x, z)
    both = [
        jax.jit(jax.value_and_grad(lambda v, x, z, m=m: (m.apply(v, x, z) ** 2).sum(), (0, 1, 2)))(
            variables, x, z
        )
        for m in (module, full)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both[0], both[1]
    )


def test_the_tensors_of_the_linear_hypernetwork_are_its_parameters():
    module = LinearHypernetwork(K)
    variables = parameters(module, X, Z[:, None])
    tensors = is_its_composition(module, variables, X, Z[:, None])
    for tensor, name in zip(tensors, 'WUVb', strict=True):
        np.testing.assert_array_equal(tensor, variables['params'][name])


def hidden_units(p, z, activation, piece=None):
    h = z @ p['0']['V'] + p['0']['b']
    if piece is not None:
        h = h + p['e'][piece]
    for i in range(1, sum(name != 'e' for name in p)):
        h = activation(h) @ p[f'{i}']['V'] + p[f'{i}']['b']
    return activation(h)


def generated(p, z, chunk, activation, n, k):
    """W'(z) and b'(z), entry by entry."""
    if chunk is None:
        h = hidden_units(p['hidden'], z, activation)
        head = p['head']
        W = [[h @ head['W'][:, i, o] + head['V'][i, o] for o in range(k)] for i in range(n)]
        return np.array(W), h @ head['U'] + head['b']
    W, pieces = p['V'].copy(), len(p['hidden']['e']) - 1
    for i, o in np.ndindex(n, k):
        piece, entry = divmod(i * k + o, chunk)
        W[i, o] += hidden_units(p['hidden'], z, activation, piece) @ p['W'][:, entry]
    return W, hidden_units(p['hidden'], z, activation, pieces) @ p['U'] + p['b']


@pytest.mark.parametrize(
    'hidden, activation, reference, chunk',
    [
        (7, nn.relu, lambda a: np.maximum(a, 0), None),
        ((7, 5), jnp.tanh, np.tanh, None),
        ((7, 5), jnp.tanh, np.tanh, 5),
        (7, jnp.tanh, np.tanh, 100),
    ],
)
def test_the_mlp_hypernetwork_is_a_layer_with_the_weights_of_each_context(
    hidden, activation, reference, chunk
):
    module = MLPHypernetwork(K, hidden, activation, chunk=chunk)
    z = Z[:, None]
    variables = parameters(module, X, z)
    expected = np.zeros((R, T, K))
    for row in range(R):
        W, b = generated(numpy(variables), np.asarray(Z[row]), chunk, reference, N, K)
        expected[row] = np.asarray(X[row]) @ W + b
    np.testing.assert_allclose(run(module, variables, X, z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('chunk', [None, 5])
def test_the_mlp_hypernetwork_is_its_composition(chunk):
    module = MLPHypernetwork(K, (7, 5), chunk=chunk)
    variables = parameters(module, X, Z[:, None])
    is_its_composition(module, variables, X, Z[:, None])


def at_the_start(n, k, context='dense', **options):
    """Variances over several draws of the network: of y, and of the gradient of x for that of y."""
    m = 32
    module = MLPHypernetwork(k, context=context, **options)
    x, dy = random(3, m, n), random(4, m, k)
    z = random(5, m, m) if context == 'dense' else jnp.eye(m)

    @jax.jit
    @jax.vmap
    def draw(key):
        y, vjp = jax.vjp(lambda x: module.init_with_output(key, x, z)[0], x)
        return y.var(), vjp(dy)[0].var()

    return np.mean(draw(jax.random.split(KEY, 8)), axis=1)


@pytest.mark.parametrize(
    'n, k, options',
    [
        (64, 128, {}),
        (16, 32, {'hidden': (48, 48), 'activation': jnp.tanh}),
        (16, 32, {'chunk': 50, 'context': 'one_hot', 'activation': nn.gelu}),
    ],
)
def test_hyperfan_in_starts_at_unit_variance(n, k, options):
    y_variance, _ = at_the_start(n, k, **options)
    assert 0.85 < y_variance < 1.15


@pytest.mark.parametrize('n, k', [(16, 32), (32, 16)])
def test_hyperfan_out_starts_with_unit_variance_of_the_gradient(n, k):
    y_variance, dx_variance = at_the_start(n, k, hyperfan='out')
    assert 0.85 < dx_variance < 1.15
    # the generated bias makes up for what of y's variance n inputs leave open
    np.testing.assert_allclose(y_variance, max(1, n / k), rtol=0.15)


def test_the_head_starts_with_the_variances_of_the_formula():
    n, k, d = 16, 24, 64
    _, variables = start(MLPHypernetwork(k, (d,)), random(3, n), random(4, M))
    head = variables['params']['head']
    np.testing.assert_allclose(head['W'].var(), 1 / (2 * n * d * 0.5), rtol=0.1)  # E[relu²] = ½
    np.testing.assert_allclose(head['U'].var(), 1 / (2 * d * 0.5), rtol=0.1)
    assert not head['V'].any() and not head['b'].any()


def test_a_chunked_head_has_fewer_parameters_than_a_full_one():
    x, z = random(3, 32), random(4, M)
    size = lambda module: sum(  # noqa: E731
        p.size for p in jax.tree.leaves(jax.eval_shape(module.init, KEY, x, z))
    )
    assert 4 * size(MLPHypernetwork(32, (16,), chunk=64)) < size(MLPHypernetwork(32, (16,)))


@pytest.mark.parametrize('hidden, width', [(None, K), (10, 10), ((9, 8), 9)])
def test_hidden_is_a_width_or_several_or_that_of_the_output(hidden, width):
    module = MLPHypernetwork(K, hidden)
    shapes = jax.eval_shape(module.init, KEY, X[0], Z[0])['params']['hidden']
    assert shapes['0']['V'].shape == (M, width)


@pytest.mark.parametrize('module', [LinearHypernetwork(K), MLPHypernetwork(K, chunk=7)])
def test_bf16_is_close_to_f32(module):
    z = Z[:, None]
    variables = parameters(module, X, z)
    exact = run(module, variables, X, z)
    y = run(module.clone(dtype=jnp.bfloat16), variables, X, z)
    assert y.dtype == jnp.bfloat16
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 2e-2 * jnp.linalg.norm(exact)


class Block(nn.Module):
    """A target with dense layers, a normalization between them and a residual connection."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.LayerNorm()(Affine(5)(x)))
        return x + nn.Dense(x.shape[-1], use_bias=False)(h), h.sum()


class Last(nn.Module):
    """A target that multiplies what a module inside it makes by a parameter of its own."""

    @nn.compact
    def __call__(self, x, total):
        return {'y': x * self.param('scale', nn.initializers.ones, (1,)).reshape(1, 1), 't': total}


@pytest.mark.parametrize('chunk', [None, 4])
def test_a_hypernetwork_applies_its_target_with_the_parameters_of_each_context(chunk):
    module = Hypernetwork(nn.Dense(K), (7, 5), chunk=chunk)
    variables = parameters(module, X, Z)
    p = numpy(variables)
    flat = np.concatenate([p['V']['bias'], p['V']['kernel'].reshape(-1)])  # in alphabetical order
    expected = np.zeros((R, T, K))
    for row in range(R):
        z, theta = np.asarray(Z[row]), flat.copy()
        for i in range(len(flat)):
            piece, entry = (None, i) if chunk is None else divmod(i, chunk)
            h = hidden_units(p['hidden'], z, lambda a: np.maximum(a, 0), piece)
            theta[i] += h @ p['W'][:, entry]
        expected[row] = np.asarray(X[row]) @ theta[K:].reshape(N, K) + theta[:K]
    np.testing.assert_allclose(run(module, variables, X, Z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'target, chunk, layers', [(nn.Sequential([Block(), Last()]), 4, 2), (Affine(K), None, 1)]
)
def test_a_hypernetwork_is_its_composition(target, chunk, layers):
    module = Hypernetwork(target, 7, chunk=chunk)
    variables = parameters(module, X, Z)
    composition = is_its_composition(module, variables, X, Z, tolerance=1e-4)
    assert len(composition.products) == layers


def test_a_hypernetwork_starts_as_its_target_by_itself_for_every_context():
    y, variables = start(Hypernetwork(Block(), 7), X, Z)
    expected = jax.jit(jax.vmap(Block().apply, (None, 0)))({'params': variables['params']['V']}, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), y, expected)
    kernel = variables['params']['V']['Affine_0']['V']
    np.testing.assert_allclose(kernel.var(), 1 / N, rtol=0.6)
    np.testing.assert_array_equal(variables['params']['V']['LayerNorm_0']['scale'], 1)


def test_every_parameter_and_both_streams_of_a_hypernetwork_get_a_gradient():
    module = Hypernetwork(Block(), (7, 5), activation=jnp.tanh, chunk=4)
    variables = parameters(module, X, Z)
    grads = jax.jit(jax.grad(lambda v, x, z: (module.apply(v, x, z)[0] ** 2).sum(), (0, 1, 2)))(
        variables, X, Z
    )
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(grads))


def test_one_context_makes_one_set_of_parameters_and_a_grid_of_contexts_a_grid_of_them():
    module = Hypernetwork(nn.Dense(K), 7)
    variables = parameters(module, X, Z)
    y = run(module, variables, X, Z)
    np.testing.assert_allclose(run(module, variables, X[0], Z[0]), y[0], rtol=1e-4, atol=1e-5)
    grid = run(module, variables, jnp.stack([X, X]), jnp.stack([Z, Z]))
    np.testing.assert_allclose(grid, jnp.stack([y, y]), rtol=1e-4, atol=1e-5)


def test_a_bf16_target_of_a_bf16_hypernetwork_is_close_to_f32():
    module = Hypernetwork(Affine(K), 7)
    variables = parameters(module, X, Z)
    exact = run(module, variables, X, Z)
    y = run(Hypernetwork(Affine(K, jnp.bfloat16), 7, dtype=jnp.bfloat16), variables, X, Z)
    assert y.dtype == jnp.bfloat16
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 2e-2 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    'module, x, z, message',
    [
        (LinearHypernetwork(K), X, Z, 'do not broadcast'),
        (MLPHypernetwork(K, ()), X, Z[0], 'has no hidden layers'),
        (MLPHypernetwork(K, hyperfan='fan_in'), X, Z[0], "unknown hyperfan 'fan_in'; known: in"),
        (MLPHypernetwork(K, chunk=0), X, Z[0], 'chunk = 0'),
        (Hypernetwork(nn.Dense(K), chunk=-1), X, Z, 'chunk = -1'),
        (Hypernetwork(nn.Dense(K)), X, Z[:1], r'must begin with the leading axes \(1,\) of z'),
        (Hypernetwork(nn.BatchNorm(True)), X, Z, "'batch_stats'"),
    ],
)
def test_bad_input_is_refused_in_words(module, x, z, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, KEY, x, z)


def test_a_target_with_no_layer_to_write_as_a_product_is_refused_by_as_mi():
    module = Hypernetwork(nn.LayerNorm(), 7)
    with pytest.raises(
        ValueError, match='target = LayerNorm: expected a target with a Dense or Affine layer'
    ):
        mi.unify.as_mi(module, parameters(module, X, Z), X, Z)
