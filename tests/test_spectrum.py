"""The analysis of W: against NumPy, and where the answer is known."""

import jax
import numpy as np
import pytest

import mi
from mi.unify import (
    as_mi,
    cluster_contexts,
    compare_contexts,
    compute_output_eigenvalues,
    compute_spectrum,
    compute_tensors,
    decompose_output,
)
from mi.unify.spectrum import compute_effective_rank, compute_stable_rank
from tests.motifs.checks import drawn, random

M, N, K = 3, 5, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize('rank', [1, 2, 5])
def test_the_ranks_of_r_equal_singular_values_are_r(rank):
    orthogonal, _ = np.linalg.qr(normal(7, 7))
    matrix = 3.7 * orthogonal[:, :rank] @ orthogonal[:rank]
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert compute_effective_rank(sigma) == pytest.approx(rank, abs=1e-10)
    assert compute_stable_rank(sigma) == pytest.approx(rank, abs=1e-10)


def test_the_ranks_of_unequal_singular_values():
    """Entropy of (3/4, 1/4) by hand, and (9 + 1) / 9."""
    entropy = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert compute_effective_rank([3.0, 1.0, 0.0]) == pytest.approx(np.exp(entropy))
    assert compute_stable_rank([3.0, 1.0, 0.0]) == pytest.approx(10 / 9)
    assert compute_effective_rank(np.zeros(4)) == compute_stable_rank(np.zeros(4)) == 0


def test_the_unfoldings_have_the_singular_values_of_numpy():
    W = normal(M, N, K)
    z, x, y = compute_spectrum(W)
    matrices = {
        'z': W.reshape(M, N * K),
        'x': W.transpose(1, 0, 2).reshape(N, M * K),
        'y': W.transpose(2, 0, 1).reshape(K, M * N),
    }
    for unfolding in (z, x, y):
        expected = np.linalg.svd(matrices[unfolding.stream])[1]
        np.testing.assert_allclose(unfolding.singular_values, expected, rtol=1e-12)
        assert unfolding.full_rank == min(matrices[unfolding.stream].shape)
        assert 1 <= unfolding.stable_rank <= unfolding.effective_rank <= unfolding.full_rank


def test_a_low_rank_form_has_its_rank_along_every_axis():
    P, Q, O = normal(6, 2), normal(7, 2, seed=1), normal(2, 8, seed=2)  # noqa: E741
    for unfolding in compute_spectrum(np.einsum('mr,nr,rk->mnk', P, Q, O)):
        assert (unfolding.singular_values[2:] < 1e-12 * unfolding.singular_values[0]).all()
        assert 1 < unfolding.effective_rank < 2 + 1e-6


def test_eigenvalues_of_two_streams_are_plus_and_minus_half_the_singular_values():
    W = normal(M, N, K)
    for output in range(K):
        values, vectors = decompose_output(W, output)
        sigma = np.linalg.svd(W[:, :, output], compute_uv=False)
        expected = np.sort([*sigma / 2, *-sigma / 2, *np.zeros(N - M)])
        np.testing.assert_allclose(np.sort(values), expected, atol=1e-12)
        assert (np.diff(np.abs(values)) < 1e-12).all()
        # The form of the stacked stream is the bilinear form.
        z, x = normal(M, seed=3), normal(N, seed=4)
        coordinates = vectors.T @ np.concatenate([z, x])
        assert (values * coordinates**2).sum() == pytest.approx(z @ W[:, :, output] @ x)
        all_values = compute_output_eigenvalues(W)[output]
        np.testing.assert_allclose(all_values, values[: 2 * M] * np.sign(values[: 2 * M]) *
                                   np.sign(all_values), atol=1e-12)  # fmt: skip
        np.testing.assert_allclose(np.sort(all_values), np.sort([*sigma / 2, *-sigma / 2]))


def test_eigenvalues_of_one_stream_are_those_of_the_symmetric_part():
    W = normal(N, N, K)
    direction = normal(K, seed=1)
    matrix = W @ direction
    values, vectors = decompose_output(W, direction, is_same_stream=True)
    expected, _ = np.linalg.eigh((matrix + matrix.T) / 2)
    np.testing.assert_allclose(np.sort(values), expected, atol=1e-12)
    x = normal(N, seed=2)
    assert (values * (vectors.T @ x) ** 2).sum() == pytest.approx(x @ matrix @ x)
    one_output = compute_output_eigenvalues(W, is_same_stream=True)[2]
    np.testing.assert_allclose(
        one_output, decompose_output(W, 2, is_same_stream=True).values, atol=1e-12
    )


def test_a_product_of_two_maps_of_one_stream_has_two_eigenvalues():
    """The bilinear layer (g · x)(a · x): (g · a ± |g| |a|) / 2, and zeros."""
    g, a = normal(N), normal(N, seed=1)
    values, _ = decompose_output(np.outer(g, a)[:, :, None], 0, is_same_stream=True)
    length = np.linalg.norm(g) * np.linalg.norm(a)
    expected = sorted([(g @ a - length) / 2, (g @ a + length) / 2], key=abs, reverse=True)
    np.testing.assert_allclose(values, [*expected, *np.zeros(N - 2)], atol=1e-12)


def test_angles_between_known_contexts():
    """W′ of the contexts: orthogonal, opposite, equal up to scale, and 45° apart."""
    W = np.zeros((2, N, K))
    W[0, 0, 0], W[1, 1, 1] = 2.0, 3.0
    contexts = np.array([[1, 0], [0, 1], [-5, 0], [3, 2], [0, 0]])
    norms, cosines, angles = compare_contexts(W, contexts)
    np.testing.assert_allclose(norms, [2, 3, 10, np.sqrt(72), 0], atol=1e-12)
    np.testing.assert_allclose(angles[0], [0, 90, 180, 45, 90], atol=1e-5)
    assert cosines[4].tolist() == [0, 0, 0, 0, 1]
    # A shared V pulls all contexts together.
    V = np.zeros((N, K))
    V[2, 2] = 2.0
    shared = compare_contexts(W, [0, 1], V)
    np.testing.assert_allclose(shared.norms, [np.sqrt(8), np.sqrt(13)])
    assert shared.cosines[0, 1] == pytest.approx(4 / np.sqrt(8 * 13))


def test_contexts_are_compared_as_their_generated_weights():
    W, V, z = normal(M, N, K), normal(N, K, seed=1), normal(6, M, seed=2)
    weights = (np.einsum('cm,mnk->cnk', z, W) + V).reshape(6, -1)
    norms, cosines, _ = compare_contexts(W, z, V)
    np.testing.assert_allclose(norms, np.linalg.norm(weights, axis=1))
    units = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, units @ units.T, atol=1e-12)
    ids = compare_contexts(W, np.array([2, 0]))
    np.testing.assert_allclose(ids.norms, np.linalg.norm(W[[2, 0]].reshape(2, -1), axis=1))


def test_clusters_put_similar_contexts_side_by_side():
    direction, other = normal(M), normal(M, seed=1)
    contexts = np.stack([direction, other, direction + 0.01, other - 0.01, direction - 0.02])
    _, cosines, _ = compare_contexts(normal(M, N, K), contexts)
    linkage, order = cluster_contexts(cosines)
    groups = [int(context in (1, 3)) for context in order]
    assert linkage.shape == (4, 4) and groups in ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])


FORMS = {
    'full': mi.MultiplicativeInteraction(K),
    'no V': mi.MultiplicativeInteraction(K, use_V=False, use_b=False),
    'low rank': mi.LowRankMultiplicativeInteraction(K, rank=2),
    'Tucker': mi.TuckerMultiplicativeInteraction(K, rank=2),
    'block': mi.BlockMultiplicativeInteraction(K, blocks=2),
    'truncated block': mi.BlockMultiplicativeInteraction(K, blocks=3),
    'diagonal': mi.DiagonalMultiplicativeInteraction(),
    'scalar': mi.ScalarMultiplicativeInteraction(),
    'heads': mi.MultiHead(K),
}


@pytest.mark.parametrize('form', FORMS)
def test_tensors_from_variables_are_those_of_as_mi(form):
    module = FORMS[form]
    x, z = random(0, 2, N), jax.nn.one_hot(np.array([0, 2]), M)
    variables = drawn(module, x, z)
    tensors = compute_tensors(variables)
    expected = jax.jit(lambda v: tuple(as_mi(module, v, x, z)))(variables)
    for tensor, other in zip(tensors, expected, strict=True):
        if tensor is None:
            assert not np.any(other)
        else:
            np.testing.assert_allclose(tensor, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: compute_spectrum(np.ones((2, 3))),
            r'W \(2, 3\): expected three axes, \[m, n, k\]',
        ),
        (lambda: compute_spectrum(np.full((1, 1, 1), np.nan)), 'expected finite entries'),
        (lambda: decompose_output(normal(M, N, K), K), r'output = 4: expected an index below k'),
        (lambda: decompose_output(normal(M, N, K), [1.0]), r'or a direction \[4\]'),
        (
            lambda: decompose_output(normal(M, N, K), 0, is_same_stream=True),
            r'expected m = n, because x and z are the same',
        ),
        (lambda: compare_contexts(normal(M, N, K), [3]), r'expected ids in \[0, 3\)'),
        (lambda: compare_contexts(normal(M, N, K), normal(2, 2)), r'expected \[C, 3\]'),
        (lambda: compare_contexts(normal(M, N, K), [0], normal(2, 2)), r'V \(2, 2\): expected'),
        (lambda: cluster_contexts(np.ones((1, 1))), 'at least two contexts'),
        (lambda: compute_tensors({'params': {'kernel': normal(2, 2)}}), 'Try mi.as_mi'),
        (lambda: compute_tensors({'params': {'form': {'W': 1}}}), 'a module from mi.layers'),
    ],
)
def test_what_cannot_be_analyzed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
