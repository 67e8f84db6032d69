import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi.motifs.dynamic_conv import (
    ConditionalConvolution,
    DynamicConvolution,
    LightweightConvolution,
    convolve,
)
from tests import prng
from tests.motifs.checks import is_its_composition


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


B, T, C, H, M = 2, 7, 6, 3, 4
X, Z = random(0, B, T, C), random(1, B, T, M)
IMAGES, TASKS = random(2, 3, 5, 6, 4), random(3, 3, M)
MASK = jnp.arange(T)[None] < jnp.array([T, 4])[:, None]
KEY = prng.key(4)


def run(module, variables, *inputs, **options):
    """module.apply, compiled as a whole."""
    return jax.jit(lambda variables, inputs: module.apply(variables, *inputs, **options))(
        variables, inputs
    )


def start(module, *inputs):
    return jax.jit(module.init_with_output)(KEY, *inputs)


def parameters(module, *inputs):
    """Random values for all parameters, none of them zero."""
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    return jax.tree.map(lambda p: random(p.size, *p.shape) / 2, shapes)


kernels = pytest.mark.parametrize(
    'width, causal', [(3, False), (4, False), (3, True), (2 * T, True)]
)
both = pytest.mark.parametrize('module', [LightweightConvolution, DynamicConvolution])


def softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()


def reference(x, kernel_of, causal):
    """y_tc = Σ_j kernel_j x_{t+j−l, c}, term by term; kernel_of(b, t, h) is [K]."""
    x, y = np.asarray(x, np.float64), np.zeros(x.shape)
    for b, t, c in np.ndindex(x.shape):
        kernel = kernel_of(b, t, c * H // x.shape[-1])
        left = len(kernel) - 1 if causal else len(kernel) // 2
        for j, weight in enumerate(kernel):
            if 0 <= t + j - left < x.shape[1]:
                y[b, t, c] += weight * x[b, t + j - left, c]
    return y


@kernels
def test_the_lightweight_convolution_is_the_papers_sum(width, causal):
    module = LightweightConvolution(H, width, causal)
    variables = parameters(module, X)
    W = np.asarray(variables['params']['W'])
    expected = reference(X, lambda b, t, h: softmax(W[h]), causal)
    np.testing.assert_allclose(run(module, variables, X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'width, causal, context',
    [
        (3, False, None),
        (4, False, Z),
        (3, True, None),
        (3, True, Z[:, :1]),
        (2 * T, False, Z[0]),
        (2 * T, True, Z),
    ],
)
def test_the_dynamic_convolution_is_the_papers_sum_with_a_kernel_of_the_position(
    width, causal, context
):
    module = DynamicConvolution(H, width, causal)
    variables = parameters(module, X, context)
    Q = np.asarray(variables['params']['Q'])
    z = X if context is None else context
    z = np.broadcast_to(z, (B, T, z.shape[-1]))
    expected = reference(
        X, lambda b, t, h: softmax(z[b, t] @ Q[:, h * width : (h + 1) * width]), causal
    )
    np.testing.assert_allclose(run(module, variables, X, context), expected, rtol=1e-5, atol=1e-6)


def test_the_lightweight_convolution_is_flaxs_depthwise_convolution():
    module = LightweightConvolution(H, 3, causal=True)
    variables = parameters(module, X)
    kernel = jax.nn.softmax(variables['params']['W']).repeat(C // H, axis=0).T[:, None]
    conv = nn.Conv(C, (3,), padding='CAUSAL', feature_group_count=C, use_bias=False)
    expected = conv.apply({'params': {'kernel': kernel}}, X)
    np.testing.assert_allclose(run(module, variables, X), expected, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize('causal, mask', [(False, None), (True, MASK)])
def test_they_are_their_compositions(module, causal, mask):
    module = module(H, 2, causal)
    variables = parameters(module, X)
    is_its_composition(module, variables, X, mask=mask)


def test_a_dynamic_convolution_of_two_streams_is_its_composition():
    module = DynamicConvolution(H, 2)
    variables = parameters(module, X, Z[0])
    is_its_composition(module, variables, X, Z[0])


@both
def test_a_causal_output_depends_on_the_last_inputs_alone(module):
    module = module(H, 3, causal=True)
    variables = parameters(module, X)
    y = lambda x: module.apply(variables, x)[0].sum(-1)  # noqa: E731
    jacobian = jax.jit(jax.jacobian(y))(X)  # [T, B, T, C]
    depends = np.abs(jacobian).sum((1, 3)) > 0
    np.testing.assert_array_equal(depends, np.tri(T, dtype=bool) & ~np.tri(T, k=-3, dtype=bool))


@both
def test_a_constant_passes_inside_and_loses_mass_at_the_ends(module):
    module = module(H, 3)
    constant = jnp.ones((1, T, C))
    y, _ = start(module, constant)
    np.testing.assert_allclose(y[:, 1:-1], 1, rtol=1e-6)
    assert bool((y[:, 0] < 0.99).all()) and bool((y[:, -1] < 0.99).all())


@pytest.mark.parametrize(
    'module, context', [(LightweightConvolution(H, 3), ()), (DynamicConvolution(H, 3), (Z,))]
)
def test_what_the_mask_hides_counts_as_zero(module, context):
    variables = parameters(module, X, *context)
    hidden = jnp.where(MASK[..., None], X, 1e6)
    zeroed = jnp.where(MASK[..., None], X, 0)
    y = run(module, variables, hidden, *context, mask=MASK)
    np.testing.assert_array_equal(y, run(module, variables, zeroed, *context))


def dropped(module, *context):
    """The kernels at every position of a causal module, read off its response to impulses."""
    impulses = jnp.broadcast_to(jnp.eye(T)[:, :, None], (T, T, C))  # row s: an impulse at s
    context = tuple(jnp.broadcast_to(z, (T, *z.shape)) for z in context)
    _, variables = start(module, impulses, *context)
    on = run(module, variables, impulses, *context, deterministic=False, rngs={'dropout': KEY})
    off = run(module, variables, impulses, *context, deterministic=True)
    return np.asarray(on), np.asarray(off)


def test_dropconnect_drops_entries_of_one_kernel_for_all_positions():
    on, off = dropped(LightweightConvolution(H, T, causal=True, dropconnect=0.5))
    scale = on[off > 0] / off[off > 0]
    assert {0.0, 2.0} == set(np.round(scale, 5))
    # entry j of the kernel is seen at s, j positions later, for every s
    np.testing.assert_allclose(on[0, :3], on[2, 2:5], rtol=1e-6)


def test_dropconnect_drops_entries_of_each_position_apart():
    module = DynamicConvolution(H, 3, causal=True, dropconnect=0.5)
    on, off = dropped(module, jnp.ones((T, M)))
    scale = on[off > 0] / off[off > 0]
    assert {0.0, 2.0} == set(np.round(scale, 5))
    np.testing.assert_allclose(off[0, 0], off[2, 2], rtol=1e-6)  # the same context
    assert bool((on[0, 0] != on[range(1, T), range(1, T)]).any())


@pytest.mark.parametrize(
    'module, inputs',
    [
        (LightweightConvolution(H, 3), (X,)),
        (DynamicConvolution(H, 3), (X, Z)),
        (ConditionalConvolution(5, 3), (IMAGES, TASKS)),
    ],
)
def test_bf16_is_close_to_f32(module, inputs):
    variables = parameters(module, *inputs)
    exact = run(module, variables, *inputs)
    y = run(module.clone(dtype=jnp.bfloat16), variables, *inputs)
    assert y.dtype == jnp.bfloat16
    assert jnp.linalg.norm(y.astype(jnp.float32) - exact) < 1e-2 * jnp.linalg.norm(exact)


def test_the_backward_pass_keeps_the_input_and_the_kernels_and_no_windows():
    x, kernel = random(5, 64, 8), jax.nn.softmax(random(6, 64, 2, 9))
    _, vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, True), x, kernel)
    residual_size = sum(leaf.size for leaf in jax.tree.leaves(vjp))
    assert residual_size <= x.size + kernel.size + 16


def mixed(variables, z):
    """The kernel and the bias of each example, expert by expert."""
    p = jax.tree.map(np.asarray, variables['params'])
    for z_b in np.asarray(z):
        g = 1 / (1 + np.exp(-(z_b @ p['G'] + p['a'])))
        kernel = sum(g_i * K_i for g_i, K_i in zip(g, p['K'], strict=True))
        yield {'kernel': kernel, 'bias': sum(g_i * b for g_i, b in zip(g, p['b'], strict=True))}


@pytest.mark.parametrize(
    'size, strides, padding, z',
    [
        (3, 1, 'SAME', None),
        ((2, 3), (2, 1), 'SAME', TASKS),
        (3, 2, 'VALID', TASKS),
        ((3, 1), 2, ((0, 2), (1, 0)), None),
    ],
)
def test_the_conditional_convolution_is_flaxs_with_the_mixed_kernel_of_each_example(
    size, strides, padding, z
):
    module = ConditionalConvolution(5, size, experts=3, strides=strides, padding=padding)
    variables = parameters(module, IMAGES, z)
    pair = size if isinstance(size, tuple) else (size, size)
    conv = nn.Conv(5, pair, strides=strides, padding=padding)
    context = IMAGES.mean((1, 2)) if z is None else z
    expected = [
        run(conv, {'params': params}, image)
        for params, image in zip(mixed(variables, context), IMAGES, strict=True)
    ]
    y = run(module, variables, IMAGES, z)
    np.testing.assert_allclose(y, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_conditional_convolution_is_its_composition():
    module = ConditionalConvolution(5, 2, experts=3, strides=(2, 1))
    is_its_composition(module, parameters(module, IMAGES), IMAGES)


def test_the_conditional_convolution_starts_at_unit_variance_with_experts_drawn_apart():
    x, z = random(5, 64, 4, 4, 8), jnp.eye(64)
    module = ConditionalConvolution(64, 3, experts=6, padding='VALID', context='one_hot')
    y, variables = start(module, x, z)
    assert 0.9 < y.var() < 1.1
    experts = variables['params']['K'].reshape(6, -1)
    np.testing.assert_allclose(experts.var(axis=1), 4 / 6 / (9 * 8), rtol=0.1)
    assert np.abs(np.corrcoef(experts) - np.eye(6)).max() < 0.1


@pytest.mark.parametrize(
    'module, inputs, message',
    [
        (LightweightConvolution(4, 3), (X,), 'expected a positive divisor of the 6'),
        (DynamicConvolution(4, 3), (X,), 'expected a positive divisor of the 6'),
        (LightweightConvolution(H, 0), (X,), 'width = 0'),
        (LightweightConvolution(H, 3), (X[0, 0],), r'x must be \[..., T, C\]'),
        (LightweightConvolution(H, 3), (X, MASK[:, 1:]), 'one entry per position'),
        (DynamicConvolution(H, 3), (X, Z[:, :2]), 'do not broadcast'),
        (DynamicConvolution(H, 3), (X[:, :1], Z), 'expected 1 positions, as in x'),
        (ConditionalConvolution(5, 3), (X,), r'x must be \[B, height'),
        (ConditionalConvolution(5, 3), (IMAGES, TASKS[:2]), 'with B = 3'),
        (ConditionalConvolution(5, 3, padding='FULL'), (IMAGES,), "'FULL'"),
        (
            ConditionalConvolution(5, 7, padding='VALID'),
            (IMAGES,),
            'at most the size of the padded',
        ),
    ],
)
def test_bad_input_is_refused_in_words(module, inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, KEY, *inputs)
