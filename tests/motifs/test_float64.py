"""Every motif in float64 against finite differences that float32 would not resolve."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mi.layers import Affine
from mi.motifs import attention, dynamic_conv, experts, gating, hypernetwork, normalization, pooling
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention
from tests.motifs.checks import assert_float64, drawn, random, wide

N, M = 4, 3
X, Z, TOKENS, IMAGE = random(0, 3, N), random(1, 3, M), random(2, 2, 5, N), random(3, 2, 4, 4, N)
BOTH = (X, Z)
MOTIFS = {
    'MFB, normalized': (functools.partial(pooling.MFB, 4, normalize=True), BOTH),
    'FeatureWiseModulation': (normalization.FeatureWiseModulation, BOTH),
    'ConditionalBatchNorm': (
        functools.partial(normalization.ConditionalBatchNorm, True),
        BOTH,
    ),
    'AdaLNZero': (functools.partial(normalization.AdaLNZero, jnp.tanh), BOTH),
    'GatedFeedForward': (functools.partial(gating.GatedFeedForward, 5, use_bias=True), (X,)),
    'Highway': (functools.partial(gating.Highway, activation='tanh'), BOTH),
    'SqueezeExcitation': (functools.partial(gating.SqueezeExcitation, 2), (IMAGE,)),
    'LinearHypernetwork': (functools.partial(hypernetwork.LinearHypernetwork, 5), BOTH),
    'MLPHypernetwork, chunks': (
        functools.partial(hypernetwork.MLPHypernetwork, 5, (6, 4), jnp.tanh, chunk=7),
        BOTH,
    ),
    'Hypernetwork': (
        functools.partial(
            hypernetwork.Hypernetwork, Affine(5, jnp.float64, jnp.float64), activation=jnp.tanh
        ),
        BOTH,
    ),
    'RoutedMixture': (
        functools.partial(experts.RoutedMixture, 5, 3, 6, activation=jnp.tanh),
        BOTH,
    ),
    'RoutedMixture, capacity': (
        functools.partial(experts.RoutedMixture, 5, 3, 6, capacity_factor=1.0, activation=nn.silu),
        BOTH,
    ),
    'LightweightConvolution': (
        functools.partial(dynamic_conv.LightweightConvolution, 2, 3),
        (TOKENS,),
    ),
    'DynamicConvolution': (functools.partial(dynamic_conv.DynamicConvolution, 2, 3), (TOKENS,)),
    'ConditionalConvolution': (
        functools.partial(dynamic_conv.ConditionalConvolution, 5, 3),
        (IMAGE,),
    ),
    'Attention, rotary': (
        functools.partial(attention.Attention, 2, causal=True, positions='rotary'),
        (TOKENS,),
    ),
    'Attention, relative': (
        functools.partial(attention.Attention, 2, causal=True, positions='relative'),
        (TOKENS,),
    ),
    'GatedCrossAttention': (
        functools.partial(attention.GatedCrossAttention, 2),
        (TOKENS, random(4, 2, 3, M)),
    ),
    'LatentCrossAttention': (
        functools.partial(attention.LatentCrossAttention, 3, 4),
        (TOKENS,),
    ),
    'ConvolutionalSelfAttention': (
        functools.partial(ConvolutionalSelfAttention, 2, 5),
        (IMAGE,),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MOTIFS)
def test_float64_is_computed_in_float64(name):
    constructor, inputs = MOTIFS[name]
    with jax.enable_x64(True):
        module = constructor(dtype=jnp.float64, param_dtype=jnp.float64)
        inputs = wide(inputs)
        variables = drawn(module, *inputs)
        if 'batch_stats' in variables:
            variables['batch_stats'] = jax.tree.map(jnp.ones_like, variables['batch_stats'])
        assert_float64(module.apply, variables, *inputs)


def test_positions_of_float64_are_float64():
    with jax.enable_x64(True):
        a = jnp.ones((1001, 2), jnp.float64)
        angle = jnp.float64(1000)
        expected = jnp.array([jnp.cos(angle) - jnp.sin(angle), jnp.sin(angle) + jnp.cos(angle)])
        for first_position in (0, jnp.asarray(0)):
            turned = attention.rotate(a, first_position)[1000]
            assert float(jnp.abs(turned - expected).max()) < 1e-10
        waves = attention.compute_sinusoids(jnp.array([12345]), 4, jnp.float64)[0]
        angles = jnp.array([12345.0, 123.45])
        expected = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
        assert float(jnp.abs(waves - expected).max()) < 1e-10


@pytest.mark.parametrize(
    'module, inputs',
    [
        (gating.GatedLinearUnit(4), (X, jnp.zeros(3, int))),
        (gating.Highway(), (X, jnp.zeros(3, int))),
        (normalization.FeatureWiseModulation(), (X, jnp.zeros(3, int))),
        (normalization.ConditionalLayerNorm(), (X, jnp.zeros(3, int))),
        (normalization.ConditionalBatchNorm(True), (X, jnp.zeros(3, int))),
        (normalization.AdaLNZero(jnp.tanh), (X, jnp.zeros(3, int))),
        (hypernetwork.LinearHypernetwork(4), (X, jnp.zeros(3, int))),
        (hypernetwork.MLPHypernetwork(4), (X, jnp.zeros(3, int))),
        (hypernetwork.Hypernetwork(nn.Dense(4)), (X, jnp.zeros(3, int))),
        (experts.RoutedMixture(4, 3, 5), (X, jnp.zeros(3, int))),
        (dynamic_conv.DynamicConvolution(2, 3), (TOKENS, jnp.zeros((2, 5), int))),
        (dynamic_conv.ConditionalConvolution(4, 3), (IMAGE, jnp.zeros((2, 3), int))),
        (attention.Attention(2), (TOKENS, jnp.zeros((2, 5, 3), int))),
        (attention.GatedCrossAttention(2), (TOKENS, jnp.zeros((2, 5, 3), int))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_integers_for_a_context_are_refused(module, inputs):
    with pytest.raises(ValueError, match=r'z is int32 .*jax\.nn\.one_hot'):
        jax.eval_shape(module.init, jax.random.key(0), *inputs)
