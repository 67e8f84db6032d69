"""Compression of W: what is of a form is recovered, and what is not has the smallest error."""

import sys
import types

import jax
import numpy as np
import pytest
from scipy import optimize

import mi
from mi.unify import compute_tensors
from tests import prng

M, N, K = 4, 7, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make_variables(W, seed=10):
    m, n, k = W.shape
    U, V, b = normal(m, k, seed=seed), normal(n, k, seed=seed + 1), normal(k, seed=seed + 2)
    params = {'W': W, 'U': U, 'V': V, 'b': b}
    return {'params': {name: array.astype(np.float32) for name, array in params.items()}}


def make_cp(rank, seed=0):
    factors = normal(M, rank, seed=seed), normal(N, rank, seed=seed + 1), normal(K, rank, seed=2)
    return np.einsum('mr,nr,kr->mnk', *factors)


def make_tucker(rank, seed=0):
    factors = [normal(size, rank, seed=seed + axis) for axis, size in enumerate((M, N, K))]
    return np.einsum('abc,ma,nb,kc->mnk', normal(rank, rank, rank, seed=seed + 3), *factors)


def make_blocks(blocks, n=N, k=K):
    rows, columns = -(-n // blocks), -(-k // blocks)
    mask = np.kron(np.eye(blocks), np.ones((rows, columns)))[:n, :k]
    return normal(M, n, k) * mask


def is_exact(compressed, variables, x, z):
    """The outputs of the returned module are those of the full form, to f32."""
    full = mi.MultiplicativeInteraction(K, contexts=M)
    expected = full.apply(variables, x, z)
    got = compressed.module.apply(compressed.variables, x, z)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
    assert compressed.error < 1e-5


@pytest.mark.parametrize('rank', [1, 2, 3, 5])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_known_cp_rank_is_recovered(rank, seed):
    pytest.importorskip('tensorly')
    variables = make_variables(make_cp(rank, seed))
    compressed = mi.compress(variables, form='cp', rank=rank)
    assert isinstance(compressed.module, mi.LowRankMultiplicativeInteraction)
    W = compute_tensors(compressed.variables).W
    expected = variables['params']['W']
    assert np.linalg.norm(W - expected) < 1e-5 * np.linalg.norm(expected)
    is_exact(compressed, variables, normal(9, N), normal(9, M))
    lengths = [np.linalg.norm(compressed.variables['params'][name], axis=0) for name in 'PQ']
    np.testing.assert_allclose(*lengths, rtol=1e-4)


@pytest.mark.parametrize('rank', [1, 2, 4, 5, 8])
def test_a_known_tucker_rank_is_recovered(rank):
    """Ranks of 5 and 8 are more than some axes have."""
    pytest.importorskip('tensorly')
    variables = make_variables(make_tucker(rank))
    compressed = mi.compress(variables, form='tucker', rank=rank)
    assert compressed.variables['params']['G'].shape == (rank, rank, rank)
    is_exact(compressed, variables, normal(9, N), normal(9, M))


@pytest.mark.parametrize('blocks', [1, 2, 3, 4])
def test_known_blocks_are_recovered(blocks):
    """Blocks of 2, 3 and 4 divide n = 7 with a rest."""
    variables = make_variables(make_blocks(blocks))
    compressed = mi.compress(variables, form='block', blocks=blocks)
    assert isinstance(compressed.module, mi.BlockMultiplicativeInteraction)
    is_exact(compressed, variables, normal(9, N), normal(9, M))


def test_a_full_cp_rank_needs_no_decomposition(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorly', None)
    variables = make_variables(normal(M, N, K))
    for rank in (M * K, M * K + 3):
        compressed = mi.compress(variables, rank=rank)
        is_exact(compressed, variables, normal(9, N), normal(9, M))
    with pytest.raises(ImportError, match=r'TensorLy is not installed\. Try pip install'):
        mi.compress(variables, rank=M * K - 1)


def test_rank_one_of_a_matrix_is_its_best_one():
    """For m = 1, W is a matrix: Eckart & Young."""
    pytest.importorskip('tensorly')
    W = normal(1, N, K)
    sigma = np.linalg.svd(W[0], compute_uv=False)
    for rank in (1, 3):
        compressed = mi.compress({'params': {'W': W.astype(np.float32)}}, rank=rank)
        expected = np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum())
        assert compressed.error == pytest.approx(expected, rel=1e-4)


def test_the_error_of_blocks_is_what_they_leave_out():
    W = normal(M, N, K)
    compressed = mi.compress(make_variables(W), form='block', blocks=2)
    left_out = W * (make_blocks(2) == 0)
    assert compressed.error == pytest.approx(np.linalg.norm(left_out) / np.linalg.norm(W), rel=1e-5)


@pytest.mark.parametrize('ids', [False, True])
def test_with_inputs_the_blocks_are_the_least_squares_fit(ids):
    """The reference is a linear regression of each block of outputs on its monomials."""
    variables, blocks = make_variables(normal(M, N, K)), 2
    x = normal(300, N) @ normal(N, N, seed=1)
    z = np.random.default_rng(0).integers(M, size=300) if ids else normal(300, M, seed=2)
    compressed = mi.compress(variables, form='block', blocks=blocks, inputs=(x, z))
    plain = mi.compress(variables, form='block', blocks=blocks)

    dense = np.eye(M)[z] if ids else z
    target = compute_tensors(variables).apply(x, z)
    residuals = []
    for rows, columns in ((slice(0, 4), slice(0, 3)), (slice(4, 7), slice(3, 6))):
        products = (dense[:, :, None] * x[:, None, rows]).reshape(300, -1)
        design = np.concatenate([products, dense, x, np.ones((300, 1))], axis=1)
        weights = np.linalg.lstsq(design, target[:, columns])[0]
        residuals.append(design @ weights - target[:, columns])
    smallest = np.linalg.norm(np.concatenate(residuals, axis=1)) / np.linalg.norm(target)
    assert compressed.error == pytest.approx(smallest, rel=1e-3)

    output = plain.module.apply(plain.variables, x, z)
    assert np.linalg.norm(output - target) > 1.2 * smallest * np.linalg.norm(target)


@pytest.mark.parametrize('form', ['cp', 'tucker'])
def test_with_inputs_the_error_of_the_outputs_falls(form):
    """Inputs in two dimensions of x: there a low rank is exact, which that of W is not."""
    pytest.importorskip('tensorly')
    variables = make_variables(normal(M, N, K))
    subspace = normal(N, 2, seed=4)
    x, z = normal(200, 2, seed=5) @ subspace.T, normal(200, M, seed=6)
    target = compute_tensors(variables).apply(x, z)
    plain = mi.compress(variables, form=form, rank=4)
    plain_error = np.linalg.norm(plain.module.apply(plain.variables, x, z) - target)
    compressed = mi.compress(variables, form=form, rank=4, inputs=(x, z))
    output = compressed.module.apply(compressed.variables, x, z)
    error = np.linalg.norm(output - target) / np.linalg.norm(target)
    assert compressed.error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert error < 0.5 * plain_error / np.linalg.norm(target)


def test_calibration_never_returns_worse_parameters(monkeypatch):
    """If the optimizer ends at a worse point, the parameters stay."""

    def minimize(function, start, **options):
        return types.SimpleNamespace(x=start + 1, fun=function(start + 1)[0])

    monkeypatch.setattr(optimize, 'minimize', minimize)
    variables = make_variables(normal(M, N, K))
    inputs = normal(50, N), normal(50, M)
    compressed = mi.compress(variables, form='block', blocks=2, inputs=inputs)
    plain = mi.compress(variables, form='block', blocks=2)
    jax.tree.map(np.testing.assert_array_equal, compressed.variables, plain.variables)


def test_terms_that_the_layer_lacks_stay_absent():
    z, x = np.array([0, 3, 1]), normal(3, N)
    module = mi.MultiHead(K, contexts=M)
    variables = module.init(prng.key(0), x, z)
    compressed = mi.compress(variables, rank=M * K)
    assert sorted(compressed.variables['params']) == ['O', 'P', 'Q', 'U']
    expected = module.apply(variables, x, z)
    got = compressed.module.apply(compressed.variables, x, z)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    initial = jax.eval_shape(compressed.module.init, jax.random.key(0), x, z)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), initial)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), compressed.variables)


def test_a_low_rank_form_is_compressed_further():
    pytest.importorskip('tensorly')
    x, z = normal(3, N), normal(3, M)
    module = mi.LowRankMultiplicativeInteraction(K, rank=3)
    variables = module.init(prng.key(0), x, z)
    compressed = mi.compress(variables, form='tucker', rank=3)
    got = compressed.module.apply(compressed.variables, x, z)
    np.testing.assert_allclose(got, module.apply(variables, x, z), atol=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'form': 'cp', 'rank': 2, 'blocks': 2}, r"blocks = 2: expected None for form = 'cp'"),
        ({'form': 'block', 'rank': 2, 'blocks': 2}, r"rank = 2: expected None for form = 'block'"),
        ({'form': 'pc', 'rank': 2}, "form = 'pc' is unknown; known: block, cp, tucker"),
        ({'form': 'cp'}, r"rank = None: expected at least 1 for form = 'cp'"),
        ({'form': 'block', 'rank': 2}, r'blocks = None: expected at least 1'),
        ({'form': 'tucker', 'rank': 0}, r'rank = 0: expected at least 1'),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mi.compress(make_variables(normal(M, N, K)), **arguments)


def test_forms_without_a_cheaper_one_are_refused():
    x, z = normal(2, N), normal(2, M)
    variables = mi.DiagonalMultiplicativeInteraction().init(prng.key(0), x, z)
    with pytest.raises(ValueError, match=r'because a diagonal or scalar form'):
        mi.compress(variables, rank=2)
    pytest.importorskip('tensorly')
    with pytest.raises(ValueError, match=r'W is zero: expected at least one nonzero entry'):
        mi.compress(make_variables(np.zeros((M, N, K))), rank=2)
