import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import (
    BlockMultiplicativeInteraction,
    DiagonalMultiplicativeInteraction,
    LowRankMultiplicativeInteraction,
    MultiplicativeInteraction,
    ScalarMultiplicativeInteraction,
    counting,
    fusion,
)
from mi.motifs.conditioning import Gate
from mi.unify import CONVERTERS, as_mi, compute_tensors, explain
from mi.unify.explanation import describe_form
from tests.motifs.checks import drawn, is_its_composition, random

N, M, K = 5, 3, 4


def test_the_tensors_of_the_full_form_are_its_parameters():
    x, z = random(0, 7, N), random(1, 7, M)
    module = MultiplicativeInteraction(K)
    variables = drawn(module, x, z)
    W, U, V, b = as_mi(module, variables, x, z)
    for got, name in zip((W, U, V, b), 'WUVb', strict=True):
        np.testing.assert_allclose(got, variables['params'][name], rtol=1e-5, atol=1e-6)


def test_the_low_rank_forms_W_is_the_sum_of_its_outer_products():
    x, z = random(0, 7, N), random(1, 7, M)
    module = LowRankMultiplicativeInteraction(K, rank=2)
    variables = drawn(module, x, z)
    p = variables['params']
    W, *_ = is_its_composition(module, variables, x, z)
    np.testing.assert_allclose(
        W, np.einsum('mr,nr,rk->mnk', p['P'], p['Q'], p['O']), rtol=1e-5, atol=1e-6
    )


def test_the_diagonal_forms_W_is_zero_off_the_diagonal_of_input_and_output():
    x, z = random(0, 7, N), random(1, 7, M)
    module = DiagonalMultiplicativeInteraction()
    variables = drawn(module, x, z)
    W, *_ = is_its_composition(module, variables, x, z)
    off_diagonal = W * (1 - jnp.eye(N))[None]
    np.testing.assert_allclose(off_diagonal, 0, atol=1e-7)


def test_a_module_that_no_equation_fits_is_refused():
    class Sine(nn.Module):
        @nn.compact
        def __call__(self, x, z):
            return jnp.sin(x * z)

    with pytest.raises(ValueError, match='Sine is not affine in x and in z'):
        as_mi(Sine(), {}, random(0, N), random(1, N))


def test_a_composition_of_several_products_has_no_tensors_of_its_own():
    x, z = random(0, 7, N), random(1, 7, M)
    module = Gate(K)
    variables = drawn(module, x, z)
    with pytest.raises(ValueError, match=r'Try \.products'):
        list(as_mi(module, variables, x, z))


@pytest.mark.parametrize(
    'module, form, ranks',
    [
        (MultiplicativeInteraction(K), 'full', '3 of 3, 5 of 5, 4 of 4'),
        (LowRankMultiplicativeInteraction(K, rank=2), 'low rank', '2 of 3, 2 of 5, 2 of 4'),
        (BlockMultiplicativeInteraction(K, blocks=2), 'sparse', '3 of 3, 5 of 5, 4 of 4'),
        (DiagonalMultiplicativeInteraction(), 'diagonal', '3 of 3, 5 of 5, 5 of 5'),
        (ScalarMultiplicativeInteraction(), 'scalar', '1 of 3, 5 of 5, 5 of 5'),
        (MultiplicativeInteraction(K, use_W=False), 'zero', '0 of 3, 0 of 5, 0 of 4'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_explain_tells_the_form_and_the_ranks(module, form, ranks):
    x, z = random(0, 7, N), random(1, 7, M)
    variables = drawn(module, x, z)
    text = explain(module, variables, x, z)
    assert f'{form}' in text
    assert ranks in text
    parameters = sum(p.size for p in jax.tree.leaves(variables))
    assert f'parameters  {parameters:,}' in text


def test_one_unfolding_that_lacks_rank_is_enough_for_low_rank():
    W = np.random.default_rng(0).normal(size=(3, 5, 4))
    assert describe_form(W) == 'full'
    W[2] = W[0] - W[1]  # as a matrix [5, 12] or [4, 15] it has full rank still
    assert describe_form(W) == 'low rank'


@pytest.mark.parametrize('kind', CONVERTERS, ids=lambda kind: kind.__name__)
def test_every_converter_is_for_the_module_class_of_its_annotation(kind):
    assert typing.get_type_hints(CONVERTERS[kind])['module'] is kind


def test_a_subclass_uses_the_converter_of_its_base_class_and_a_user_can_add_one(monkeypatch):
    class OpenGate(Gate):
        pass

    x, z = random(0, 7, N), random(1, 7, M)
    variables = drawn(OpenGate(K), x, z)
    base = as_mi(Gate(K), variables, x, z)
    np.testing.assert_array_equal(as_mi(OpenGate(K), variables, x, z).output, base.output)
    monkeypatch.setitem(CONVERTERS, OpenGate, lambda module, variables, x, z: 'converted')
    assert as_mi(OpenGate(K), variables, x, z) == 'converted'


def test_explain_counts_flops_and_bytes():
    x, z = random(0, 7, N), random(1, 7, M)
    module = MultiplicativeInteraction(K)
    variables = drawn(module, x, z)
    text = explain(module, variables, x, z)
    assert f'{counting.flops(module.apply, variables, x, z):,} in products' in text
    parameters = M * N * K + M * K + N * K + K
    assert f'{4 * parameters:,} of parameters, {4 * 7 * (N + M + K):,} in and out' in text
    assert 'x       the input [7, 5]\n    z       the context [7, 3]' in text


def test_a_block_diagonal_W_is_recognised():
    W = np.zeros((2, 6, 4))
    for i in range(2):
        W[:, 3 * i : 3 * i + 3, 2 * i : 2 * i + 2] = 1 + np.arange(12).reshape(2, 3, 2)
    assert describe_form(W) == 'block-diagonal, 2 blocks'
    assert describe_form(np.eye(3)[:, :, None]) == 'inner product'
    assert describe_form(np.eye(3)[:, :, None] * np.eye(3)[None]) == 'pointwise product'


class Affine(nn.Module):
    """y = zᵀWx + zᵀU + Vx + b, then what `change` makes of it and of the streams."""

    change: Callable[..., jax.Array] = lambda y, x, z: y
    dtype: Any = None

    @nn.compact
    def __call__(self, x, z):
        y = MultiplicativeInteraction(K, dtype=self.dtype, name='y')(x, z)
        return self.change(y, x, z)


def get_feature(x):
    return x.sum(-1, keepdims=True)


NOT_AFFINE = {
    'small outputs': lambda y, x, z: 1e-4 * nn.relu(y),
    'beside large outputs': lambda y, x, z: y + 1e-3 * jnp.tanh(3 * get_feature(x)),
    'half a percent': lambda y, x, z: y + 2e-3 * jnp.abs(y),
    'in z': lambda y, x, z: y + jnp.abs(get_feature(z)),
    'far from zero': lambda y, x, z: nn.relu(y + 1000),
    'far and small': lambda y, x, z: jnp.maximum(1e-3 * y, -1),
    'squares': lambda y, x, z: y + 1e-3 * get_feature(x) ** 2,
    'squares of z': lambda y, x, z: y + 1e-3 * get_feature(z) ** 2,
    'saturation': lambda y, x, z: jnp.clip(y, -1e5, 1e5),
    'statistics of the batch': lambda y, x, z: y - y.mean(0, keepdims=True),
    'not a number at zero': lambda y, x, z: y / jnp.linalg.norm(x, axis=-1, keepdims=True),
}


@pytest.mark.parametrize('name', NOT_AFFINE)
def test_what_is_not_affine_is_refused_whatever_its_size(name):
    x, z = random(0, 7, N), random(1, 7, M)
    module = Affine(NOT_AFFINE[name])
    variables = drawn(module, x, z)
    with pytest.raises(ValueError, match='Affine is not affine in x and in z'):
        as_mi(module, variables, x, z)


def test_what_is_not_affine_is_not_explained():
    x, z = random(0, 7, N), random(1, 7, M)
    module = Affine(NOT_AFFINE['in z'])
    with pytest.raises(ValueError, match='Affine is not affine in x and in z'):
        explain(module, drawn(module, x, z), x, z)


def test_one_large_row_does_not_hide_the_others():
    x, z = random(0, 7, N).at[3].set(3000), random(1, 7, M)
    module = Affine(lambda y, x, z: y + jnp.abs(get_feature(z)))
    with pytest.raises(ValueError, match='not affine'):
        as_mi(module, drawn(module, x, z), x, z)


def test_what_is_affine_is_taken_whatever_its_size():
    x, z = random(0, 7, N).at[3].mul(1e5), random(1, 7, M)
    for change in (
        lambda y, x, z: 1e-8 * y,
        lambda y, x, z: 1e8 * y,
        lambda y, x, z: y - 0.999 * y,
    ):
        module = Affine(change)
        variables = drawn(module, x, z)
        np.testing.assert_allclose(
            as_mi(module, variables, x, z).output, module.apply(variables, x, z), rtol=1e-3
        )


@pytest.mark.parametrize('form', ['mi', 'mi_low_rank', 'mi_tucker', 'mi_block', 'mi_diagonal',
                                  'mi_scalar', 'concat', 'multi_head', 'layer_norm'])  # fmt: skip
def test_integers_are_taken_as_the_contexts_that_they_stand_for(form):
    x, ids = random(0, 7, N), jnp.array([0, 1, 2, 2, 1, -1, 9])
    options = {'rank': 2} if 'rank' in fusion.get_options(form) else {}
    module = fusion.FUSIONS[form](K, context='one_hot', contexts=M, **options)
    variables = drawn(module, x, ids)
    composition = as_mi(module, variables, x, ids)
    expected = module.apply(variables, x, ids)
    np.testing.assert_allclose(composition.output, expected, rtol=1e-5, atol=1e-5)
    assert composition.products[0].W.shape[0] == M
    if form in ('mi', 'mi_low_rank', 'mi_tucker'):
        tensors = compute_tensors(variables)
        np.testing.assert_allclose(tensors.apply(x, ids), expected, rtol=1e-5, atol=1e-5)
    if form in ('mi', 'layer_norm'):  # one product, and several
        assert f'[{M}, ' in explain(module, variables, x, ids)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_tensors_of_a_module_of_any_dtype_are_those_of_f32(dtype):
    x, z = random(0, 7, N), random(1, 7, M)
    module = MultiplicativeInteraction(K, dtype=dtype)
    variables = drawn(module, x, z)
    for got, name in zip(as_mi(module, variables, x, z), 'WUVb', strict=True):
        np.testing.assert_allclose(got, variables['params'][name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='not affine'):
        as_mi(
            Affine(lambda y, x, z: nn.relu(y), dtype), {'params': {'y': variables['params']}}, x, z
        )


def test_a_module_that_rounds_to_bf16_itself_is_affine_up_to_that():
    x, z = random(0, 7, N), random(1, 7, M)
    module = Affine(lambda y, x, z: y.astype(jnp.bfloat16))
    variables = drawn(module, x, z)
    W, *_ = as_mi(module, variables, x, z)
    np.testing.assert_allclose(W, variables['params']['y']['W'], rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match='not affine'):
        module = Affine(lambda y, x, z: nn.relu(y).astype(jnp.bfloat16))
        as_mi(module, variables, x, z)


@pytest.mark.slow
def test_in_float64_the_tensors_are_float64():
    with jax.enable_x64(True):
        x, z = jnp.asarray(random(0, 7, N), float), jnp.asarray(random(1, 7, M), float)
        module = MultiplicativeInteraction(K, param_dtype=jnp.float64)
        variables = jax.tree.map(lambda p: p + 1e-9, drawn(module, x, z))
        for got, name in zip(as_mi(module, variables, x, z), 'WUVb', strict=True):
            np.testing.assert_allclose(got, variables['params'][name], rtol=1e-12, atol=1e-12)


def test_inside_jit_the_tensors_are_those_outside_and_nan_if_it_is_not_affine():
    x, z = random(0, 7, N), random(1, 7, M)
    module = Affine()
    variables = drawn(module, x, z)
    inside = jax.jit(lambda v, x, z: tuple(as_mi(module, v, x, z)))(variables, x, z)
    for got, expected in zip(inside, as_mi(module, variables, x, z), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    bent = Affine(NOT_AFFINE['in z'])
    assert all(
        jnp.isnan(a).all() for a in jax.jit(lambda v: tuple(as_mi(bent, v, x, z)))(variables)
    )
    with pytest.raises(ValueError, match=r'outside of jax\.jit'):
        jax.jit(lambda v: explain(module, v, x, z) and 0)(variables)


def test_a_context_by_its_name_and_further_inputs_reach_the_module():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, context, by=1.0, *, sign=1):
            return sign * by * MultiplicativeInteraction(K)(x, context)

    x, z = random(0, 7, N), random(1, 7, M)
    variables = drawn(Scaled(), x, z)
    one = as_mi(Scaled(), variables, x, context=z).output
    np.testing.assert_allclose(one, Scaled().apply(variables, x, z), rtol=1e-5, atol=1e-5)
    other = as_mi(Scaled(), variables, x, z, 2.0, sign=-1).output
    np.testing.assert_allclose(other, -2 * one, rtol=1e-5, atol=1e-5)
    named = as_mi(Scaled(), variables, x=x, context=z, sign=-1).output
    np.testing.assert_allclose(named, -one, rtol=1e-5, atol=1e-5)


def test_a_module_that_needs_a_rank_and_inputs_without_rows_are_fine():
    class Rows(nn.Module):
        @nn.compact
        def __call__(self, x, z):
            batch, _ = x.shape
            return MultiplicativeInteraction(K)(x, z) + jnp.zeros((batch, 1))

    x, z = random(0, 7, N), random(1, 7, M)
    variables = drawn(Rows(), x, z)
    expected = as_mi(Rows(), variables, x, z)
    empty = as_mi(Rows(), variables, x[:0], z[:1])
    assert empty.output.shape == (0, K)
    for got, tensor in zip(empty, expected, strict=True):
        np.testing.assert_allclose(got, tensor, rtol=1e-5, atol=1e-6)
    assert 'full' in explain(Rows(), variables, x[:0], z[:0])


@pytest.mark.parametrize(
    'module, message',
    [
        (Affine(lambda y, x, z: (y, y)), 'a single array .*shapes'),
        (Affine(lambda y, x, z: y.sum(-1)), r'output \[..., k\]'),
        (Affine(lambda y, x, z: y.sum(0)), r'output \[..., k\]'),
        (Affine(lambda y, x, z: y > 0), 'float dtype; got bool'),
        (jnp.dot, "a Linen module; got 'dot'"),
    ],
)
def test_what_is_no_module_with_one_output_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        as_mi(module, VARIABLES, random(0, 7, N), random(1, 7, M))


def test_what_has_not_two_streams_is_refused():
    x, ids = random(0, 7, N), jnp.zeros(7, int)
    with pytest.raises(ValueError, match='Dense: expected the two streams x and z; got 1'):
        as_mi(nn.Dense(K), {}, x)
    with pytest.raises(ValueError, match='expected the two streams'):
        as_mi(Affine(), VARIABLES, x, None)
    with pytest.raises(ValueError, match=r'Affine: z is int32.*one_hot'):
        as_mi(Affine(), VARIABLES, x, ids)
    with pytest.raises(ValueError, match='z is int32'):
        as_mi(Gate(K), {'params': {}}, x, ids)


VARIABLES = {
    'params': {'y': {'W': random(2, M, N, K), 'U': random(3, M, K), 'V': random(4, N, K),
                     'b': random(5, K)}}
}  # fmt: skip


def test_one_number_times_one_number_is_a_pointwise_product_and_not_a_scale_of_many():
    assert describe_form(np.ones((1, 1, 1))) == 'pointwise product'
    assert describe_form(np.ones((3, 1, 1))) == 'diagonal'
    assert describe_form(np.ones((3, 2, 2)) * np.eye(2)) == 'scalar'
