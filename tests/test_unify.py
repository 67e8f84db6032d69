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
    cost,
    fusion,
)
from mi.unify import as_mi, explain
from mi.unify.explanation import form as form_of
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
    module = fusion.Gate(K)
    variables = drawn(module, x, z)
    with pytest.raises(ValueError, match=r'use \.products'):
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


def test_explain_counts_flops_and_bytes():
    x, z = random(0, 7, N), random(1, 7, M)
    module = MultiplicativeInteraction(K)
    variables = drawn(module, x, z)
    text = explain(module, variables, x, z)
    assert f'{cost.flops(module.apply, variables, x, z):,} in products' in text
    parameters = M * N * K + M * K + N * K + K
    assert f'{4 * parameters:,} of parameters, {4 * 7 * (N + M + K):,} in and out' in text
    assert 'x       the input [7, 5]\n    z       the context [7, 3]' in text


def test_a_block_diagonal_W_is_recognised():
    W = np.zeros((2, 6, 4))
    for i in range(2):
        W[:, 3 * i : 3 * i + 3, 2 * i : 2 * i + 2] = 1 + np.arange(12).reshape(2, 3, 2)
    assert form_of(W) == 'block-diagonal, 2 blocks'
    assert form_of(np.eye(3)[:, :, None]) == 'inner product'
    assert form_of(np.eye(3)[:, :, None] * np.eye(3)[None]) == 'pointwise product'
