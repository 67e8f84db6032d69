"""`mi.find` on our motifs and cells against `as_mi`, and on models of four libraries."""

import time
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mi
from mi import cells
from mi.find import find
from mi.motifs import attention, dynamic_conv, experts, gating, hypernetwork, normalization, pooling
from mi.motifs.conditioning import ConcatMLP, FeatureAttention, FiLM, Gate, SameWidth
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention
from mi.unify import CONVERTERS, as_mi
from tests.motifs.checks import random

M, N, K = 4, 6, 8
X, Z, IDS = random(0, 2, N), random(1, 2, M), jnp.array([1, 3])
WIDE, TOKENS, IMAGE = random(2, 2, K), random(3, 2, 5, K), random(4, 2, 4, 4, K)


class Case(NamedTuple):
    """A module with its inputs and its products.

    Attributes:
      module, inputs: the module and what it is called with.
      expected: the motif and the two sides of each product, sides in any order.
      parameter_sides: the products of `as_mi` that have a parameter as one side, or a W of zero.
      inside: the products that `as_mi` counts as operations around its own, such as norms.
    """

    module: Any
    inputs: tuple[Any, ...]
    expected: list[tuple[str, str, str]]
    parameter_sides: int = 0
    inside: tuple[str, ...] = ()


SCALE, BILINEAR = ('scale', 'x', 'z'), ('bilinear pooling', 'x', 'z')
HYPER = ('hypernetwork', 'x', 'z')
SELF_GATE = ('gate', 'x', 'x')
ATTENTION = [('attention scores', 'x', 'x'), ('attention mix', 'x', 'x')]
BOTH = 'carry,x'
STEP = ('gated recurrence', BOTH, BOTH)
NORM = 'normalization'

CASES = [
    Case(mi.MultiplicativeInteraction(K), (X, Z), [BILINEAR]),
    Case(mi.MultiplicativeInteraction(K), (TOKENS, random(1, 2, 1, M)), [HYPER]),
    Case(mi.LowRankMultiplicativeInteraction(K, rank=2), (X, Z), [BILINEAR]),
    Case(mi.TuckerMultiplicativeInteraction(K, rank=2), (X, Z), [BILINEAR]),
    Case(mi.BlockMultiplicativeInteraction(K, blocks=2), (X, Z), [BILINEAR]),
    Case(mi.DiagonalMultiplicativeInteraction(), (X, Z), [SCALE]),
    Case(mi.ScalarMultiplicativeInteraction(), (X, Z), [SCALE]),
    Case(mi.MultiHead(K, contexts=M), (X, IDS), [HYPER]),
    Case(ConcatMLP(K), (X, Z), [], parameter_sides=1),
    Case(FiLM(K), (X, Z), [SCALE]),
    Case(Gate(K), (X, Z), [('gate', 'x', 'z')]),
    Case(
        FeatureAttention(K, rank=2),
        (X, Z),
        [('attention scores', 'x', 'z'), ('attention mix', 'x', 'x,z')],
    ),
    Case(SameWidth(K, normalization.FeatureWiseModulation), (X, Z), [SCALE]),
    Case(gating.GatedLinearUnit(K), (X, Z), [('gate', 'x', 'z')]),
    Case(gating.GatedLinearUnit(K, 'gelu'), (X, Z), [('gate', 'x', 'z')]),
    Case(gating.GatedLinearUnit(K, 'identity'), (X, Z), [BILINEAR]),
    Case(gating.GatedFeedForward(K), (X,), [SELF_GATE]),
    Case(gating.Highway(), (X,), [SELF_GATE, SELF_GATE]),
    Case(gating.SqueezeExcitation(ratio=4), (IMAGE,), [SELF_GATE]),
    Case(normalization.FeatureWiseModulation(), (X, Z), [SCALE]),
    Case(normalization.ConditionalLayerNorm(), (X, Z), [SCALE], inside=(NORM,)),
    Case(normalization.ConditionalBatchNorm(True), (X, Z), [SCALE]),
    Case(normalization.ConditionalBatchNorm(False), (X, Z), [SCALE], inside=(NORM,)),
    Case(
        normalization.AdaLNZero(nn.Dense(N)),
        (X, Z),
        [SCALE, ('bilinear pooling', 'x,z', 'z')],
        inside=(NORM,),
    ),
    Case(hypernetwork.LinearHypernetwork(K), (X, Z), [HYPER]),
    Case(hypernetwork.MLPHypernetwork(K, hidden=(4,)), (X, Z), [BILINEAR]),
    Case(hypernetwork.MLPHypernetwork(K, hidden=(4,), chunk=5), (X, Z), [HYPER]),
    Case(hypernetwork.Hypernetwork(nn.Dense(K), hidden=(4,)), (X, Z), [HYPER]),
    Case(pooling.MLB(K, rank=3), (X, Z), [BILINEAR]),
    Case(pooling.MFB(K, factors=2), (X, Z), [BILINEAR]),
    Case(pooling.MFB(K, factors=2, normalize=True), (X, Z), [BILINEAR], inside=(NORM,)),
    Case(pooling.MUTAN(K, rank=2, hidden=4), (X, Z), [BILINEAR]),
    Case(pooling.BLOCK(K, rank=2, blocks=2, hidden=4), (X, Z), [BILINEAR]),
    Case(pooling.CompactBilinear(K), (X, Z), [BILINEAR]),
    Case(experts.DenseMixture(K), (X, Z), [('mixture of experts', 'x', 'z')]),
    Case(
        experts.RoutedMixture(K, experts=3, hidden=4),
        (X,),
        [('mixture of experts', 'x', 'x')],
        inside=('routing',),
    ),
    Case(attention.Attention(heads=2), (TOKENS,), ATTENTION),
    Case(attention.Attention(heads=4, kv_heads=2, causal=True, positions='rotary'), (TOKENS,),
         ATTENTION),
    Case(attention.Attention(heads=2, causal=True, positions='relative'), (TOKENS,), ATTENTION,
         parameter_sides=1),
    Case(
        attention.GatedCrossAttention(heads=2),
        (TOKENS, random(1, 2, 3, K)),
        [('attention scores', 'x', 'z'), ('attention mix', 'x,z', 'z')],
        parameter_sides=1,
    ),
    Case(attention.LatentCrossAttention(latents=3, features=K, heads=2), (TOKENS,), ATTENTION[1:],
         parameter_sides=1),
    Case(ConvolutionalSelfAttention(heads=4, features=K), (IMAGE,), [], parameter_sides=2),
    Case(dynamic_conv.LightweightConvolution(heads=2, width=3), (TOKENS,), [], parameter_sides=1),
    Case(dynamic_conv.DynamicConvolution(heads=2, width=3), (TOKENS,),
         [('dynamic convolution', 'x', 'x')]),
    Case(dynamic_conv.ConditionalConvolution(4, kernel_size=(2, 2), experts=3), (IMAGE,),
         [('dynamic convolution', 'x', 'x')]),
    Case(cells.LSTM(K), (), [STEP] * 3),
    Case(cells.MultiplicativeLSTM(K), (), [('bilinear pooling', BOTH, 'x'), *[STEP] * 3]),
    Case(cells.MILSTM(K), (), [('bilinear pooling', BOTH, 'x'), *[STEP] * 3]),
    Case(cells.MogrifierLSTM(K, rounds=2), (),
         [('gated recurrence', BOTH, 'x'), *[STEP] * 4]),
    Case(cells.HyperLSTM(K, hyper_features=3, embedding=2), (),
         [('bilinear pooling', BOTH, 'x'), ('bilinear pooling', BOTH, BOTH), *[STEP] * 6]),
]  # fmt: skip


def get_inputs(case):
    """Return the inputs by stream; cells take one step."""
    if not case.inputs:
        return {'carry': case.module.initial(2), 'x': random(0, 1, 2, N)}
    return dict(zip('xz', case.inputs, strict=False))


def find_in(case):
    streams = get_inputs(case)
    variables = jax.eval_shape(case.module.init, jax.random.key(0), *streams.values())
    mutable = ['batch_stats'] if 'batch_stats' in variables else False

    def apply(variables, **streams):
        return case.module.apply(variables, *streams.values(), mutable=mutable)

    return find(apply, variables, **streams)


@pytest.mark.parametrize('case', CASES, ids=lambda case: type(case.module).__name__)
def test_products_are_those_of_as_mi_in_number_streams_and_motif(case):
    report = find_in(case)
    counted = [i for i in report.interactions if i.motif not in case.inside]
    found = [(i.motif, *sorted((','.join(i.left), ','.join(i.right)))) for i in counted]
    expected = [(motif, *sorted(sides)) for motif, *sides in case.expected]
    assert sorted(found) == sorted(expected)
    assert len(counted) < len(report.interactions) or not case.inside
    assert all(interaction.times == 1 for interaction in report.interactions)
    assert len(find_products(case)) == len(case.expected) + case.parameter_sides


def find_products(case):
    """Return the products of `as_mi`; jit skips its numerical checks, which cost seconds."""
    inputs = tuple(get_inputs(case).values())
    variables = jax.eval_shape(case.module.init, jax.random.key(0), *inputs)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables)
    products = []

    def convert(inputs):
        products.extend(as_mi(case.module, variables, *inputs).products)

    jax.eval_shape(convert, inputs)
    return products


def test_every_motif_with_a_converter_has_a_case():
    assert {*CONVERTERS} <= {type(case.module) for case in CASES}


def test_multi_head_finds_the_largest_entry_of_a_float_context():
    report = find_in(Case(mi.MultiHead(K), (X, jnp.eye(M)[:2]), []))
    assert report.count() == {'routing': 1, 'unnamed': 1}  # argmax, and max z as a factor


def test_a_concatenation_of_ours_is_a_candidate():
    (candidate,) = find_in(Case(ConcatMLP(K), (X, Z), [])).candidates
    assert (candidate.kind, candidate.k) == ('sum', K)
    for form in (
        mi.MultiplicativeInteraction(K),
        mi.LowRankMultiplicativeInteraction(K, rank=2),
        mi.TuckerMultiplicativeInteraction(K, rank=2),
        mi.BlockMultiplicativeInteraction(K, blocks=2),
    ):
        assert not find_in(Case(form, (X, Z), [])).candidates


# ------------------------------------------------------------------------------ four libraries


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(2, name='attention')(nn.LayerNorm()(x))
        return x + nn.Dense(K)(nn.gelu(nn.Dense(2 * K)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    layers: int
    vocabulary: int = 11

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, K)(tokens)
        x += self.param('positions', nn.initializers.normal(), (1, tokens.shape[1], K))
        for _ in range(self.layers):
            x = TransformerBlock()(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


BLOCK = {'normalization': 2, 'attention scores': 1, 'attention mix': 1}


def find_linen(module, **streams):
    variables = jax.eval_shape(module.init, jax.random.key(0), *streams.values())
    return find(lambda variables, **s: module.apply(variables, *s.values()), variables, **streams)


def test_a_linen_transformer_of_twelve_layers_in_seconds():
    tokens = jnp.zeros((2, 5), int)
    start = time.process_time()
    report = find_linen(Transformer(12), tokens=tokens)
    assert time.process_time() - start < 20
    counts = {motif: 12 * number for motif, number in BLOCK.items()}
    assert report.count() == counts | {'normalization': 25}
    paths = {i.path for i in report.interactions if i.motif == 'attention mix'}
    assert len(paths) == 12 and all('attention' in path for path in paths)
    assert not report.candidates


def test_a_linen_lstm_cell_has_three_gates_and_a_sum_as_candidate():
    cell, x = nn.OptimizedLSTMCell(K), random(0, 2, N)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    report = find_linen(cell, carry=carry, x=x)
    assert report.count() == {'gate': 3}
    layer = nn.RNN(nn.OptimizedLSTMCell(K))
    report = find_linen(layer, x=random(0, 2, 7, N))
    assert report.count() == {'gated recurrence': 3}
    assert [i.times for i in report.interactions] == [7, 7, 7]
    assert report.candidates


def test_a_linen_gru_has_three_products():
    """r ⊙ (U h), (1 − z) ⊙ n, z ⊙ h."""
    report = find_linen(nn.RNN(nn.GRUCell(K)), x=random(0, 2, 7, N))
    assert report.count() == {'gated recurrence': 3}


def test_an_unrolled_linen_lstm_of_a_thousand_steps_in_seconds():
    x = jax.ShapeDtypeStruct((1000, 1, 3), jnp.float32)
    params = {'W': jax.ShapeDtypeStruct((3 + 4, 16), jnp.float32)}

    def unroll(params, x):
        c = h = jnp.zeros((1, 4))
        for x_t in x:
            gates = jnp.concatenate([x_t, h], -1) @ params['W']
            i, f, o, j = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(j)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return h

    start = time.process_time()
    report = find(unroll, params, x=x)
    assert time.process_time() - start < 30
    # The first step multiplies c = 0, which is a constant.
    assert report.count() == {'gate': 2999}


def test_an_nnx_transformer_block():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.norm_2 = nnx.LayerNorm(K, rngs=rngs), nnx.RMSNorm(K, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, K, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(K, 9, rngs=rngs), nnx.Linear(9, K, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            x += self.dropout(self.attention(self.norm(x)))
            return x + self.down(nnx.gelu(self.up(self.norm_2(x))))

    graphdef, state = nnx.split(Block(nnx.Rngs(0)))
    report = find(lambda state, x: nnx.merge(graphdef, state)(x), state, x=TOKENS)
    assert report.count() == BLOCK


def test_an_nnx_lstm_and_a_dense_model():
    layer = nnx.RNN(nnx.OptimizedLSTMCell(N, K, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    x = random(0, 2, 7, N)
    report = find(lambda state, x: nnx.merge(graphdef, state)(x), state, x=x)
    assert report.count() == {'gated recurrence': 3}
    graphdef, state = nnx.split(nnx.Sequential(nnx.Linear(N, K, rngs=nnx.Rngs(0)), nnx.relu))
    assert not find(lambda s, x: nnx.merge(graphdef, s)(x), state, x=X).interactions


def find_haiku(function, **streams):
    """Return the report on a function that calls Haiku modules."""
    transformed = hk.without_apply_rng(hk.transform(function))
    params = jax.eval_shape(transformed.init, jax.random.key(0), **streams)
    return find(transformed.apply, params, **streams)


def test_haiku_models():
    def attend(x):
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.MultiHeadAttention(2, 4, w_init=hk.initializers.Constant(1.0))(x, x, x)

    report = find_haiku(attend, x=TOKENS)
    assert report.count() == {'normalization': 1, 'attention scores': 1, 'attention mix': 1}
    assert any('multi_head_attention' in i.path for i in report.interactions)

    def unroll(x):
        core = hk.LSTM(K)
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    report = find_haiku(unroll, x=random(0, 7, 2, N))
    assert report.count() == {'gated recurrence': 3}
    assert {i.times for i in report.interactions} == {7}
    (candidate,) = report.candidates  # Haiku's LSTM concatenates x and h
    assert (candidate.kind, candidate.n, candidate.m, candidate.k) == ('concatenation', N, K, 4 * K)

    assert not find_haiku(lambda x: hk.nets.MLP([K, 3])(x), x=X).interactions


def test_haikus_impala_torso_has_none_and_the_core_three_gates():
    def agent(frames, reward):
        x = frames
        for channels in (4, 8):
            x = hk.max_pool(hk.Conv2D(channels, 3)(x), (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')
            x += hk.Conv2D(channels, 3)(jax.nn.relu(hk.Conv2D(channels, 3)(jax.nn.relu(x))))
        x = hk.Linear(K)(hk.Flatten()(jax.nn.relu(x)))
        x = jnp.concatenate([x, jnp.clip(reward, -1, 1)[:, None]], -1)
        core = hk.LSTM(K)
        output, _ = core(x, core.initial_state(2))
        return hk.Linear(3)(output), hk.Linear(1)(output)

    report = find_haiku(agent, frames=IMAGE, reward=random(0, 2))
    # The initial state is zero, so that f ⊙ c is no product of data.
    assert report.count() == {'gate': 2}
    (candidate,) = report.candidates
    assert {candidate.x, candidate.z} == {'frames', 'reward'}


def test_equinox_models():
    key = jax.random.key(0)
    sequence = TOKENS[0]

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __call__(self, x):
            x += self.attention(*[jax.vmap(self.norm)(x)] * 3)
            return x + jax.vmap(self.mlp)(x)

    block = Block(
        eqx.nn.MultiheadAttention(2, K, key=key),
        eqx.nn.LayerNorm(K),
        eqx.nn.MLP(K, K, 9, 1, key=key),
    )
    report = find(lambda block, x: block(x), block, x=sequence)
    assert report.count() == BLOCK | {'normalization': 1}

    cell = eqx.nn.GRUCell(N, K, key=key)

    def unroll(cell, x, h):
        return jax.lax.scan(lambda h, x_t: (cell(x_t, h), None), h, x)[0]

    report = find(unroll, cell, x=random(0, 7, N), h=jnp.ones(K))
    # new + z ⊙ (h − new), and r ⊙ (U h).
    assert report.count() == {'gated recurrence': 2}
    mlp = eqx.nn.MLP(N, 3, K, 2, key=key)
    assert not find(lambda mlp, x: jax.vmap(mlp)(x), mlp, x=X).interactions


def test_plain_jax_film_resnet_block():
    def block(params, x, z):
        for kernel, (gamma, beta) in params:
            numbers = 'NHWC', 'HWIO', 'NHWC'
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)
            y = y * (1 + z @ gamma)[:, None, None] + (z @ beta)[:, None, None]
            x = x + jax.nn.relu(y)
        return x

    layer = np.ones((3, 3, K, K), np.float32), (np.ones((M, K)), np.ones((M, K)))
    report = find(block, [layer] * 3, x=IMAGE, z=Z)
    assert report.count() == {'scale': 3}
    assert [i.streams for i in report.interactions] == ['x · z', 'x,z · z', 'x,z · z']


def test_a_perceiver_and_a_pooling_head():
    def attend(params, x, z):
        queries, keys, values = x @ params['q'], z @ params['k'], z @ params['v']
        weights = jax.nn.softmax(jnp.einsum('btd,bsd->bts', queries, keys) / K**0.5)
        pooled = jnp.einsum('bts,bsd->btd', weights, values).mean(1)
        return jnp.tanh(pooled @ params['a']) * jnp.tanh(x.mean(1) @ params['b']) @ params['c']

    params = {name: jax.ShapeDtypeStruct((K, K), jnp.float32) for name in 'qkvabc'}
    report = find(attend, params, x=TOKENS, z=TOKENS)
    found = [(i.motif, *sorted((i.left, i.right))) for i in report.interactions]
    assert found == [
        ('attention scores', ('x',), ('z',)),
        ('attention mix', ('x', 'z'), ('z',)),
        ('bilinear pooling', ('x',), ('x', 'z')),
    ]
