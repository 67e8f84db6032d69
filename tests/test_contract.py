import functools
import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mi import counting
from mi.estimate import program, topologies
from mi.kernels import bilinear, by_id, linear
from tests import prng
from tests.motifs.checks import random, wide

M, N, K = 3, 4, 5
ORDERS = ('outer', 'outer_chunks', 'x_first', 'z_first', 'z_first_chunks')
LEADING = [
    ((), ()),
    ((6,), (6,)),
    ((2, 6), (1, 6)),
    ((2, 6), (6,)),
    ((2, 6), (2, 1)),
    ((1, 6), (2, 1)),
]


def streams(x_lead=(), z_lead=(), dtype=jnp.float32):
    shapes = (*x_lead, N), (*z_lead, M), (M, N, K)
    return tuple(random(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes))


def triple_loop(x, z, W):
    """y_k = Σ_m Σ_n z_m W_mnk x_n, one product at a time, in float64."""
    lead = np.broadcast_shapes(x.shape[:-1], z.shape[:-1])
    x = np.broadcast_to(np.asarray(x, np.float64), (*lead, N))
    z = np.broadcast_to(np.asarray(z, np.float64), (*lead, M))
    W = np.asarray(W, np.float64)
    y = np.zeros((*lead, K))
    for at in np.ndindex(*lead):
        for m, n, k in itertools.product(range(M), range(N), range(K)):
            y[(*at, k)] += z[(*at, m)] * W[m, n, k] * x[(*at, n)]
    return y


@pytest.mark.parametrize('order', [None, *ORDERS])
@pytest.mark.parametrize('leads', LEADING, ids=str)
def test_every_order_is_the_triple_loop(leads, order):
    args = streams(*leads)
    y = jax.jit(functools.partial(bilinear.bilinear, order=order))(*args)
    np.testing.assert_allclose(y, triple_loop(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('order', ORDERS)
def test_gradients(order):
    args = streams((2, 3), (2, 1))
    f = jax.jit(lambda *a: bilinear.bilinear(*a, order=order))
    check_grads(f, args, order=2, modes=['rev'], atol=2e-2, rtol=2e-2)


def test_context_shared_over_time_is_contracted_once():
    S, T = 2, 50
    shared, per_step = (jax.ShapeDtypeStruct((S, t, M), jnp.float32) for t in (1, T))
    x = jax.ShapeDtypeStruct((S, T, N), jnp.float32)
    W = jax.ShapeDtypeStruct((M, N, K), jnp.float32)
    once = 2 * S * M * N * K + 2 * S * T * N * K  # W' for each sequence, then W'x for each step
    assert counting.flops(bilinear.bilinear, x, shared, W) == once
    assert counting.flops(bilinear.bilinear, x, per_step, W) > 2 * once


def test_shared_context_equals_the_context_repeated():
    x, z, W = streams((2, 7), (2, 1))
    repeated = jnp.repeat(z, 7, axis=1)
    np.testing.assert_allclose(
        bilinear.bilinear(x, z, W), bilinear.bilinear(x, repeated, W), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    'x, z, k, order',
    [
        ((64, 20, 64), (64, 1, 32), 64, 'z_first'),  # shared over time: W'(z) once
        ((512, 20, 256), (512, 1, 32), 256, 'z_first_chunks'),  # and in chunks where it is large
        ((64, 1, 256), (64, 20, 32), 256, 'x_first'),
        ((8, 256), (8, 30), 256, 'outer'),
        ((8, 256), (8, 300), 64, 'z_first'),
        ((256, 256), (256, 30), 15, 'x_first'),
        ((256, 64), (256, 30), 128, 'outer'),
        ((4096, 512), (4096, 64), 512, 'outer_chunks'),
        ((256, 64), (256, 128), 64, 'z_first'),
    ],
)
def test_plan_follows_the_shapes(x, z, k, order):
    assert bilinear.choose_order(x, z, k) == order


def test_plan_of_ids_takes_the_rows_of_W_where_many_inputs_share_one():
    assert bilinear.choose_order((512, 256), (512,), 256, 'ids') == 'groups'
    assert bilinear.choose_order((4, 100, 256), (4, 1), 256, 'ids') == 'rows'
    assert bilinear.choose_order((4096, 256), (4096,), 128, 'ids', 'gpu', contexts=30) == 'one_hot'
    assert bilinear.choose_order((4096, 256), (4096,), 128, 'ids', 'gpu', contexts=1000) == 'groups'


def test_plan_of_a_gpu_keeps_larger_intermediates():
    choose_gpu_order = functools.partial(bilinear.choose_order, platform='gpu')
    assert choose_gpu_order((4096, 512), (4096, 64), 512) == 'outer'
    assert choose_gpu_order((16384, 512), (16384, 64), 512) == 'outer_chunks'  # 2 GiB
    assert choose_gpu_order((4096, 512), (4096, 30), 128) == 'x_first'
    assert choose_gpu_order((4096, 64), (4096, 16), 1024) == 'outer'
    assert choose_gpu_order((8, 64), (8, 256), 32) == 'z_first'


@pytest.mark.parametrize(
    'x, z, k, order',
    [
        ((4096, 512), (4096, 64), 512, 'outer'),  # z ⊗ x is never written
        ((64, 32, 128), (64, 32, 32), 128, 'outer'),
        ((8192, 512), (8192, 128), 512, 'outer'),
        ((4096, 512), (4096, 30), 15, 'x_first'),  # or 113 of 128 columns are empty
        ((8, 64), (8, 256), 32, 'outer'),
        ((64, 20, 64), (64, 1, 32), 64, 'z_first'),  # shared over time
        ((64, 1, 256), (64, 20, 32), 256, 'x_first'),
    ],
)
def test_plan_of_a_tpu_leaves_the_intermediate_to_its_compiler(x, z, k, order):
    assert bilinear.choose_order(x, z, k, platform='tpu') == order


def test_plan_of_a_tpu_takes_ids_as_one_product():
    assert bilinear.choose_order((4096, 256), (4096,), 128, 'ids', 'tpu', contexts=30) == 'one_hot'
    assert bilinear.choose_order((4096, 256), (4096,), 128, 'ids', 'tpu', contexts=1000) == 'groups'
    assert bilinear.choose_order((4, 100, 256), (4, 1), 256, 'ids', 'tpu', contexts=30) == 'rows'


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('leads', LEADING, ids=str)
def test_every_order_as_written_for_a_tpu_is_the_triple_loop(leads, order, monkeypatch):
    monkeypatch.setattr(bilinear, 'target_platform', lambda: 'tpu')
    args = streams(*leads)

    def outputs_and_gradients():
        def loss(*args):  # another function for each platform, so that each is traced
            y = bilinear.bilinear(*args, order=order)
            return (y**2).sum(), y

        gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)
        return y, gradients

    y, gradients = outputs_and_gradients()
    np.testing.assert_allclose(y, triple_loop(*args), rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    _, expected = outputs_and_gradients()
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_forward_mode_as_written_for_a_tpu(monkeypatch):
    monkeypatch.setattr(bilinear, 'target_platform', lambda: 'tpu')
    args = streams((6,), (6,))
    for order in ORDERS:
        check_grads(functools.partial(bilinear.bilinear, order=order), args, 1, modes=['fwd'])


def test_the_platform_is_that_of_the_mesh_and_not_of_the_process(monkeypatch):
    """Under shard_map, vmap, scan and in a backward pass too."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ('data',))
    expected = mesh.devices.flat[0].platform
    monkeypatch.setattr(jax, 'default_backend', lambda: 'another')
    platforms = []

    @jax.custom_vjp
    def watch(x):
        platforms.append(linear.target_platform())
        return x

    def backward(_, dy):
        platforms.append(linear.target_platform())
        return (dy,)

    watch.defvjp(lambda x: (watch(x), None), backward)

    def loss(x):
        return jax.lax.scan(lambda y, _: (watch(y), None), x, None, length=2)[0].sum()

    f = jax.vmap(jax.grad(loss))
    rows = jax.sharding.PartitionSpec('data')
    split = jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    jax.jit(split).trace(jnp.ones((2, 3)))
    assert platforms and set(platforms) == {expected}
    platforms.clear()
    with jax.set_mesh(mesh):
        jax.jit(f).trace(jnp.ones((2, 3)))
    assert platforms and set(platforms) == {expected}
    platforms.clear()
    jax.jit(f).trace(jnp.ones((2, 3)))
    assert platforms and set(platforms) == {'another'}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: extra tpu'
)
@pytest.mark.parametrize('rows, m, n, k', [((64, 32), 32, 128, 128), ((1024,), 64, 512, 512)])
def test_a_tpu_never_writes_the_outer_product(rows, m, n, k, monkeypatch):
    """The program of all gradients has less in memory than z ⊗ x, and no product twice."""
    monkeypatch.setenv('XLA_FLAGS', '')  # libtpu aborts on flags of the CPU
    mesh = jax.sharding.Mesh([topologies.describe_one('v5e:1x1')], ('data',))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = ((*rows, n), (*rows, m), (m, n, k), (*rows, k))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated) for shape in shapes]

    def gradients(x, z, W, dy):
        y, pull_back = jax.vjp(bilinear.bilinear, x, z, W)
        return y, pull_back(dy)

    is_cached = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)  # nothing here could read it
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(gradients).lower(*args).compile()
    finally:
        jax.config.update('jax_enable_compilation_cache', is_cached)
    B = math.prod(rows)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * B * m * n / 4
    assert program.analyze(compiled).flops == 3 * 2 * B * m * n * k


@pytest.mark.parametrize('order', [None, *bilinear.ID_ORDERS])
@pytest.mark.parametrize('lead, ids', [((), ()), ((90,), (90,)), ((3, 40), (3, 1)), ((40,), ())])
def test_ids_are_one_hot_contexts(order, lead, ids):
    x, _, W = streams(lead)
    z = jax.random.randint(prng.key(3), ids, 0, M)
    expected = triple_loop(x, jax.nn.one_hot(z, M), W)
    y = bilinear.bilinear(x, z, W, order=order)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('ids', [np.zeros(80, int), np.arange(80) % M, np.r_[[2] * 79, 0]])
def test_gradients_of_groups_are_those_of_the_dense_product(ids):
    x, _, W = streams((80,))
    ids, dy = jnp.asarray(ids), jax.random.normal(prng.key(4), (80, K))

    def compute_grads(z):
        return jax.grad(lambda x, W: (bilinear.bilinear(x, z, W) * dy).sum(), (0, 1))(x, W)

    for got, expected in zip(
        compute_grads(ids), compute_grads(jax.nn.one_hot(ids, M)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_groups_under_vmap():
    x, _, W = streams((2, 70))
    ids = jax.random.randint(prng.key(3), (2, 70), 0, M)
    one = jax.vmap(lambda x, z: bilinear.bilinear(x, z, W, order='groups'))
    expected = triple_loop(x, jax.nn.one_hot(ids, M), W)
    np.testing.assert_allclose(one(x, ids), expected, rtol=1e-5, atol=1e-5)


def test_chunks_keep_a_tenth_of_the_temporaries_of_einsum():
    shapes = (2048, 256), (2048, 64), (64, 256, 256)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def temporaries(f):
        gradient = jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)))
        return gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes

    einsum = temporaries(lambda x, z, W: jnp.einsum('bm,mnk,bn->bk', z, W, x))
    assert bilinear.choose_order(*shapes[:2], 256) == 'outer_chunks'
    assert temporaries(bilinear.bilinear) <= 1.01 * einsum / 10  # and some scalars


def test_forward_mode_of_every_dense_order():
    args = streams((2, 3), (2, 1))
    for order in ORDERS:
        f = jax.jit(lambda *a, o=order: bilinear.bilinear(*a, order=o))
        check_grads(f, args, 1, modes=['fwd'])


@pytest.mark.parametrize('order', ORDERS)
def test_bf16_accumulates_in_f32(order):
    keys = jax.random.split(prng.key(1), 3)
    x = jax.random.normal(keys[0], (64, 128), jnp.bfloat16)
    z = jax.random.normal(keys[1], (64, 96), jnp.bfloat16)
    W = jax.random.normal(keys[2], (96, 128, 32), jnp.bfloat16)
    exact = np.einsum('bm,mnk,bn->bk', *(np.asarray(a, np.float64) for a in (z, W, x)))
    y = bilinear.bilinear(x, z, W, order=order)
    assert y.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)
    assert error < 4e-3  # accumulation over m or n in bf16 gives 1e-2


@pytest.mark.parametrize('order', ['outer_chunks', 'z_first_chunks'])
def test_parts_in_bf16_add_up_in_f32(order, monkeypatch):
    # Two entries are a part: 256 + 1, which bf16 rounds to 256, and then -256 + 0.
    monkeypatch.setattr(bilinear, '_CHUNK_FEATURES', 8)
    monkeypatch.setattr(bilinear, '_CHUNK_BYTES', 2 * 4 * K)
    terms = jnp.array([256, 1, -256, 0], jnp.bfloat16)
    one = jnp.array([1, 0, 0, 0], jnp.bfloat16)
    x, z = (one, terms) if order == 'outer_chunks' else (terms, one)
    y = bilinear.bilinear(x, z, jnp.ones((4, 4, K), jnp.bfloat16), order=order)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, np.ones(K))


def test_linear_is_the_matrix_product():
    x = jax.random.normal(prng.key(0), (2, 3, N))
    V = jax.random.normal(prng.key(1), (N, K))
    np.testing.assert_allclose(linear.linear(x, V), np.asarray(x) @ np.asarray(V), rtol=1e-5)


EMPTY = [((0,), ()), ((), (0,)), ((0,), (1,)), ((1,), (0,)), ((2, 0), (2, 1)), ((0, 1), (1, 3))]


@pytest.mark.parametrize('order', [None, *ORDERS])
@pytest.mark.parametrize('leads', EMPTY, ids=str)
def test_an_axis_of_no_entry_beside_one_that_is_shared_gives_none(leads, order):
    x, z, W = streams(*leads)
    lead = np.broadcast_shapes(*leads)
    f = functools.partial(bilinear.bilinear, order=order)
    y, pulled = jax.eval_shape(lambda *a: (f(*a), jax.vjp(f, *a)[1](f(*a))), x, z, W)
    assert y.shape == (*lead, K)
    assert [a.shape for a in pulled] == [x.shape, z.shape, W.shape]


def test_no_row_has_a_product_and_a_gradient_of_zero():
    x, z, W = streams((0,), ())
    assert bilinear.bilinear(x, z, W).shape == (0, K)
    dW = jax.grad(lambda W: bilinear.bilinear(x, z, W).sum())(W)
    np.testing.assert_array_equal(dW, np.zeros(W.shape))
    assert linear.linear(jnp.zeros((3, 0)), jnp.zeros((0, K))).tolist() == [[0] * K] * 3


@pytest.mark.parametrize('order', [None, *bilinear.ID_ORDERS])
@pytest.mark.parametrize('leads', EMPTY, ids=str)
def test_ids_of_no_entry_beside_a_row_that_is_shared_give_none(leads, order):
    x, _, W = streams(leads[0])
    ids = jnp.zeros(leads[1], int)
    f = functools.partial(bilinear.bilinear, order=order)
    y, dW = jax.eval_shape(
        lambda x, W: (f(x, ids, W), jax.grad(lambda W: f(x, ids, W).sum())(W)), x, W
    )
    assert (y.shape, dW.shape) == ((*np.broadcast_shapes(*leads), K), W.shape)


@pytest.mark.parametrize('order', ORDERS)
def test_float64_adds_up_in_float64(order):
    with jax.enable_x64(True):
        x, z, W = wide(streams((6,), (6,)))
        y = bilinear.bilinear(x, z, W, order=order)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, triple_loop(x, z, W), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('order', bilinear.ID_ORDERS)
def test_float64_by_id_and_its_gradient_add_up_in_float64(order):
    with jax.enable_x64(True):
        x, _, W = wide(streams((70,)))
        ids = jnp.arange(70) % M
        dy = jnp.asarray(np.random.default_rng(0).normal(size=(70, K)))
        f = lambda x, z, W, order=order: bilinear.bilinear(x, z, W, order=order)  # noqa: E731
        y, pull = jax.vjp(lambda x, W: f(x, ids, W), x, W)
        one_hot = np.eye(M)[ids]
        np.testing.assert_allclose(y, triple_loop(x, one_hot, W), rtol=1e-13, atol=1e-13)
        dx, dW = pull(dy)
        expected = np.einsum('bk,bnk->bn', dy, np.asarray(W)[ids])
        np.testing.assert_allclose(dx, expected, rtol=1e-13, atol=1e-13)
        expected = np.einsum('bm,bn,bk->mnk', one_hot, x, dy)
        np.testing.assert_allclose(dW, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('order', [None, *bilinear.ID_ORDERS])
def test_ids_out_of_range_are_the_nearest(order):
    too_large = [M + 5] * (by_id.BLOCK_ROWS + 1)  # more than run over the end of the last group
    ids = jnp.array([-1, 0, M - 1, *too_large])
    x, _, W = streams(ids.shape)
    nearest = jnp.clip(ids, 0, M - 1)
    expected = bilinear.bilinear(x, nearest, W, order=order)
    np.testing.assert_allclose(bilinear.bilinear(x, ids, W, order=order), expected, rtol=1e-6)
    np.testing.assert_array_equal(linear.linear(ids, W[:, 0]), W[nearest, 0])


def test_errors_say_what_was_given():
    x, z, W = streams((6,), (6,))
    with pytest.raises(ValueError, match=r'W must be \[m, n, k\].*\(4, 3, 5\)'):
        bilinear.bilinear(x, z, jnp.swapaxes(W, 0, 1))
    with pytest.raises(
        ValueError, match="unknown order 'inner'; known: outer, outer_chunks, x_first"
    ):
        bilinear.bilinear(x, z, W, order='inner')
    with pytest.raises(ValueError, match="order = 'groups': expected an order for a dense context"):
        bilinear.bilinear(x, z, W, order='groups')
    with pytest.raises(ValueError, match='do not broadcast'):
        bilinear.bilinear(x, z[:4], W)
