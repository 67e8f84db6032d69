"""`mi.find` on primitives beyond `mul` and `dot_general`: products counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mi.find import find
from tests.find.test_find import K, M, N, X, Z, motifs, sides, spec

ROWS = 2


def find_in(function, params=None, **streams):
    return find(lambda params, **s: function(params, **s), params, **(streams or {'x': X, 'z': X}))


def list_products(report):
    """Return the primitive and the sides of each product, in the order of the computation."""
    return [(i.primitive, *sorted((','.join(i.left), ','.join(i.right)))) for i in
            report.interactions]  # fmt: skip


# ------------------------------------------------------------------------------ moved arrays


def test_arrays_that_are_put_on_a_device_together_stay_apart():
    def multiply(params, x, z):
        left, right = jax.device_put((x, z))
        return left * right

    report = find_in(multiply)
    assert list_products(report) == [('mul', 'x', 'z')]
    assert report.outputs[0].describe() == 'bi-affine in x and z'


# ------------------------------------------------------------------------------ ragged and scaled

SIZES = jax.ShapeDtypeStruct((3,), jnp.int32)
ROUTED, TABLE = spec(10, N), spec(3, N, K)


def test_a_ragged_product_with_parameters_is_none_if_its_groups_are_fixed():
    report = find_in(lambda W, x: jax.lax.ragged_dot(x, W, jnp.array([2, 3, 5])), TABLE, x=ROUTED)
    assert not report.interactions
    assert report.outputs[0].describe() == 'affine in x'


def test_a_ragged_product_whose_groups_data_chooses_is_routing():
    report = find_in(jax_ragged, TABLE, x=ROUTED, sizes=SIZES)
    assert motifs(report) == ['routing'] and sides(report) == ['x · sizes']
    assert report.interactions[0].flops == 2 * 10 * N * K
    assert report.outputs[0].describe().startswith('affine in x')


def jax_ragged(W, x, sizes):
    return jax.lax.ragged_dot(x, W, sizes)


def test_a_ragged_product_of_two_streams_is_one():
    report = find_in(
        lambda _, x, z: jax.lax.ragged_dot(x, z, jnp.array([2, 3, 5])), x=ROUTED, z=TABLE
    )
    assert list_products(report) == [(report.interactions[0].primitive, 'x', 'z')]
    assert report.outputs[0].describe() == 'bi-affine in x and z'


def test_group_sizes_alone_are_no_product_but_a_dependence():
    report = find_in(lambda params, sizes: jax.lax.ragged_dot(*params, sizes), (ROUTED, TABLE),
                     sizes=SIZES)  # fmt: skip
    assert not report.interactions and not report.notes
    assert report.outputs[0].describe() == 'not polynomial in sizes'


def test_group_sizes_of_data_are_routing_for_a_table_of_data_too():
    report = find_in(lambda rows, z, sizes: jax.lax.ragged_dot(rows, z, sizes), ROUTED, z=TABLE,
                     sizes=SIZES)  # fmt: skip
    assert motifs(report) == ['routing'] and sides(report) == ['sizes · z']
    assert report.outputs[0].describe() == 'affine in z, not polynomial in sizes'


def test_a_ragged_product_of_two_streams_depends_on_its_group_sizes():
    report = find_in(lambda _, x, z, sizes: jax.lax.ragged_dot(x, z, sizes), x=ROUTED, z=TABLE,
                     sizes=SIZES)  # fmt: skip
    assert sides(report) == ['x · z']
    text = report.outputs[0].describe()
    assert text == 'affine in x, affine in z, not polynomial in sizes'


# ------------------------------------------------------------------------------ scatters


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.uint32])
@pytest.mark.parametrize(
    'function',
    [
        lambda _, x, i: jax.ops.segment_sum(x, i, 4),
        lambda _, x, i: jnp.zeros((16, N)).at[i].set(x),
        lambda _, x, i: jax.lax.dynamic_update_slice(jnp.zeros((16, N)), x, (i[0], i[1])),
        lambda _, x, i: x.at[i].add(1.0),
    ],
)
def test_a_scatter_is_linear_in_its_updates_and_not_in_its_indices(function, dtype):
    report = find_in(function, x=ROUTED, i=jax.ShapeDtypeStruct((10,), dtype))
    assert report.outputs[0].describe() == 'affine in x, not polynomial in i'
    assert 'as_mi' not in str(report)


def test_a_scatter_of_constants_is_not_polynomial_in_its_indices():
    report = find_in(lambda _, i: jax.ops.segment_sum(jnp.ones(3), i, 4), i=SIZES)
    assert report.outputs[0].describe() == 'not polynomial in i'


SCALED, OTHER = spec(2, 4, 64), spec(2, 3, 64)
SCALES, OTHER_SCALES = (jax.ShapeDtypeStruct((2, n, 2), jnp.float8_e8m0fnu) for n in (4, 3))
QUANTIZED, OTHER_QUANTIZED = (jax.ShapeDtypeStruct((2, n, 64), jnp.float8_e4m3fn) for n in (4, 3))


def test_a_scaled_matmul_of_two_streams_is_one():
    report = find_in(
        lambda scales, x, z: jax.nn.scaled_matmul(x, z, *scales),
        (SCALES, OTHER_SCALES),
        x=QUANTIZED,
        z=OTHER_QUANTIZED,
    )
    assert sides(report) == ['x · z']
    assert report.interactions[0].flops == 2 * (2 * 4 * 3) * 64


def test_a_scaled_matmul_with_parameters_is_none():
    report = find_in(
        lambda params, x: jax.nn.scaled_matmul(x, *params),
        (OTHER_QUANTIZED, SCALES, OTHER_SCALES),
        x=QUANTIZED,
    )
    assert not report.interactions and report.outputs[0].describe() == 'affine in x'


def test_a_scaled_dot_general_is_one_and_a_normalization_per_quantized_side():
    """Each side is divided by the largest of its own entries in a block; then they multiply."""
    numbers = ((2,), (2,)), ((0,), (0,))
    multiply = functools.partial(jax.nn.scaled_dot_general, dimension_numbers=numbers)
    config = jax.nn.get_scaled_dot_general_config('mxfp8')
    report = find_in(lambda _, x, z: multiply(x, z, configs=[config] * 3), x=SCALED, z=OTHER)
    assert sorted(zip(motifs(report), sides(report), strict=True)) == [
        ('normalization', 'x · x'), ('normalization', 'z · z'), ('unnamed', 'x · z'),
    ]  # fmt: skip
    plain = find_in(lambda _, x, z: multiply(x, z), x=SCALED, z=OTHER)
    assert sides(plain) == ['x · z']


# ------------------------------------------------------------------------------ products of entries


def test_a_product_over_an_axis_multiplies_entries_of_one_array():
    report = find_in(lambda _, x: x.prod(-1), x=X)
    assert list_products(report) == [('reduce_prod', 'x', 'x')]
    assert report.interactions[0].flops == ROWS * N
    assert report.outputs[0].describe() == f'polynomial of degree ≤ {N} in x'


def test_a_product_over_stacked_streams_depends_on_both():
    report = find_in(lambda _, x, z: jnp.stack([x, z]).prod(0))
    assert list_products(report) == [('reduce_prod', 'x,z', 'x,z')]


def test_a_product_over_an_axis_of_one_entry_or_of_masks_is_none():
    assert not find_in(lambda _, x: x[:, :1].prod(-1), x=X).interactions
    assert not find_in(lambda _, x: (x > 0).astype(jnp.float32).prod(-1), x=X).interactions
    report = find_in(lambda W, x: W.prod(-1)[None] * x, spec(N, K), x=X)
    assert not report.interactions


def test_a_cumulative_product_is_one_and_its_degree_is_confirmed():
    x = jax.random.normal(jax.random.key(0), (2, 3))
    report = find_in(lambda _, x: jnp.cumprod(x, 1), x=x).confirm()
    assert list_products(report) == [('cumprod', 'x', 'x')]
    assert report.outputs[0].degrees == {'x': 3} and report.outputs[0].is_confirmed


@pytest.mark.parametrize('is_window', [False, True])
def test_a_reduction_by_a_function_of_one_s_own_is_read(is_window):
    def reduce(_, x):
        def combine(a, b):
            return a * b + a + b

        if is_window:
            return jax.lax.reduce_window(x, 0.0, combine, (1, 2), (1, 2), 'VALID')
        return jax.lax.reduce(x, 0.0, combine, (1,))

    report = find_in(reduce, x=X)
    assert list_products(report) == [('mul', 'x', 'x')]
    assert report.interactions[0].times == ROWS * N


def test_an_associative_scan_over_two_steps_has_one_product():
    """(a, b) ∘ (a′, b′) = (a a′, a′ b + b′); only the second entry is returned."""

    def run(_, x, z):
        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        return jax.lax.associative_scan(combine, (x, z), axis=1)[1]

    x = spec(2, 2)
    assert list_products(find_in(run, x=x, z=x)) == [('mul', 'x', 'z')]


# ------------------------------------------------------------------------------ div, pow, inverses


@pytest.mark.parametrize(
    ('function', 'expected', 'text'),
    [
        (lambda x, z: x / z, ['div'], 'affine in x, not polynomial in z'),
        (lambda x, z: x * z**-1, ['mul'], 'affine in x, not polynomial in z'),
        (lambda x, z: x * jax.lax.rsqrt(z), ['mul'], 'affine in x, not polynomial in z'),
        (lambda x, z: x / (1 + jnp.abs(z)), ['div'], 'affine in x, not polynomial in z'),
        (lambda x, z: jnp.abs(x) ** z, ['pow'], 'not polynomial in x, not polynomial in z'),
        (lambda x, z: x**3 * z, ['mul'], 'affine in z, polynomial of degree ≤ 3 in x'),
        (lambda x, z: jnp.square(x * z), ['mul'], 'polynomial of degree ≤ 2 in x'),
        (lambda x, z: 2.0**z * x, ['mul'], 'affine in x, not polynomial in z'),
        (lambda x, z: x**2.5 + z, [], 'affine in z, not polynomial in x'),
        (lambda x, z: 3 / x + z / 3, [], 'affine in z, not polynomial in x'),
        (lambda x, z: jnp.exp(jnp.log(x) + jnp.log(z)), [], 'not polynomial in x'),
        (lambda x, z: jnp.hypot(x, z), None, 'not polynomial in x'),
        (lambda x, z: (x.sum(-1) + 1j * z.sum(-1)).real, [], 'affine in x, affine in z'),
    ],
)  # fmt: skip
def test_divisions_and_powers(function, expected, text):
    report = find_in(lambda _, x, z: function(x, z))
    if expected is not None:
        assert [i.primitive for i in report.interactions] == expected
        assert set(sides(report)) <= {'x · z', 'z · x'}
    if not text.startswith('affine in x, affine in z'):
        assert report.outputs[0].describe().startswith(text)


def test_a_linear_system_is_a_product_with_an_inverse():
    def solve(_, x, z):
        matrix = jnp.eye(M)[None] + jnp.tril(jnp.broadcast_to(z[:, :, None], (2, M, M)), -1)
        return jax.lax.linalg.triangular_solve(matrix, x[..., None], left_side=True, lower=True)

    report = find_in(solve, x=Z, z=Z)
    assert list_products(report) == [('triangular_solve', 'x', 'z')]
    assert report.outputs[0].describe() == 'affine in x, not polynomial in z'


def test_a_solver_is_one_product_whatever_it_computes():
    """LU with pivots has two triangular systems and a permutation that depends on z."""

    def solve(_, x, z):
        return jnp.linalg.solve(jnp.eye(N) + jnp.diag(z[0]), x[0])

    report = find_in(solve)
    assert list_products(report) == [('custom_linear_solve', 'x', 'z')]
    assert report.outputs[0].describe() == 'affine in x, not polynomial in z'
    assert report.interactions[0].flops > N * N
    constant = find_in(lambda A, x: jnp.linalg.solve(A, x[0]), spec(N, N), x=X)
    assert not constant.interactions and constant.outputs[0].describe() == 'affine in x'
    fixed = find_in(lambda b, z: jnp.linalg.solve(jnp.diag(z[0]), b), spec(N), z=X)
    assert not fixed.interactions and fixed.outputs[0].describe() == 'not polynomial in z'


def test_a_solver_of_one_s_own_is_one_product():
    def solve(params, x, z):
        def matvec(y):
            return y + z * y

        def run(_, b):
            return b / (1 + z)

        return jax.lax.custom_linear_solve(matvec, x, run, symmetric=True)

    assert list_products(find_in(solve)) == [('custom_linear_solve', 'x', 'z')]


class Solver(nn.Module):
    """Solves (I + W(z)) y = x for a generated matrix W(z)."""

    @nn.compact
    def __call__(self, x, z):
        matrix = jnp.eye(N) + nn.Dense(N * N)(z).reshape(N, N)

        def matvec(y):
            return matrix @ y

        return jax.lax.custom_linear_solve(matvec, x, lambda _, b: jnp.linalg.inv(matrix) @ b)


def test_a_solve_is_in_its_module_once():
    x, z = spec(N), spec(M)
    variables = jax.eval_shape(Solver().init, jax.random.key(0), x, z)
    paths = [i.path for i in find(Solver().apply, variables, x=x, z=z).interactions]
    assert paths == ['Solver']


# ------------------------------------------------------------------------------ convolutions

NUMBERS = 'NHWC', 'HWIO', 'NHWC'
IMAGE = spec(2, 6, 6, 3)


def convolve(image, kernel, **options):
    return jax.lax.conv_general_dilated(
        image, kernel, (1, 1), 'SAME', dimension_numbers=NUMBERS, **options
    )


def test_a_kernel_per_example_is_one_dynamic_convolution():
    """vmap makes a grouped convolution of it; each output sums 3 × 3 × 3 products."""

    def run(params, x, z):
        kernels = (z @ params).reshape(2, 3, 3, 3, 5)
        return jax.vmap(lambda image, kernel: convolve(image[None], kernel)[0])(x, kernels)

    report = find_in(run, spec(M, 3 * 3 * 3 * 5), x=IMAGE, z=Z)
    assert motifs(report) == ['dynamic convolution'] and sides(report) == ['x · z']
    assert report.interactions[0].flops == 2 * (2 * 6 * 6 * 5) * 27
    assert report.outputs[0].describe() == 'bi-affine in x and z'


def test_a_depthwise_kernel_from_the_image_itself_is_one():
    def run(params, x):
        kernel = (x.mean((0, 1, 2)) @ params).reshape(3, 3, 1, 3)
        return convolve(x, kernel, feature_group_count=3)

    report = find_in(run, spec(3, 27), x=IMAGE)
    assert motifs(report) == ['dynamic convolution'] and sides(report) == ['x · x']
    assert report.interactions[0].flops == 2 * (2 * 6 * 6 * 3) * 9


def test_a_template_of_parameters_under_a_kernel_of_data_is_affine():
    report = find_in(
        lambda template, z: convolve(template, z.reshape(3, 3, 3, 1)),
        spec(1, 6, 6, 3),
        z=spec(27),
    )
    assert not report.interactions and report.outputs[0].describe() == 'affine in z'


def test_a_convolution_of_two_signals_is_one():
    assert sides(find_in(lambda _, x, z: jnp.convolve(x, z), x=spec(9), z=spec(4))) == ['x · z']


def test_patches_that_data_weighs_are_one():
    """As an involution: patches are a convolution with a constant kernel."""

    def run(params, x):
        patches = jax.lax.conv_general_dilated_patches(x, (3, 3), (1, 1), 'SAME',
                                                       dimension_numbers=NUMBERS)  # fmt: skip
        weights = (x @ params).reshape(2, 6, 6, 1, 9)
        return (patches.reshape(2, 6, 6, 3, 9) * weights).sum(-1)

    report = find_in(run, spec(3, 9), x=IMAGE)
    assert sides(report) == ['x · x'] and report.outputs[0].degrees == {'x': 2}


# ------------------------------------------------------------------------------ custom derivatives


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale_by(x, z, power):
    return x * z**power


def scale_forward(x, z, power):
    return x * z**power + 0 * (x * x * z), (x, z)  # what the backward pass saves is not counted


def scale_backward(power, residuals, g):
    x, z = residuals
    return g * z**power, g * x * power * z ** (power - 1)


scale_by.defvjp(scale_forward, scale_backward)


def test_a_custom_vjp_counts_its_function_and_a_gradient_its_backward_pass():
    report = find_in(lambda _, x, z: scale_by(x, z, 2))
    assert list_products(report) == [('mul', 'x', 'z')] and not report.notes
    assert report.outputs[0].describe() == 'affine in x, polynomial of degree ≤ 2 in z'

    # ∂/∂z Σ x z² is 2 x z: one product.
    gradient = find_in(lambda _, x, z: jax.grad(lambda z: scale_by(x, z, 2).sum())(z))
    assert list_products(gradient) == [('mul', 'x', 'z')]


@jax.custom_jvp
def gated(x, z):
    return jax.nn.sigmoid(z) * jnp.sin(x)


@gated.defjvp
def differentiate(primals, tangents):
    x, z = primals
    return gated(x, z), tangents[0] * z * x


def test_a_custom_jvp_counts_its_function_alone():
    report = find_in(lambda _, x, z: gated(x, z))
    assert motifs(report) == ['gate'] and list_products(report) == [('mul', 'x', 'z')]


# ------------------------------------------------------------------------------ devices

MESH = AbstractMesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def shard(function, in_specs, out_specs, **options):
    return jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


def test_flops_of_a_shard_map_are_those_of_all_devices():
    """Every device multiplies its quarter of the rows; those along "model" repeat it."""
    rows = PartitionSpec('data')
    function = shard(lambda x, z: jax.nn.sigmoid(z) * jnp.sin(x), (rows, rows), rows)
    report = find_in(lambda _, x, z: function(x, z), x=spec(8, N), z=spec(8, N))
    assert motifs(report) == ['gate']
    assert report.interactions[0].flops == 2 * 8 * N
    (output,) = report.outputs
    assert output.shape == (8, N)


def test_a_sum_over_devices_is_another_array():
    """x ⊙ psum(x) is a product of two arrays, and x / psum(x) a normalization; sums are none."""
    rows = PartitionSpec('data')

    def run(x):
        return x * jax.lax.psum(x, 'data'), x / jax.lax.psum(x, 'data'), jax.lax.pmean(x, 'data')

    function = shard(run, rows, (rows, rows, PartitionSpec()))
    report = find_in(lambda _, x: function(x), x=spec(8, N))
    assert motifs(report) == ['normalization', 'normalization']
    assert [output.degrees['x'] for output in report.outputs] == [2, np.inf, 1]


def test_rows_that_devices_exchange_are_other_rows():
    """ppermute, all_gather and all_to_all move entries: affine, and products with them count."""
    rows = PartitionSpec('data')

    def run(x, z):
        shifted = jax.lax.ppermute(x, 'data', [(i, (i + 1) % 4) for i in range(4)])
        everything = jax.lax.all_gather(z, 'data').mean(0)
        moved = jax.lax.all_to_all(x, 'data', 1, 1, tiled=True)
        return x * shifted, x * everything, x * moved, shifted + everything

    function = shard(run, (rows, rows), (rows, rows, rows, rows))
    report = find_in(lambda _, x, z: function(x, z), x=spec(8, 8), z=spec(8, 8))
    assert sorted(sides(report)) == ['x · x', 'x · x', 'x · z']
    assert report.outputs[3].describe() == 'bi-affine in x and z'


def test_attention_in_a_shard_map_is_scores_and_mix():
    heads = PartitionSpec(None, None, 'model')

    def attend(q, k, v):
        weights = jax.nn.softmax(jnp.einsum('bthd,bshd->bhts', q, k))
        return jnp.einsum('bhts,bshd->bthd', weights, v)

    function = shard(attend, (heads,) * 3, heads)
    token = spec(2, 5, 4, 8)
    report = find_in(lambda _, x, z: function(x, z, z), x=token, z=token)
    assert motifs(report) == ['attention scores', 'attention mix']
    # 4 heads over 2 devices, and 4 times the same along "data".
    assert [i.flops for i in report.interactions] == [4 * 2 * 2 * 4 * 5 * 5 * 8] * 2


# ------------------------------------------------------------------------------ Pallas


def call_kernel(kernel, *arrays, grid=(), blocks=None, out=None, **options):
    shape = jax.ShapeDtypeStruct(out or arrays[0].shape, arrays[0].dtype)
    specs = {}
    if blocks is not None:
        *in_specs, out_spec = blocks
        specs = {'grid': grid, 'in_specs': in_specs, 'out_specs': out_spec}
    return pl.pallas_call(kernel, out_shape=shape, **specs, **options)(*arrays)


def gate_kernel(x_ref, z_ref, out_ref):
    out_ref[...] = jax.nn.sigmoid(z_ref[...]) * jnp.sin(x_ref[...])


def test_a_pallas_kernel_is_read():
    report = find_in(lambda _, x, z: call_kernel(gate_kernel, x, z))
    assert motifs(report) == ['gate'] and sides(report) == ['z · x'] and not report.notes
    assert report.interactions[0].flops == ROWS * N and report.interactions[0].times == 1


def test_a_kernel_runs_once_per_step_of_its_grid():
    block = pl.BlockSpec((2, N), lambda i: (i, 0))
    report = find_in(
        lambda _, x, z: call_kernel(gate_kernel, x, z, grid=(4,), blocks=[block] * 3),
        x=spec(8, N),
        z=spec(8, N),
    )
    (product,) = report.interactions
    assert (product.motif, product.times, product.flops) == ('gate', 4, 8 * N)
    assert product.left_shape == (2, N)


def matmul_kernel(x_ref, z_ref, out_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    out_ref[...] += x_ref[...] @ z_ref[...]


def multiply_blocks(x, z):
    (m, k), n, size = x.shape, z.shape[1], 4
    blocks = [
        pl.BlockSpec((size, size), lambda row, column, step: (row, step)),
        pl.BlockSpec((size, size), lambda row, column, step: (step, column)),
        pl.BlockSpec((size, size), lambda row, column, step: (row, column)),
    ]
    grid = m // size, n // size, k // size
    return call_kernel(matmul_kernel, x, z, grid=grid, blocks=blocks, out=(m, n))


def test_a_product_of_matrices_in_blocks_is_one_with_the_flops_of_all():
    report = find_in(lambda _, x, z: multiply_blocks(x, z), x=spec(8, 12), z=spec(12, 4))
    (product,) = report.interactions
    assert product.times == 2 * 1 * 3 and product.flops == 2 * 8 * 12 * 4
    assert list_products(report) == [('dot_general', 'x', 'z')]
    weights = find_in(lambda W, x: multiply_blocks(x, W), spec(12, 4), x=spec(8, 12))
    assert not weights.interactions and weights.outputs[0].shape == (8, 4)


def test_a_loop_over_rows_in_a_kernel_writes_what_it_reads():
    """h ← sigmoid(z_t) ⊙ h + x_t: written row by row, and read again."""

    def kernel(x_ref, z_ref, out_ref):
        def step(t, h):
            h = jax.nn.sigmoid(z_ref[t]) * h + x_ref[t]
            out_ref[t] = h
            return h

        jax.lax.fori_loop(0, 5, step, jnp.zeros(N))

    report = find_in(lambda _, x, z: call_kernel(kernel, x, z), x=spec(5, N), z=spec(5, N))
    (product,) = report.interactions
    assert (product.motif, product.times) == ('gated recurrence', 5)
    assert report.outputs[0].describe() == 'affine in x, not polynomial in z'


def test_a_product_of_an_output_that_was_written_before():
    """out ← x, then out ← out ⊙ z: the second read depends on x."""

    def kernel(x_ref, z_ref, out_ref):
        out_ref[...] = x_ref[...]
        out_ref[...] = out_ref[...] * z_ref[...]

    report = find_in(lambda _, x, z: call_kernel(kernel, x, z))
    assert list_products(report) == [('mul', 'x', 'z')]
    assert report.outputs[0].describe() == 'bi-affine in x and z'


def test_a_kernel_that_cannot_be_read_is_noted_in_one_line():
    """Blocks that a stream chooses have no rule."""
    from jax.experimental.pallas import tpu as pltpu

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2,),
        in_specs=[pl.BlockSpec((1, N), lambda i, ids: (ids[i], 0))],
        out_specs=pl.BlockSpec((1, N), lambda i, ids: (i, 0)),
    )

    def kernel(ids_ref, x_ref, out_ref):
        out_ref[...] = x_ref[...]

    def run(_, x, ids):
        shape = jax.ShapeDtypeStruct((2, N), jnp.float32)
        return pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=shape)(ids, x)

    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    report = find_in(run, x=spec(8, N), ids=ids)
    assert report.notes == ('pallas_call: its products cannot be read',)
    assert report.outputs[0].degrees == {'x': np.inf, 'ids': np.inf}


# ------------------------------------------------------------------------------ references


def test_a_mutable_array_holds_what_was_written():
    def run(_, x, z):
        ref = jax.new_ref(jnp.zeros((2, N)))
        ref[...] = x
        ref[...] = ref[...] * z
        ref[0] = z[0]
        return jax.ref.freeze(ref)

    report = find_in(run)
    assert list_products(report) == [('mul', 'x', 'z')] and not report.notes


def test_a_mutable_array_in_a_loop_and_a_branch():
    """ref ← ref ⊙ x + z in a scan; a branch writes z."""

    def run(_, x, z):
        ref = jax.new_ref(x)

        def step(carry, _):
            ref[...] = jnp.sin(ref[...]) * carry + carry
            return carry, None

        jax.lax.scan(step, z, None, 3)

        def write():
            ref[...] = z

        jax.lax.cond(z[0, 0] > 0, write, lambda: None)
        return ref[...]

    report = find_in(run)
    (product,) = report.interactions
    assert product.times == 3 and {*product.left, *product.right} == {'x', 'z'}


# ------------------------------------------------------------------------------ branches and while


def test_numbers_that_branches_choose_are_products_too():
    def choose(stream):
        return jax.lax.cond(stream[0, 0] > 0, lambda: 2.0, lambda: 3.0)

    assert sides(find_in(lambda _, x, z: choose(x) * choose(z))) == ['x · z']


def test_an_output_depends_on_what_ends_its_loop():
    """x doubles as often as z says; without an iteration it is x itself."""

    def run(_, x, z):
        count = jnp.floor(z[0, 0])
        return jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, 2 * c[1]), (count, x))[1]

    report = find_in(run)
    assert not report.interactions and not report.notes
    assert report.outputs[0].describe() == 'affine in x, not polynomial in z'

    def reset(_, x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 9, jnp.zeros_like, x)

    assert not find_in(reset, x=X).notes
