"""Against XLA's own convolution, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import counting
from mi.kernels.convolution import AXES, convolve
from tests.motifs.checks import drawn, random


@pytest.mark.parametrize(
    'size, stride, padding, channels, options',
    [
        (8, 4, 'VALID', 4, {}),
        (4, 2, 'VALID', 32, {}),
        (3, 1, 'VALID', 5, {}),
        (3, 1, 'SAME', 5, {}),
        (4, 2, 'SAME', 3, {}),
        (3, 1, ((1, 0), (2, 1)), 3, {}),
        (3, 2, 'SAME', 3, {}),  # a stride that does not divide, and other kinds: left as they are
        (3, 1, 'SAME', 4, {'feature_group_count': 2}),
        (3, 1, 'SAME', 4, {'kernel_dilation': 2}),
    ],
)
def test_it_is_the_convolution(size, stride, padding, channels, options):
    make = functools.partial(nn.Conv, 6, (size, size), (stride, stride), padding=padding, **options)
    theirs, ours = make(), make(conv_general_dilated=convolve)
    x = random(0, 2, 21, 23, channels)
    params = drawn(ours, x)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.eval_shape(theirs.init, jax.random.key(1), x)
    )

    def gradients(conv):
        def loss(params, x):
            y = conv.apply(params, x)
            return (y * random(2, *y.shape)).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradients(ours), gradients(theirs),
    )  # fmt: skip


def test_sums_of_bf16_are_rounded_once():
    x, W = (
        array.astype(jnp.bfloat16) for array in (random(0, 2, 9, 11, 32), random(1, 3, 3, 32, 6))
    )
    exact = convolve(
        *(array.astype(jnp.float32) for array in (x, W)), (1, 1), 'SAME', dimension_numbers=AXES
    )
    y = convolve(x, W, (1, 1), 'SAME', dimension_numbers=AXES)
    assert y.dtype == jnp.bfloat16
    error, rounding = (jnp.std(a.astype(jnp.float32) - exact) for a in (y, exact.astype(y.dtype)))
    assert error < 1.05 * rounding


def test_the_dtype_of_the_output_can_be_chosen():
    x, W = (
        random(i, *shape).astype(jnp.bfloat16)
        for i, shape in ((0, (2, 9, 9, 32)), (1, (3, 3, 32, 6)))
    )
    wide = {'dimension_numbers': AXES, 'preferred_element_type': jnp.float32}
    assert convolve(x, W, (1, 1), 'SAME', **wide).dtype == jnp.float32


def test_a_gradient_is_one_product_for_each_factor():
    """The transposed product has a term for every pixel of the padded input; no other is made."""
    x, W = random(0, 2, 9, 11, 32), random(1, 3, 3, 32, 6)

    def gradients(x, W):
        def loss(x, W):
            return convolve(x, W, (1, 1), 'SAME', dimension_numbers=AXES).sum()

        return jax.grad(loss, argnums=(0, 1))(x, W)

    per_pixel = 2 * 2 * 9 * 32 * 6  # FLOPs of two images
    assert counting.flops(gradients, x, W) == per_pixel * (9 * 11 + 11 * 13 + 9 * 11)


def test_accelerators_keep_their_own():
    conv = nn.Conv(6, (4, 4), (2, 2), conv_general_dilated=convolve)
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), np.float32)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)

    def gradient(params, x):
        return jax.grad(lambda params: conv.apply(params, x).sum())(params)

    def lowered(platform):
        return jax.export.export(jax.jit(gradient), platforms=[platform])(params, x).mlir_module()

    assert lowered('cuda').count('stablehlo.convolution') == 1
    assert lowered('cpu').count('stablehlo.dot_general') == 4


def test_a_mesh_decides_while_tracing():
    """No program for one platform has both ways, nor what both would save for a gradient."""
    x, W = random(0, 2, 9, 11, 32), random(1, 3, 3, 32, 6)

    def call(x, W):
        return convolve(x, W, (1, 1), 'SAME', dimension_numbers=AXES)

    def list_primitives(platform):
        device = jax.sharding.AbstractDevice('', None, platform)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return str(jax.make_jaxpr(call)(x, W))

    cpu, tpu = list_primitives('cpu'), list_primitives('tpu')
    assert cpu.count('dot_general') == 9 and 'conv_general_dilated' not in cpu
    assert tpu.count('conv_general_dilated') == 1 and 'dot_general' not in tpu
    assert 'platform_index' not in cpu + tpu
    mesh = jax.sharding.Mesh(jax.devices()[:1], ('data',))
    with jax.set_mesh(mesh):
        y = jax.jit(call)(x, W)
    np.testing.assert_allclose(y, jax.jit(call)(x, W), rtol=1e-6)
