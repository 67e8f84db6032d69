import jax
import jax.numpy as jnp
import pytest

from mi import counting
from mi.kernels.bilinear import bilinear


def test_parameters_counts_shapes():
    tree = {
        'W': jax.ShapeDtypeStruct((3, 4, 5), jnp.float32),
        'b': jnp.zeros(5),
        's': jnp.zeros(()),
    }
    assert counting.parameters(tree) == 66


def test_of_a_choice_by_platform_the_branch_that_runs_counts():
    x, W = jax.ShapeDtypeStruct((7, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3), jnp.float32)
    one = 2 * 7 * 3 * 3

    def choose(x, W):
        return jax.lax.platform_dependent(
            x, W, cpu=lambda x, W: x @ W @ W, cuda=lambda x, W: x @ W, default=lambda x, W: x
        )

    flops = {}
    for platform in ('cpu', 'gpu', 'tpu'):
        device = jax.sharding.AbstractDevice('', None, platform)
        with jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((), (), abstract_device=device)
        ):
            flops[platform] = counting.flops(choose, x, W)
    assert flops == {'cpu': 2 * one, 'gpu': one, 'tpu': 0}


def test_flops_of_products_scans_convolutions_and_branches():
    x, W = jax.ShapeDtypeStruct((7, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3), jnp.float32)
    one = 2 * 7 * 3 * 3
    assert counting.flops(lambda x, W: jnp.tanh(x @ W) + 1, x, W) == one

    def loop(x, W):
        return jax.lax.scan(lambda x, _: (x @ W, None), x, length=10)[0]

    assert counting.flops(loop, x, W) == 10 * one
    assert counting.flops(jax.jit(loop), x, W) == 10 * one
    assert (
        counting.flops(
            jax.vmap(loop, in_axes=(0, None)), jax.ShapeDtypeStruct((4, 7, 3), jnp.float32), W
        )
        == 40 * one
    )

    def branch(x, W):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ W, lambda: (x @ W) @ W)

    assert counting.flops(branch, x, W) == 2 * one

    image, kernel = (
        jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32),
        jax.ShapeDtypeStruct((5, 3, 2, 2), jnp.float32),
    )
    conv = lambda i, k: jax.lax.conv(i, k, (1, 1), 'VALID')  # noqa: E731
    assert counting.flops(conv, image, kernel) == 2 * (3 * 2 * 2) * (5 * 7 * 7)


def test_products_have_the_bytes_of_both_factors_and_of_the_result():
    x, W = jax.ShapeDtypeStruct((7, 3), jnp.bfloat16), jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)

    def loop(x, W):
        return jax.lax.scan(lambda _, row: (0, row @ W), 0, jnp.stack([x] * 4))[1]

    assert counting.products(loop, x, W) == [
        counting.Product(2 * 7 * 3 * 5, 2 * (7 * 3 + 3 * 5 + 7 * 5), 4),
    ]


def test_rows_by_id_cost_one_product_however_the_ids_are_distributed():
    B, m, n, k, seeds = 2048, 5, 64, 48, 3
    x, W = jax.ShapeDtypeStruct((B, n), jnp.float32), jax.ShapeDtypeStruct((m, n, k), jnp.float32)
    ids = jax.ShapeDtypeStruct((B,), jnp.int32)

    def multiply(x, ids, W):
        return bilinear(x, ids, W, order='groups')

    def differentiate(x, ids, W):
        return jax.grad(lambda x, W: (multiply(x, ids, W) ** 2).sum(), (0, 1))(x, W)

    one = 2 * B * n * k
    assert (
        counting.flops(multiply, x, ids, W) == one == counting.flops(jax.jit(multiply), x, ids, W)
    )
    assert counting.flops(differentiate, x, ids, W) == 3 * one

    # Several models on the same rows, and on rows of their own.
    models = jax.ShapeDtypeStruct((seeds, *W.shape), W.dtype)
    for in_axes, rows in (((None, None, 0), x), ((0, None, 0), x.update(shape=(seeds, B, n)))):
        for function, products in ((multiply, 1), (differentiate, 3)):
            batched = jax.vmap(function, in_axes)
            assert counting.flops(batched, rows, ids, models) == seeds * products * one


@pytest.mark.parametrize('guess', [None, 1, 2, 30, 203, 5000])
@pytest.mark.parametrize('target', [1, 4, 17, 100, 101, 5000, 123_456])
def test_nearest_size_is_the_nearest(target, guess):
    price = lambda s: 3 * s * s + 2 * s  # noqa: E731
    nearest = min(range(1, 400), key=lambda s: abs(price(s) - target))
    if price(1) > 1.1 * target:
        with pytest.raises(ValueError, match='the smallest size, 1, costs 5'):
            counting.nearest_size(price, target, guess=guess)
    else:
        sizes = []
        cost = lambda s: sizes.append(s) or price(s)  # noqa: E731
        assert counting.nearest_size(cost, target, guess=guess) == nearest
        assert len(sizes) == len(set(sizes)) <= 15  # each costs a trace of the model
        assert guess != nearest or len(sizes) <= 4


def test_nearest_size_refuses_a_cost_that_does_not_grow():
    with pytest.raises(ValueError, match='no size up to'):
        counting.nearest_size(lambda size: 5, 100)
