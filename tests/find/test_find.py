"""`mi.find` on functions whose interactions are counted by hand in each test."""

import dataclasses
import functools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

import mi
from mi.find import Report, find
from tests.conftest import ROOT

N, M, K = 6, 4, 8
X, Z = jax.ShapeDtypeStruct((2, N), jnp.float32), jax.ShapeDtypeStruct((2, M), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((2, 5, K), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def motifs(report):
    return [interaction.motif for interaction in report.interactions]


def sides(report):
    return [interaction.streams for interaction in report.interactions]


def test_a_product_of_two_streams_is_one_interaction():
    report = find(lambda params, x, z: x * z, None, x=X, z=X)
    (interaction,) = report.interactions
    assert interaction.left == ('x',) and interaction.right == ('z',)
    assert (interaction.motif, interaction.primitive) == ('unnamed', 'mul')
    assert interaction.shape == (2, N) and interaction.times == 1
    assert interaction.flops == 2 * N and interaction.share == 1 and not interaction.is_self
    assert interaction.source.partition(':')[0] == __file__


# ------------------------------------------------------------------------------ motifs


V = spec(N, N)
A = spec(M, N)


@pytest.mark.parametrize(
    ('function', 'params', 'expected'),
    [
        (lambda p, x, z: jax.nn.sigmoid(z @ p['A']) * x, {'A': A}, ['gate']),
        (lambda p, x, z: 2 * jax.nn.sigmoid(z @ p['A']) * x, {'A': A}, ['gate']),
        (lambda p, x, z: (1 - jax.nn.sigmoid(z @ p['A'])) * x, {'A': A}, ['gate']),
        (lambda p, x, z: (jnp.tanh(z @ p['A']) / 2 + 0.5) * jnp.tanh(x), {'A': A}, ['gate']),
        (lambda p, x, z: jnp.tanh(z @ p['A']) * x, {'A': A}, ['gate']),
        (lambda p, x, z: jax.nn.silu(z @ p['A']) * (x @ p['V']), {'A': A, 'V': V}, ['gate']),
        (lambda p, x, z: jax.nn.relu(z @ p['A']) * (x @ p['V']), {'A': A, 'V': V}, ['gate']),
        (lambda p, x, z: jax.nn.silu(z @ p['A']) * jnp.sin(x), {'A': A}, ['gate']),
        (lambda p, x, z: jax.nn.relu(x @ p['V']) * (1 + z @ p['A']), {'A': A, 'V': V}, ['scale']),
        (lambda p, x, z: jax.nn.relu(x @ p['V']) * jax.nn.relu(z @ p['A']), {'A': A, 'V': V},
         ['unnamed']),
        (lambda p, x, z: (z @ p['A']) * (x @ p['V']), {'A': A, 'V': V}, ['bilinear pooling']),
        (lambda p, x, z: jnp.tanh(z @ p['A']) * jnp.tanh(x), {'A': A}, ['bilinear pooling']),
        (lambda p, x, z: (1 + z @ p['A']) * (x @ p['V']), {'A': A, 'V': V}, ['scale']),
        (lambda p, x, z: (z @ p['A']) * jnp.sin(x), {'A': A}, ['scale']),
        (lambda p, x, z: jnp.einsum('bm,bn->bmn', z, x), {}, ['bilinear pooling']),
        (lambda p, x, z: jnp.einsum('bm,mnk,bn->bk', z, p['W'], x), {'W': spec(M, N, K)},
         None),
        (lambda p, x, z: jnp.einsum('bnk,bn->bk', (z @ p['W']).reshape(2, N, K), x),
         {'W': spec(M, N * K)}, ['hypernetwork']),
        (lambda p, x, z: jax.nn.softmax(z @ p['A']) * x, {'A': A}, ['mixture of experts']),
        (lambda p, x, z: jax.nn.softmax((z @ p['A']) * x) * x, {'A': A},
         ['attention scores', 'attention mix']),
        (lambda p, x, z: x / z[:, :1], {}, ['unnamed']),
        (lambda p, x, z: jnp.abs(x) ** z[:, :1], {}, ['unnamed']),
        (lambda p, x, z: x[:, 0] @ z[:, 0], {}, ['unnamed']),
        (lambda p, x, z: x - z[:, :1], {}, []),
        (lambda p, x, z: x * p['gain'] + z[:, :1], {'gain': spec(1, N)}, []),
    ],
)  # fmt: skip
def test_a_rule_names_the_motif(function, params, expected):
    found = motifs(find(function, params, x=X, z=Z))
    if expected is None:  # einsum chooses the order: W'(z) first, x first, or z ⊗ x
        assert found in (['hypernetwork'], ['bilinear pooling'])
    else:
        assert found == expected


def layer_norm(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-6)


def group_norm(x):
    groups = x.reshape(2, 3, -1)
    mean, var = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    return ((groups - mean) / jnp.sqrt(var)).reshape(x.shape)


@pytest.mark.parametrize(
    'function',
    [
        layer_norm,
        group_norm,
        lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)),
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
        lambda x: (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True),
        jax.nn.softmax,
        lambda x: nn.LayerNorm().apply({'params': {'scale': jnp.ones(N), 'bias': jnp.ones(N)}}, x),
        lambda x: nn.RMSNorm().apply({'params': {'scale': jnp.ones(N)}}, x),
    ],
)
def test_a_normalization_is_one_self_interaction(function):
    report = find(lambda params, x: function(x), None, x=X)
    assert motifs(report) == ['normalization']
    assert report.interactions[0].is_self


@pytest.mark.parametrize(
    'activation', [jax.nn.gelu, jax.nn.silu, jnp.square, lambda x: x**3, jax.nn.mish, jax.nn.relu]
)
def test_an_activation_is_no_interaction(activation):
    report = find(lambda W, x: activation(x @ W), spec(N, K), x=X)
    assert not report.interactions
    is_product = activation is not jax.nn.relu
    assert bool(report.activations) == is_product


def test_attention_is_scores_and_mix():
    def attend(params, x):
        queries, keys, values = jnp.split(x @ params, 3, axis=-1)
        scores = jnp.einsum('btd,bsd->bts', queries, keys) * K**-0.5
        mask = jnp.tril(jnp.ones((1, 5, 5), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9)).astype(jnp.bfloat16)
        return jnp.einsum('bts,bsd->btd', weights, values.astype(jnp.bfloat16))

    assert motifs(find(attend, spec(K, 3 * K), x=SEQUENCE)) == ['attention scores', 'attention mix']


def test_a_kernel_from_data_is_a_dynamic_convolution():
    def convolve(params, x, z):
        kernel = (z.mean(0) @ params).reshape(3, 3, 3, 2)
        numbers = 'NHWC', 'HWIO', 'NHWC'
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)

    assert motifs(find(convolve, spec(M, 54), x=IMAGE, z=Z)) == ['dynamic convolution']


def test_entries_that_data_selects_are_routing():
    report = find(lambda params, x, ids: x[ids], None, x=X, ids=jnp.zeros(3, int))
    assert motifs(report) == ['routing'] and sides(report) == ['x · ids']


# ------------------------------------------------------------------------------ none


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(K)(nn.tanh(nn.Dense(K)(x)))))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        for _ in range(2):
            x += nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(nn.relu(x))))
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2)))


@pytest.mark.parametrize(
    ('module', 'x'),
    [(MLP(), X), (ResNet(), IMAGE), (nn.Dense(3), X), (nn.BatchNorm(True), X)],
)
def test_a_model_without_products_has_none(module, x):
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    report = find(lambda variables, x: module.apply(variables, x), variables, x=x)
    assert not report.interactions and not report.candidates


def test_dropout_one_hot_positions_masks_and_loss_scaling_are_no_interactions():
    def loss(params, tokens, mask, key):
        table, W = params
        x = table[tokens] + jax.nn.one_hot(tokens, 7) @ table
        x = x * jnp.sin(jnp.arange(5.0))[None, :, None] + jnp.arange(5.0)[None, :, None]
        keep = jax.random.bernoulli(key, 0.9, x.shape)
        x = jnp.where(keep, x / 0.9, 0) * keep
        x = jnp.where(mask[..., None], x, 0) * (tokens > 0)[..., None]
        logits = jax.nn.log_softmax(x @ W)
        losses = -(jax.nn.one_hot(tokens, 7) * logits).sum(-1)
        return 2.0**15 * losses.mean()

    params = spec(7, K), spec(K, 7)
    tokens, mask = jnp.zeros((2, 5), int), jnp.ones((2, 5), bool)
    report = find(loss, params, tokens=tokens, mask=mask, key=jax.random.key(0))
    assert not report.interactions


# ------------------------------------------------------------------------------ nested jaxprs


def gate(x, z):
    return jax.nn.sigmoid(z) * jnp.sin(x)


@jax.custom_vjp
def custom_gate(x, z):
    return gate(x, z)


custom_gate.defvjp(lambda x, z: (gate(x, z), None), lambda _, g: (g, g))


def pick(x, z):
    return jax.lax.cond(x[0, 0] > 0, gate, lambda x, z: x + z, x, z)


def pick_by_platform(x, z):
    """The CPU's branch has the gate."""
    return jax.lax.platform_dependent(x, z, cpu=gate, default=lambda x, z: x * z)


def shard(x, z):
    mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    specs = PartitionSpec('data')
    return jax.shard_map(gate, mesh=mesh, in_specs=(specs, specs), out_specs=specs)(x, z)


@pytest.mark.parametrize(
    'function',
    [
        *(gate, jax.jit(gate), jax.checkpoint(gate), custom_gate, jax.vmap(gate), pick),
        *(pick_by_platform, shard),
    ],
    ids=['plain', 'jit', 'remat', 'custom_vjp', 'vmap', 'cond', 'platform', 'shard_map'],
)
def test_nested_functions_are_read(function):
    report = find(lambda params, x, z: function(x, z), None, x=X, z=X)
    assert motifs(report) == ['gate'] and sides(report) == ['z · x']
    assert not report.notes


def accumulate(params, x, z, length=10):
    """The carry depends on z alone at first, and on both from the second step on."""

    def step(carry, x_t):
        return jnp.tanh(carry @ params + x_t), carry * x_t

    xs = jnp.broadcast_to(x, (length, *x.shape))
    return jax.lax.scan(step, z, xs)


def test_the_carry_of_a_scan_is_a_fixed_point_and_the_body_counts_per_step():
    report = find(accumulate, spec(N, N), x=X, z=X)
    (product,) = report.interactions
    assert {*product.left, *product.right} == {'x', 'z'} and product.times == 10
    assert product.left == ('x', 'z') and product.right == ('x',)
    assert product.flops == 10 * 2 * N


def test_a_scan_of_a_million_steps_is_as_fast_as_one_of_ten():
    for length in (10, 10**6):
        start = time.process_time()
        run = functools.partial(run_scan, length=length)
        report = find(lambda params, x, z: run(x, z), None, x=X, z=X)  # noqa: B023
        assert time.process_time() - start < 2
        assert [i.times for i in report.interactions] == [length]


def run_scan(x, z, length):
    return jax.lax.scan(lambda carry, _: (gate(carry, x) + 1, None), z, None, length)[0]


def test_gates_of_a_carry_are_a_gated_recurrence():
    assert motifs(find(lambda params, x, z: run_scan(x, z, 3), None, x=X, z=X)) == [
        'gated recurrence'
    ]


def test_a_linear_recurrence_with_decay_from_data_is_a_gated_recurrence():
    """As in RG-LRU and Mamba: h ← exp(−softplus(z)) ⊙ h + x."""

    def run(params, x, z):
        decay = jnp.exp(-jax.nn.softplus(z))
        return jax.lax.scan(lambda h, x_t: (decay * h + x_t, None), jnp.zeros((2, N)), x)[0]

    report = find(run, None, x=spec(5, 2, N), z=X)
    assert motifs(report) == ['gated recurrence'] and report.interactions[0].times == 5


def test_a_while_loop_runs_unknown_times():
    def run(params, x, z):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.cos(x) * z, x)

    report = find(run, None, x=X, z=X)
    assert [i.times for i in report.interactions] == [None]
    assert '× while' in str(report)


@pytest.mark.parametrize('is_outside', [False, True])
def test_a_scan_and_a_while_loop_count_the_steps_that_are_known(is_outside):
    """100 steps of N products each and a cosine, in one iteration of the loop or around it."""

    def scan(step, x):
        return jax.lax.scan(lambda x, _: (step(x), None), x, length=100)[0]

    def repeat(step, x):
        return jax.lax.while_loop(lambda x: x[0] < 9, step, x)

    outer, inner = (scan, repeat) if is_outside else (repeat, scan)

    def run(params, x, z):
        return outer(lambda x: inner(lambda x: jnp.cos(x) * z, x), x)

    report = find(run, None, x=spec(N), z=spec(N))
    (product,) = report.interactions
    assert (product.times, product.flops) == (None, 100 * N)
    assert report.flops == 2 * 100 * N + (100 if is_outside else 1)  # and the comparisons

    def meet(params, x, z):
        return outer(lambda x: inner(lambda x: jnp.cos(x) @ params + z @ params, x), x)

    (candidate,) = find(meet, spec(N, N), x=spec(N), z=spec(N)).candidates
    assert candidate.times is None and candidate.flops['diagonal'] == 100 * (2 * N * N + 2 * N)


def test_a_call_that_cannot_be_read_is_noted():
    def call(params, x, z):
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x, z: x * z, result, x, z)

    report = find(call, None, x=X, z=X)
    assert not report.interactions and 'pure_callback' in report.notes[0]
    assert report.outputs[0].degrees == {'x': np.inf, 'z': np.inf}


# ------------------------------------------------------------------------------ candidates


def test_a_concatenation_before_parameters_is_a_candidate():
    report = find(lambda W, x, z: jnp.concatenate([x, z], -1) @ W, spec(N + M, K), x=X, z=Z)
    (candidate,) = report.candidates
    assert (candidate.kind, candidate.x, candidate.z) == ('concatenation', 'x', 'z')
    assert (candidate.n, candidate.m, candidate.k) == (N, M, K)
    rank = M  # the smallest of 16, n, m and k
    assert candidate.params == {'full': M * N * K, 'low rank': rank * (M + N + K),
                                'diagonal': M * K}  # fmt: skip
    assert candidate.flops['full'] == 2 * (2 * M * N * K + 2 * N * K)  # of two rows
    assert not report.interactions


def test_a_sum_of_affine_maps_is_a_candidate_unless_a_product_is_beside_it():
    def add(params, x, z):
        return z @ params['U'] + x @ params['V'] + params['b'][None]

    params = {'U': spec(M, K), 'V': spec(N, K), 'b': spec(K)}
    (candidate,) = find(add, params, x=X, z=Z).candidates
    assert (candidate.kind, candidate.k) == ('sum', K)
    assert {candidate.x: candidate.n, candidate.z: candidate.m} == {'x': N, 'z': M}

    def with_product(params, x, z):
        return add(params, x, z) + jnp.einsum('bm,mnk,bn->bk', z, params['W'], x)

    report = find(with_product, params | {'W': spec(M, N, K)}, x=X, z=Z)
    assert len(report.interactions) == 1 and not report.candidates


def test_channels_of_images_and_tokens_of_sequences():
    def convolve(kernel, x, z):
        planes = jnp.broadcast_to(z[:, None, None, :], (2, 6, 6, M))
        both = jnp.concatenate([x, planes], -1)
        numbers = 'NHWC', 'HWIO', 'NHWC'
        return jax.lax.conv_general_dilated(both, kernel, (1, 1), 'SAME', dimension_numbers=numbers)

    (candidate,) = find(convolve, spec(3, 3, 3 + M, K), x=IMAGE, z=Z).candidates
    assert (candidate.n, candidate.m, candidate.k) == (27, 9 * M, K)

    def join(W, x, z):  # along time: no features of one affine map
        return jnp.concatenate([x, z], 1) @ W

    assert not find(join, spec(K, K), x=SEQUENCE, z=SEQUENCE).candidates


def test_a_residual_connection_is_no_candidate():
    assert not find(lambda W, x: x + jnp.tanh(x @ W), spec(N, N), x=X).candidates


# ------------------------------------------------------------------------------ degrees


@pytest.mark.parametrize(
    ('function', 'text'),
    [
        (lambda x, z: x * z + x, 'bi-affine in x and z'),
        (lambda x, z: x * jnp.tanh(z), 'affine in x, not polynomial in z'),
        (lambda x, z: x**2 * z, 'affine in z, polynomial of degree ≤ 2 in x'),
        (lambda x, z: (x * z) ** 2 * x, 'polynomial of degree ≤ 3 in x, polynomial of degree ≤ 2'),
        (lambda x, z: x + 1, 'affine in x, independent of z'),
        (lambda x, z: z / x, 'affine in z, not polynomial in x'),
        (lambda x, z: jnp.where(z > 0, x, 0), 'affine in x, not polynomial in z'),
        (lambda x, z: x + z.astype(bool), 'affine in x, not polynomial in z'),
        (lambda x, z: x + z.astype(int), 'affine in x, not polynomial in z'),
        (lambda x, z: x + z.astype(jnp.float16), 'bi-affine in x and z'),
        (lambda x, z: x[0, z[0].astype(jnp.uint32)], 'affine in x, not polynomial in z'),
        (lambda x, z: jnp.fft.rfft(x)[:, :2].real * z[:, :1], 'bi-affine in x and z'),
        (
            lambda x, z: jnp.fft.ifft(jnp.fft.fft(x) * jnp.conj(jnp.fft.fft(z))).real,
            'bi-affine in x and z',
        ),
        (lambda x, z: jnp.cumsum(x.T[::-1], 0) @ z, 'bi-affine in x and z'),
        (lambda x, z: jnp.sort(x) + jnp.abs(z)[:, :1], 'not polynomial in x, not polynomial in z'),
    ],
)
def test_the_degree_of_an_output(function, text):
    x, z = (jax.random.normal(jax.random.key(i), (2, N)) for i in (0, 1))
    report = find(lambda params, x, z: function(x, z), None, x=x, z=z)
    assert report.outputs[0].describe().startswith(text)
    assert report.outputs[0].is_confirmed is None
    confirmed = report.confirm().outputs[0].is_confirmed
    assert confirmed is (None if text.startswith('not polynomial in x, not') else True)


def test_a_degree_that_differences_refute_is_not_confirmed():
    report = find(lambda params, x: jnp.sin(3 * x), None, x=X)
    wrong = dataclasses.replace(report.outputs[0], degrees={'x': 1.0})
    report = dataclasses.replace(report, outputs=(wrong,)).confirm()
    assert report.outputs[0].is_confirmed is False
    assert 'not confirmed at random points' in str(report)


def test_a_linear_recurrence_is_affine_in_its_inputs():
    def run(A, x, z):
        return jax.lax.scan(lambda h, x_t: (h @ A + x_t, None), z, x)[0]

    report = find(run, spec(N, N), x=spec(5, 2, N), z=X)
    assert report.outputs[0].describe() == 'bi-affine in x and z'


# ------------------------------------------------------------------------------ wrong input


def stack(params, x, z):
    return x @ params


@pytest.mark.parametrize(
    ('streams', 'function', 'message'),
    [
        ({'x': X, 'y': Z}, stack, "'y' is not an argument of stack; known: x, z"),
        ({}, stack, 'at least one stream'),
        ({'x': 'text', 'z': Z}, stack, "stream x = 'text': expected an array"),
        ({'x': X}, stack, "stack cannot be called with these streams: .*'z'"),
        ({'x': X}, lambda p, x: x if x.sum() > 0 else -x, 'cannot be traced: Attempted boolean'),
        ({'x': X}, lambda p, x: jnp.asarray(np.sin(x)), 'cannot be traced'),
        ({'x': X}, lambda p, x: 'text', 'cannot be'),
        ({'x': X, 'y': Z}, lambda p, **s: MLP().apply({}, **s), 'these streams: .*argument'),
    ],
)
def test_wrong_input_gets_one_clear_line(streams, function, message):
    with pytest.raises(ValueError, match=message) as error:
        find(function, spec(N, K), **streams)
    assert '\n' not in str(error.value)


def test_a_stream_that_no_output_needs_is_noted():
    report = find(stack, spec(N, K), x=X, z=Z)
    assert report.notes == ('no output depends on the stream z',)
    assert 'note: no output depends on the stream z' in str(report)


# ------------------------------------------------------------------------------ report


class Block(nn.Module):
    """A block with a name scope per module."""

    @nn.compact
    def __call__(self, x, z):
        x = nn.LayerNorm(name='norm')(x)
        x = mi.MultiplicativeInteraction(K, name='fusion')(x, z)
        return nn.Dense(3, name='out')(jnp.concatenate([x, z], -1))


@pytest.fixture(scope='module')
def report():
    variables = jax.eval_shape(Block().init, jax.random.key(0), X, Z)
    return find(Block().apply, variables, x=X, z=Z)


def test_rows_have_the_fields_of_interactions(report):
    norm, fusion = report.rows()
    assert norm['motif'] == 'normalization' and norm['path'] == 'Block/norm'
    assert fusion['motif'] == 'bilinear pooling' and fusion['path'].startswith('Block/fusion')
    assert 0 < fusion['share'] < 1 and fusion['times'] == 1


def test_the_tree_is_at_most_100_columns_wide(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith('Block.apply: 2 interactions (1 normalization, 1 bilinear pooling)')
    assert '    norm\n      normalization: x · x' in text
    assert '    concatenation of x,z [8] and z [4] → 3' in text
    assert 'activations: 2 products' in text  # the squares of the variance


def test_markdown_and_html_have_every_interaction(report, tmp_path):
    markdown, page = report.to_markdown(), report.to_html()
    for row in report.rows():
        assert f'| {row["path"]} | {row["motif"]} |' in markdown
        assert f'data-motif="{row["motif"]}"' in page
    assert page.count('<tr data-motif=') == 2 and 'http' not in page.replace('http-equiv', '')
    for name, start in (('a.html', '<!doctype html>'), ('a.md', '# Block'), ('a.txt', 'Block')):
        report.save(tmp_path / name)
        assert (tmp_path / name).read_text().startswith(start)


def test_text_from_the_function_is_escaped_on_the_page():
    def function(params, x, z):
        with jax.named_scope('<script>'):
            return x * z

    assert (
        '<th scope="rowgroup" colspan="7">&lt;script&gt;</th>'
        in find(function, None, x=X, z=X).to_html()
    )


def build():
    return (lambda params, x, z: x * z), None, {'x': X, 'z': X}


def build_untraceable():
    return (lambda params, x: float(x.sum())), None, {'x': X}


def build_nothing():
    return 3


def run_command(*arguments):
    command = [sys.executable, '-m', 'mi.find', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_analyzes_a_factory(tmp_path):
    done = run_command('tests.find.test_find:build', f'--out={tmp_path}/report.html', '--confirm')
    assert done.returncode == 0, done.stderr
    assert '1 interaction (1 unnamed)' in done.stdout and 'confirmed' in done.stdout
    assert (tmp_path / 'report.html').read_text().startswith('<!doctype html>')
    for name, message, *options in [
        ('build_untraceable', 'cannot be traced'),
        ('build_nothing', 'expected (function, params, streams)'),
        ('missing', 'expected an object of the module'),
        ('build', f'--out={tmp_path}: Is a directory. Use another file', f'--out={tmp_path}'),
    ]:
        done = run_command(f'tests.find.test_find:{name}', *options)
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.strip().count('\n') == 0 and done.stderr.startswith('error: ')


@pytest.mark.slow
@pytest.mark.parametrize(
    'code',
    [
        'import mi; r = mi.find(f, None, x=x); r = mi.find(f, None, x=x); '
        'from mi.find import Report; assert isinstance(r, Report)',
        'from mi.find import Report, find; import mi; r = mi.find(f, None, x=x); '
        'assert isinstance(r, Report) and isinstance(find(f, None, x=x), Report)',
        'import mi.find; r = mi.find(f, None, x=x); assert isinstance(r, mi.find.Report)',
    ],
)
def test_find_is_a_function_and_a_package_in_every_order_of_imports(code):
    setup = 'import jax.numpy as jnp; f = lambda p, x: x; x = jnp.ones(2)\n'
    done = subprocess.run([sys.executable, '-c', setup + code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_find_is_callable_as_an_attribute_of_the_package():
    assert isinstance(mi.find(stack, spec(N, K), x=X, z=Z), Report)
    assert functools.partial(mi.find, stack)(spec(N, K), x=X, z=Z).name == 'stack'
