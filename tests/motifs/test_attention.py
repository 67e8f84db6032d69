import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import rows
from mi.motifs.attention import (
    Attention,
    GatedCrossAttention,
    LatentCrossAttention,
    masked_softmax,
)
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention, convert_convolution
from mi.motifs.positions import rotate
from mi.unify import as_mi
from tests import prng
from tests.motifs.checks import is_its_composition


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


B, T, S, N, M, HEADS = 2, 4, 6, 8, 5, 4
X, Z = random(0, B, T, N), random(1, B, S, M)
LONG = random(2, B, S, N)
GRID = random(3, B, 4, 5, 3)
MASK = random(4, B, T, S) < 0.3
KEY = prng.key(5)

SETTINGS = {
    'plain': {},
    'causal': {'causal': True},
    'grouped': {'kv_heads': 2, 'causal': True},
    'window': {'window': 2},
    'causal window': {'window': 3, 'causal': True},
    'rotary': {'positions': 'rotary'},
    'rotary grouped': {'positions': 'rotary', 'kv_heads': 1, 'causal': True},
    'relative': {'positions': 'relative'},
    'relative causal': {'positions': 'relative', 'causal': True},
    'relative grouped': {'positions': 'relative', 'causal': True, 'kv_heads': 2, 'window': 3},
}


def parameters(module, *inputs):
    """Variables with random numbers in all of them, and nothing compiled to draw them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    return jax.tree.map(lambda p: rng.normal(0, 0.4, p.shape).astype(p.dtype), shapes)


def new_cache(module, x):
    return jax.jit(lambda: module.init(KEY, x, decode=True)['cache'])()


def numpy(variables):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), variables['params'])


def run(module, variables, *inputs, **options):
    y = jax.jit(functools.partial(module.apply, **options))(variables, *inputs)
    return jax.tree.map(np.asarray, y)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def flax_attention(p, x, z, mask=None, heads=HEADS, kv_heads=None):
    """flax's multi-head attention with our parameters, each key head copied to its group."""
    kv_heads = kv_heads or heads

    def dense(name, its_heads):
        kernel, bias = p[name]['V'], p[name]['b']
        kernel = np.repeat(kernel.reshape(len(kernel), its_heads, -1), heads // its_heads, 1)
        return {
            'kernel': kernel,
            'bias': np.repeat(bias.reshape(its_heads, -1), heads // its_heads, 0),
        }

    width = p['query']['b'].size
    out = {'kernel': p['out']['V'].reshape(heads, width // heads, -1), 'bias': p['out']['b']}
    params = {
        'query': dense('query', heads),
        'key': dense('key', kv_heads),
        'value': dense('value', kv_heads),
        'out': out,
    }
    module = nn.MultiHeadDotProductAttention(
        heads, qkv_features=width, out_features=p['out']['b'].size
    )
    mask = None if mask is None else mask[:, None]
    return run(module, {'params': params}, x, z, mask=mask)


def loop_attention(p, x, z, kv_heads=HEADS, positions='none', causal=False, window=None, mask=None):
    """x [T, n], z [S, m] → [T, k], one query and one head at a time, by the papers' equations."""
    t_max, s_max, d = len(x), len(z), p['query']['b'].size // HEADS
    y = np.zeros((t_max, p['out']['b'].size)) + p['out']['b']
    half = d // 2
    frequencies = np.array([10_000 ** (-2 * j / d) for j in range(half)])

    def turned(a, position):
        pairs = (a[:half] + 1j * a[half:]) * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    def sinusoid(distance):
        n = x.shape[1]
        phases = [distance * 10_000 ** (-2 * j / n) for j in range(n // 2)]
        return np.array([math.sin(a) for a in phases] + [math.cos(a) for a in phases])

    def projected(name, token, head):
        return (
            token @ p[name]['V'][:, d * head : d * (head + 1)]
            + p[name]['b'][d * head : d * (head + 1)]
        )

    for t in range(t_max):
        at = t + s_max - t_max
        for head in range(HEADS):
            kv_head = head // (HEADS // kv_heads)
            query = projected('query', x[t], head)
            scores, values = [], []
            for s in range(s_max):
                if (causal and s > at) or (window and abs(at - s) >= window):
                    continue
                if mask is not None and not mask[t, s]:
                    continue
                key = projected('key', z[s], kv_head)
                if positions == 'rotary':
                    score = turned(query, at) @ turned(key, s)
                elif positions == 'relative':
                    r = sinusoid(at - s) @ p['R'][:, d * kv_head : d * (kv_head + 1)]
                    score = (query + p['u'][head]) @ key + (query + p['v'][head]) @ r
                else:
                    score = query @ key
                scores.append(score / math.sqrt(d))
                values.append(projected('value', z[s], kv_head))
            if scores:
                e = np.exp(np.array(scores) - max(scores))
                y[t] += (e / e.sum()) @ np.array(values) @ p['out']['V'][d * head : d * (head + 1)]
    return y


def loops(variables, x, z, mask=None, **options):
    x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
    masks = [None] * len(x) if mask is None else np.asarray(mask)
    p = numpy(variables)
    rows = zip(x, z, masks, strict=True)
    return np.stack([loop_attention(p, a, b, mask=c, **options) for a, b, c in rows])


@pytest.mark.parametrize('kv_heads', [None, 2, 1])
def test_self_attention_is_flaxs_with_key_heads_copied_to_their_group(kv_heads):
    module = Attention(HEADS, features=6, head_features=2, kv_heads=kv_heads)
    variables = parameters(module, X)
    expected = flax_attention(variables['params'], X, X, kv_heads=kv_heads)
    close(run(module, variables, X), expected)


def test_cross_attention_with_a_mask_is_flaxs():
    mask = MASK | (np.arange(S) == 0)[None, None]  # flax has no rows without a key
    module = Attention(HEADS)
    variables = parameters(module, X, Z)
    expected = flax_attention(variables['params'], X, Z, mask)
    close(run(module, variables, X, Z, mask), expected)


def test_causal_attention_is_flaxs_with_a_causal_mask():
    module = Attention(HEADS, causal=True)
    variables = parameters(module, X)
    mask = nn.make_causal_mask(X[..., 0], dtype=bool)[:, 0]
    close(run(module, variables, X), flax_attention(variables['params'], X, X, mask))


@pytest.mark.parametrize('setting', SETTINGS)
def test_self_attention_is_the_loop_over_queries_and_heads(setting):
    module = Attention(HEADS, **SETTINGS[setting])
    variables = parameters(module, X)
    close(run(module, variables, X), loops(variables, X, X, **SETTINGS[setting]))


@pytest.mark.parametrize('setting', ['causal window', 'rotary', 'relative', 'relative grouped'])
@pytest.mark.parametrize('asking', [1, 7])
def test_queries_stand_at_the_end_of_the_keys(asking, setting):
    x = random(6, B, asking, N)
    module = Attention(HEADS, **SETTINGS[setting])
    variables = parameters(module, x, Z)
    close(run(module, variables, x, Z), loops(variables, x, Z, **SETTINGS[setting]))


def test_a_memory_of_earlier_tokens_gives_what_the_whole_sequence_gives():
    module = Attention(HEADS, positions='relative', causal=True)
    variables = parameters(module, LONG)
    whole = run(module, variables, LONG)
    close(run(module, variables, LONG[:, -2:], LONG), whole[:, -2:])


@pytest.mark.parametrize('positions', ['none', 'rotary', 'relative'])
def test_order_matters_only_with_positions(positions):
    module = Attention(HEADS, positions=positions)
    variables = parameters(module, LONG)
    mirrored = run(module, variables, LONG[:, ::-1])[:, ::-1]
    gap = np.abs(mirrored - run(module, variables, LONG)).max()
    assert gap < 1e-5 if positions == 'none' else gap > 1e-2


@pytest.mark.parametrize('positions', ['rotary', 'relative'])
def test_scores_depend_on_distances_and_not_on_where_the_window_is(positions):
    module = Attention(HEADS, positions=positions, window=2)
    variables = parameters(module, LONG)
    alone = run(module, variables, LONG[:, 1:])
    close(run(module, variables, LONG)[:, 2:], alone[:, 1:])


@pytest.mark.parametrize('setting', ['causal window', 'rotary grouped', 'relative causal'])
def test_outputs_have_no_gradient_to_later_tokens_or_those_out_of_the_window(setting):
    module = Attention(HEADS, **SETTINGS[setting])
    window = SETTINGS[setting].get('window') or S
    variables = parameters(module, LONG)
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(variables, x[None])[0]))(LONG[0])
    influence = np.abs(jacobian).sum((1, 3))
    at = np.arange(S)
    distance = at[:, None] - at[None]
    seen = (distance >= 0) & (distance < window)
    np.testing.assert_array_equal(influence > 0, seen)


@pytest.mark.parametrize('setting', ['plain', 'causal', 'rotary', 'relative'])
def test_a_masked_attention_is_the_loop_that_leaves_masked_keys_out(setting):
    module = Attention(HEADS, **SETTINGS[setting])
    variables = parameters(module, X, Z)
    close(run(module, variables, X, Z, MASK), loops(variables, X, Z, MASK, **SETTINGS[setting]))


def test_padded_keys_are_as_if_they_were_not_there():
    module = Attention(HEADS)
    variables = parameters(module, X, Z)
    padding = np.arange(S)[None, None] < 4
    padded = run(module, variables, X, np.where(padding.mT, Z, 1e4), padding)
    close(padded, run(module, variables, X, Z[:, :4]))


def test_a_query_without_keys_gives_the_bias_and_no_nan():
    module = Attention(HEADS)
    variables = parameters(module, X, Z)
    mask = np.ones((B, T, S), bool)
    mask[0, 1] = False

    y = run(module, variables, X, Z, mask)
    b = variables['params']['out']['b']
    close(y[0, 1], b, 1e-7)
    assert np.abs(y[0, 0] - b).max() > 1e-2
    gradient = jax.grad(lambda *inputs: module.apply(*inputs, mask).sum(), argnums=(0, 1, 2))
    gradients = jax.jit(gradient)(variables, X, Z)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[1][0, 1], 0)


@pytest.mark.parametrize('positions', ['rotary', 'relative'])
def test_an_empty_batch_gives_an_empty_output(positions):
    module = Attention(HEADS, kv_heads=2, causal=True, positions=positions)
    assert module.apply(parameters(module, X), X[:0]).shape == (0, T, N)


def test_leading_axes_broadcast():
    module = Attention(HEADS, positions='relative')
    x, z = random(7, 3, 1, T, N), random(8, B, S, M)
    variables = parameters(module, x, z)
    mask = MASK[None, :, :1]
    y = run(module, variables, x, z, mask)
    assert y.shape == (3, B, T, N)
    p, whole = numpy(variables), np.broadcast_to(mask, (1, B, T, S))
    for i, j in np.ndindex(3, B):
        alone = loop_attention(p, x[i, 0], z[j], positions='relative', mask=whole[0, j])
        close(y[i, j], alone)


def decoded(module, variables, x, sizes, mask=None):
    """The outputs of calls with these numbers of tokens, with an empty cache as long as x."""
    cache = new_cache(module, x)

    @jax.jit
    def step(cache, x, mask):
        together = {**variables, 'cache': cache}
        return module.apply(together, x, None, mask, decode=True, mutable=['cache'])

    outputs, start = [], 0
    for size in sizes:
        part = None if mask is None else mask[:, start : start + size]
        y, updated = step(cache, x[:, start : start + size], part)
        cache, start = updated['cache'], start + size
        outputs.append(y)
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    'setting', ['causal window', 'rotary grouped', 'relative causal', 'relative grouped']
)
def test_decoding_with_a_cache_is_the_whole_pass(setting):
    module = Attention(HEADS, **SETTINGS[setting])
    variables = parameters(module, LONG)
    close(decoded(module, variables, LONG, (3, 1, 1, 1)), run(module, variables, LONG))


def test_decoding_takes_a_mask_over_the_whole_cache():
    module = Attention(HEADS, causal=True)
    variables = parameters(module, LONG)
    mask = random(7, B, S, S) < 0.3
    expected = loops(variables, LONG, LONG, mask, causal=True)
    close(decoded(module, variables, LONG, (3, 3), mask), expected)


def test_a_call_past_the_end_of_the_cache_gives_nan_and_not_a_wrong_answer():
    module = Attention(HEADS, causal=True)
    variables = parameters(module, LONG)
    sizes = (4, 2, 1)
    x = np.concatenate([LONG, LONG[:, :1]], axis=1)
    cache = new_cache(module, LONG)
    finite, start = [], 0
    for size in sizes:
        together = {**variables, 'cache': cache}
        part = x[:, start : start + size]
        y, updated = run(module, together, part, decode=True, mutable=['cache'])
        cache, start = updated['cache'], start + size
        finite.append(np.isfinite(y).all())
    assert finite == [True, True, False]
    assert np.isnan(y).all()


def test_a_cache_that_does_not_fit_is_refused():
    module = Attention(HEADS, causal=True)
    params = parameters(module, X)
    cache = new_cache(module, X)

    def call(x, variables):
        run(module, variables, x, decode=True, mutable=['cache'])

    with pytest.raises(ValueError, match="expected a 'cache' collection"):
        call(X, params)
    with pytest.raises(ValueError, match=r'cannot hold keys \(2, 4, 6, 2\)'):
        call(LONG, {**params, 'cache': cache})
    with pytest.raises(ValueError, match='Initialize it with this batch'):
        call(X[:1], {**params, 'cache': cache})


def test_dropout_drops_whole_weights_and_scales_the_rest():
    module = Attention(1, dropout=0.5)
    x = random(9, 1, 64, N)
    z = random(10, 1, 1, M)
    variables = parameters(module, x, z)
    b = variables['params']['out']['b'].reshape(1, -1)
    kept = run(module, variables, x, z)[0] - b
    some = run(module, variables, x, z, deterministic=False, rngs={'dropout': KEY})[0] - b
    ratio = some[:, 0] / kept[:, 0]
    dropped = np.abs(ratio) < 1e-3
    assert 16 < dropped.sum() < 48
    close(some, np.where(dropped[:, None], 0.0, 2 * kept), 1e-4)


def test_rows_alone_drop_the_weights_that_they_drop_in_the_batch():
    module = Attention(HEADS, dropout=0.5)
    x, z = random(9, 4, T, N), random(10, 4, S, M)
    variables = parameters(module, x, z)
    whole = run(module, variables, x, z, deterministic=False, rngs={'dropout': KEY})
    with rows.select_rows(jnp.array([2, 3])):
        part = module.apply(variables, x[2:], z[2:], deterministic=False, rngs={'dropout': KEY})
    close(part, whole[2:], 1e-5)


def test_gated_cross_attention_is_the_input_at_the_start_and_its_gate_can_learn():
    module = GatedCrossAttention(HEADS)
    variables = jax.jit(module.init)(KEY, X, Z)
    np.testing.assert_array_equal(run(module, variables, X, Z), X)
    gradient = jax.jit(jax.grad(lambda v: (module.apply(v, X, Z) ** 2).sum()))(variables)
    assert abs(gradient['params']['a']) > 1e-2


def test_gated_cross_attention_is_flaxs_attention_through_a_gate():
    module = GatedCrossAttention(HEADS, kv_heads=2, head_features=3)
    variables = parameters(module, X, Z)
    p = variables['params']
    mask = MASK | (np.arange(S) == 0)[None, None]
    y = X + np.tanh(p['a']) * flax_attention(p['attention'], X, Z, mask, kv_heads=2)
    close(run(module, variables, X, Z, mask), y)


def test_latent_cross_attention_is_flaxs_with_the_latents_as_queries():
    module = LatentCrossAttention(3, 6, heads=2)
    variables = parameters(module, Z)
    p = variables['params']
    latents = np.broadcast_to(p['latents'], (B, 3, 6))
    mask = np.arange(S)[None, None] < np.array([4, 6]).reshape(B, 1, 1)
    whole = np.broadcast_to(mask, (B, 3, S))
    y = latents + flax_attention(p['attention'], latents, Z, whole, heads=2)
    close(run(module, variables, Z, mask), y)


def test_a_head_on_the_grid_weighs_positions_by_the_quadratic_encoding():
    module = ConvolutionalSelfAttention(3, 2)
    x = GRID[0]
    variables = parameters(module, x)
    p, image = numpy(variables), np.asarray(x, np.float64)
    rows, columns, _ = image.shape
    y = np.zeros((rows, columns, 2)) + p['b']
    places = [(i, j) for i in range(rows) for j in range(columns)]
    for q in places:
        for h in range(3):
            Delta = p['Delta'][h]
            v = -p['alpha'][h] * np.array([1, -2 * Delta[0], -2 * Delta[1]])
            offsets = [np.subtract(k, q) for k in places]
            scores = np.array([v @ [d @ d, d[0], d[1]] for d in offsets])
            e = np.exp(scores - scores.max())
            weights = e / e.sum()
            seen = sum(w * image[k] for w, k in zip(weights, places, strict=True))
            y[q] += seen @ p['V'][h]
    close(run(module, variables, x), y)


@pytest.mark.parametrize('size', [(3, 3), (2, 3), (5, 4)])
def test_with_narrow_heads_it_is_a_convolution_that_pads_with_the_edge(size):
    kernel, b = random(11, *size, 3, 2), random(12, 2)
    low = [(k - 1) // 2 for k in size]
    high = [k // 2 for k in size]
    padded = np.pad(GRID, [(0, 0), (low[0], high[0]), (low[1], high[1]), (0, 0)], mode='edge')
    convolve = jax.lax.conv_general_dilated
    options = {'window_strides': (1, 1), 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    expected = convolve(padded, kernel, padding='VALID', **options) + b.reshape(1, 1, 1, 2)
    module = ConvolutionalSelfAttention(math.prod(size), 2)
    y = run(module, {'params': convert_convolution(kernel, b)}, GRID)
    close(y, expected)

    zeros = convolve(GRID, kernel, padding='SAME', **options) + b.reshape(1, 1, 1, 2)
    inside = np.s_[:, low[0] : 4 - high[0], low[1] : 5 - high[1]]
    close(y[inside], zeros[inside])


def test_the_parameters_of_a_convolution_are_those_the_module_has():
    module = ConvolutionalSelfAttention(9, 2)
    theirs = jax.eval_shape(module.init, KEY, GRID)['params']
    ours = convert_convolution(random(11, 3, 3, 3, 2))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), ours) == jax.tree.map(
        lambda p: (p.shape, p.dtype), theirs
    )
    close(ours['b'], 0)


@pytest.mark.parametrize('setting', ['grouped', 'rotary', 'relative'])
def test_self_attention_is_products_of_the_one_equation(setting):
    module = Attention(HEADS, **SETTINGS[setting])
    variables = parameters(module, X)
    composition = is_its_composition(module, variables, X)
    names = [product.name for product in composition.products]
    assert ('position scores' in names) == (module.positions == 'relative')


@pytest.mark.parametrize('setting', ['rotary grouped', 'relative grouped'])
def test_cross_attention_with_a_mask_is_products_of_the_one_equation(setting):
    module = Attention(HEADS, **SETTINGS[setting])
    variables = parameters(module, X, Z)
    is_its_composition(module, variables, X, Z, MASK)


def test_the_scores_are_the_bilinear_form_of_the_query_and_key_matrices():
    module = Attention(HEADS)
    variables = parameters(module, X, Z)
    scores, _ = is_its_composition(module, variables, X, Z).products
    query, key = numpy(variables)['query'], numpy(variables)['key']
    values = scores()  # U and b are the same for all keys, so that the output does not show them
    for h in range(HEADS):
        head = np.s_[..., 2 * h : 2 * h + 2]
        close(scores.W[..., h], query['V'][head] @ key['V'][head].T / math.sqrt(2))
        q, k = (
            tokens @ part['V'][head] + part['b'][head] for tokens, part in ((X, query), (Z, key))
        )
        close(values[..., h], q @ k.mT / math.sqrt(2))


def test_the_other_motifs_are_products_of_the_one_equation():
    module = GatedCrossAttention(HEADS, kv_heads=2)
    is_its_composition(module, parameters(module, X, Z), X, Z, MASK)
    module = LatentCrossAttention(T, N, heads=HEADS, kv_heads=2)
    is_its_composition(module, parameters(module, Z), Z, MASK[:, :1])
    module = ConvolutionalSelfAttention(3, 2)
    is_its_composition(module, parameters(module, GRID), GRID)


def test_a_composition_has_no_dropout_and_no_cache():
    module = Attention(HEADS, causal=True, dropout=0.1)
    variables = parameters(module, X)
    with pytest.raises(ValueError, match='without dropout'):
        as_mi(module, variables, X, deterministic=False)
    with pytest.raises(ValueError, match='decode=True'):
        as_mi(module, variables, X, decode=True)


BF16 = {
    'none': (Attention(HEADS, dtype=jnp.bfloat16), (X, Z, MASK)),
    'rotary': (Attention(HEADS, positions='rotary', dtype=jnp.bfloat16), (LONG,)),
    'relative': (Attention(HEADS, positions='relative', dtype=jnp.bfloat16), (LONG,)),
    'gated': (GatedCrossAttention(HEADS, dtype=jnp.bfloat16), (X, Z)),
    'latent': (LatentCrossAttention(3, 6, dtype=jnp.bfloat16), (Z,)),
    'grid': (ConvolutionalSelfAttention(4, 6, dtype=jnp.bfloat16), (GRID,)),
}


@pytest.mark.parametrize('name', BF16)
def test_in_bf16_it_is_close_to_f32_with_parameters_in_f32(name):
    module, inputs = BF16[name]
    variables = parameters(module, *inputs)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    y = run(module, variables, *inputs)
    assert y.dtype == jnp.bfloat16
    exact = run(module.clone(dtype=None), variables, *inputs)
    assert exact.dtype == jnp.float32
    assert np.linalg.norm(y.astype(np.float32) - exact) < 1e-2 * np.linalg.norm(exact)


def test_in_bf16_scores_are_not_rounded_before_the_softmax():
    module = Attention(1, 2, dtype=jnp.bfloat16)
    x, z = np.array([[16.0, 1.0]]), np.array([[16.0, 0.0], [16.0, 0.5]])
    same = {'V': np.eye(2), 'b': np.zeros(2)}
    variables = {'params': {name: same for name in ('query', 'key', 'value', 'out')}}
    y = run(module, variables, x, z)  # of scores 256 and 256.5, over √2; bf16 has none between 2s
    expected = 0.5 / (1 + math.exp(-0.5 / math.sqrt(2)))
    close(float(y[0, 1]), expected, 5e-3)


def test_in_bf16_decoding_is_the_whole_pass_and_the_cache_is_bf16():
    module = Attention(HEADS, causal=True, positions='rotary', dtype=jnp.bfloat16)
    variables = parameters(module, LONG)
    cache = new_cache(module, LONG)
    assert cache['keys'].dtype == cache['values'].dtype == jnp.bfloat16
    y = decoded(module, variables, LONG, (3, 3)).astype(np.float32)
    close(y, np.asarray(run(module, variables, LONG), np.float32), 2e-2)


@pytest.mark.parametrize(
    ('fields', 'inputs', 'message'),
    [
        ({'heads': 3}, (X,), 'features = 8: expected a multiple of heads = 3'),
        ({'heads': 4, 'kv_heads': 3}, (X,), 'kv_heads = 3: expected a divisor of heads = 4'),
        ({'heads': 8, 'positions': 'rotary'}, (X,), 'head_features = 1: expected an even number'),
        ({'heads': 1, 'positions': 'relative'}, (Z,), 'x has 5 features: expected an even number'),
        ({'heads': 4, 'positions': 'rotery'}, (X,), "did you mean 'rotary'"),
        ({'heads': 4, 'window': 0}, (X,), 'window = 0'),
        ({'heads': 4}, (X[0, 0],), r'x must be \[..., T, n\]'),
        ({'heads': 4}, (X, random(0, 3, S, M)), 'do not broadcast'),
        ({'heads': 4}, (X, Z, MASK[0]), r'mask must be bool \(2, 4, 6\)'),
        ({'heads': 4}, (X, Z, MASK[:, :, :3]), r'got bool \(2, 4, 3\)'),
        ({'heads': 4}, (X, Z, MASK.astype(np.float32)), 'got float32'),
    ],
)
def test_what_does_not_fit_is_refused(fields, inputs, message):
    with pytest.raises(ValueError, match=message):
        parameters(Attention(**fields), *inputs)


def test_decoding_is_refused_where_there_is_nothing_to_continue():
    with pytest.raises(ValueError, match='got causal=False'):
        Attention(HEADS).init(KEY, X, decode=True)
    with pytest.raises(ValueError, match=r'z \(2, 6, 5\)'):
        Attention(HEADS, causal=True).init(KEY, X, Z, decode=True)


def test_a_grid_or_kernel_with_missing_axes_is_refused():
    with pytest.raises(ValueError, match=r'x must be \[..., rows, columns, n\]'):
        ConvolutionalSelfAttention(4, 2).init(KEY, X[0])
    with pytest.raises(ValueError, match=r'kernel must be \[K_1, K_2, n, k\]'):
        convert_convolution(X)


@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_the_softmax_has_the_derivative_of_jax_and_none_where_all_is_masked(mode):
    scores, tangent = random(0, 5, 7), random(1, 5, 7)
    mask = jnp.arange(7)[None] < jnp.array([0, 1, 3, 6, 7])[:, None]

    def reference(scores):
        return jnp.where(mask, jax.nn.softmax(scores, where=mask), 0)

    def differentiate(function):
        if mode == 'forward':
            return jax.jvp(function, (scores,), (tangent,))
        y, pull_back = jax.vjp(function, scores)
        return y, *pull_back(tangent)

    y, derivative = differentiate(lambda scores: masked_softmax(scores, mask))
    _, expected = differentiate(reference)
    np.testing.assert_allclose(y[1:], reference(scores)[1:], rtol=1e-6)
    np.testing.assert_allclose(derivative[1:], expected[1:], rtol=1e-5, atol=1e-7)
    assert not y[0].any() and not derivative[0].any()


def test_a_rotation_computes_sines_once_per_position():
    """And not for every batch entry and head, in the loop of the product with the tokens."""
    tokens = jnp.asarray(random(0, 4, 8, 2, 6))
    program = jax.jit(rotate, static_argnums=1).lower(tokens, 3).compile().as_text()
    assert not re.search(r' (co)?sine\(', program)  # they are constants
    expected = jax.jit(rotate)(tokens, jnp.asarray(3))
    np.testing.assert_allclose(rotate(tokens, 3), expected, rtol=1e-5, atol=1e-6)

    # All layers share the constants.
    twice = jax.jit(lambda t: rotate(rotate(t, 0), 0)).lower(tokens).as_text()
    assert len(re.findall(r'constant dense<(\[|")', twice)) == 2
