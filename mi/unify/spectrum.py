"""Spectral analysis of W [m, n, k]: ranks, eigenvectors of outputs, and similarity of contexts.

    W, U, V, b = mi.as_mi(module, variables, x, z)
    for unfolding in compute_spectrum(W):
        print(unfolding.stream, unfolding.effective_rank, 'of', unfolding.full_rank)

W can come from `mi.as_mi`, or from variables by `mi.unify.compute_tensors`. `python -m mi.inspect`
applies this analysis to a run. All computations are in NumPy in float64.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Stream = Literal['z', 'x', 'y']
STREAMS: tuple[Stream, ...] = ('z', 'x', 'y')


def compute_effective_rank(singular_values: 'ArrayLike') -> float:
    """Return exp(H(p)) with p = σ / Σσ and H(p) = −Σ p log p, the effective rank.

    It is r if r singular values are equal and the others are zero, and 0 for a matrix of zeros.
    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
    """
    sigma = np.asarray(singular_values, np.float64)
    sigma = sigma[sigma > 0]
    if not sigma.size:
        return 0.0
    p = sigma / sigma.sum()
    p = p[p > 0]  # a value so small that its share underflows
    return float(np.exp(-(p * np.log(p)).sum()))


def compute_stable_rank(singular_values: 'ArrayLike') -> float:
    """Return ‖A‖²_F / ‖A‖²₂ = Σσ² / max σ², the stable rank, or 0 for a matrix of zeros.

    Source: Rudelson & Vershynin, Sampling from large matrices, J. ACM 2007.
    """
    sigma = np.asarray(singular_values, np.float64)
    largest = max(sigma.tolist(), default=0.0)
    return float(((sigma / largest) ** 2).sum()) if largest > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Unfolding:
    """A matrix with one axis of W as its rows, and the two other axes as its columns.

    Attributes:
      stream: 'z' for m × nk, 'x' for n × mk, or 'y' for k × mn.
      singular_values: the singular values in descending order, [min(rows, columns)].
    """

    stream: Stream
    singular_values: np.ndarray

    @property
    def full_rank(self) -> int:
        """The largest rank that the shape allows."""
        return len(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """The effective rank, see `compute_effective_rank`."""
        return compute_effective_rank(self.singular_values)

    @property
    def stable_rank(self) -> float:
        """The stable rank, see `compute_stable_rank`."""
        return compute_stable_rank(self.singular_values)


def compute_spectrum(W: 'ArrayLike') -> tuple[Unfolding, Unfolding, Unfolding]:
    """Return the unfoldings of W [m, n, k] along z, x and y with their singular values.

    Raises:
      ValueError: if W does not have three axes, or an entry is not finite.
    """
    tensor = _check_tensor(W)
    z, x, y = (
        Unfolding(
            stream,
            np.linalg.svd(
                np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1), compute_uv=False
            ),
        )
        for axis, stream in enumerate(STREAMS)
    )
    return z, x, y


class Eigen(NamedTuple):
    """An eigendecomposition, with the eigenvalues of largest magnitude first.

    Attributes:
      values: the eigenvalues, [d].
      vectors: the eigenvectors, [d, d]. Column i belongs to value i.
    """

    values: np.ndarray
    vectors: np.ndarray


def decompose_output(
    W: 'ArrayLike', output: 'int | ArrayLike', *, is_same_stream: bool = False
) -> Eigen:
    """Return the eigenvalues and eigenvectors of an output's symmetrized slice.

    For an output direction u, the slice is A = Σ_c u_c W[:, :, c]. If x and z are the same stream,
    the quadratic form is xᵀSx with S = (A + Aᵀ) / 2, and d = n. If they are different streams, the
    form of the stacked stream s = [z; x] is zᵀAx = sᵀSs with S = ½ [[0, A], [Aᵀ, 0]], and
    d = m + n. The eigenvalues of this S are zeros and ±σ/2 for the singular values σ of A. The
    eigenvectors of ±σ/2 are [±p; q] / √2 for the left and right singular vectors p and q of A.
    Source: Pearce et al., Bilinear MLPs enable weight-based mechanistic interpretability, ICLR
    2025, who treat the case of a single stream.

    Args:
      W: the tensor, [m, n, k].
      output: index of an output, or a direction u [k] in the space of the outputs.
      is_same_stream: whether x and z are the same stream, which needs m = n.

    Raises:
      ValueError: if the output does not exist, or m ≠ n for a single stream.
    """
    tensor = _check_tensor(W)
    output_size = tensor.shape[2]
    direction = np.asarray(output, np.float64)
    if direction.ndim == 0:
        index = int(direction)
        if not 0 <= index < output_size:
            raise ValueError(f'output = {index}: expected an index below k = {output_size}')
        direction = np.eye(output_size)[index]
    if direction.shape != (output_size,):
        raise ValueError(
            f'output has shape {direction.shape}: expected an index, or a direction [{output_size}]'
        )
    symmetric = _symmetrize(tensor @ direction, is_same_stream)
    values, vectors = np.linalg.eigh(symmetric)
    order = np.argsort(-np.abs(values), kind='stable')
    return Eigen(values[order], vectors[:, order])


def compute_output_eigenvalues(W: 'ArrayLike', *, is_same_stream: bool = False) -> np.ndarray:
    """Return the eigenvalues of every output, as in `decompose_output`, without the eigenvectors.

    The result is [k, d], with d = n for a single stream. For two streams, d = 2 min(m, n), because
    the other eigenvalues are zero.
    """
    tensor = _check_tensor(W)
    slices = np.moveaxis(tensor, 2, 0)
    if is_same_stream:
        values = np.linalg.eigvalsh(_symmetrize(slices, True))
        order = np.argsort(-np.abs(values), axis=1, kind='stable')
        return np.take_along_axis(values, order, axis=1)
    halves = np.linalg.svd(slices, compute_uv=False) / 2  # [k, min(m, n)]
    return np.stack([halves, -halves], axis=2).reshape(len(slices), -1)


class ContextComparison(NamedTuple):
    """A comparison of the weights W′(z) = zᵀW + V that C contexts generate.

    Attributes:
      norms: ‖W′(z)‖_F of each context, [C].
      cosines: ⟨W′(z_a), W′(z_b)⟩ / (‖W′(z_a)‖ ‖W′(z_b)‖), [C, C]. They are 0 for a context whose W′
        is zero, except with itself.
      angles: the corresponding angles in degrees, [C, C].
    """

    norms: np.ndarray
    cosines: np.ndarray
    angles: np.ndarray


def compare_contexts(
    W: 'ArrayLike', contexts: 'ArrayLike', V: 'ArrayLike | None' = None
) -> ContextComparison:
    """Compare the weights W′(z) = zᵀW + V [n, k] that contexts generate.

    Args:
      W: the tensor, [m, n, k].
      contexts: z [C, m], or integer ids [C] of one-hot contexts, such as tasks.
      V: the shared weights, [n, k]. If None, zᵀW is compared, which only depends on the context.

    Raises:
      ValueError: if the shapes do not match, or an id is not in [0, m).
    """
    tensor = _check_tensor(W)
    context_size = len(tensor)
    z = _check_contexts(contexts, context_size)
    slices = tensor.reshape(context_size, -1)
    if V is not None:
        shared = np.asarray(V, np.float64)
        if shared.shape != tensor.shape[1:]:
            raise ValueError(f'V {shared.shape}: expected [n, k] = {tensor.shape[1:]}')
        slices = np.concatenate([slices, shared.reshape(1, -1)])
        z = np.concatenate([z, np.ones((len(z), 1))], axis=1)

    # The Gram matrix of W′ is that of the slices between the contexts: no [C, n, k] is needed.
    gram = z @ (slices @ slices.T) @ z.T
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    scale = np.where(norms > 0, norms, 1)
    cosines = np.clip(gram / np.outer(scale, scale), -1, 1)
    np.fill_diagonal(cosines, 1)
    return ContextComparison(norms, cosines, np.degrees(np.arccos(cosines)))


class Clusters(NamedTuple):
    """A hierarchical clustering of contexts.

    Attributes:
      linkage: the merges, [C − 1, 4], in the format of `scipy.cluster.hierarchy.linkage`.
      order: the contexts in the order of the leaves, [C], so that similar contexts are adjacent.
    """

    linkage: np.ndarray
    order: np.ndarray


def cluster_contexts(cosines: 'ArrayLike') -> Clusters:
    """Cluster contexts hierarchically, by average linkage with the distance 1 − cosine.

    Args:
      cosines: the cosines from `compare_contexts`, [C, C], with C ≥ 2.

    Raises:
      ValueError: if there are fewer than two contexts.
    """
    # SciPy takes 0.2 s to import, and layers do without it.
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    similarity = np.asarray(cosines, np.float64)
    if len(similarity) < 2:
        raise ValueError(f'cosines {similarity.shape}: expected [C, C] with at least two contexts')
    distances = np.maximum(1 - (similarity + similarity.T) / 2, 0)
    np.fill_diagonal(distances, 0)
    condensed = distance.squareform(distances, checks=False)
    linkage: Any = hierarchy.linkage(condensed, 'average', optimal_ordering=True)
    return Clusters(linkage, hierarchy.leaves_list(linkage))


def _check_tensor(W: 'ArrayLike') -> np.ndarray:
    tensor = np.asarray(W, np.float64)
    if tensor.ndim != 3:
        raise ValueError(f'W {tensor.shape}: expected three axes, [m, n, k]')
    if not np.isfinite(tensor).all():
        raise ValueError(f'W {tensor.shape}: expected finite entries')
    return tensor


def _check_contexts(contexts: 'ArrayLike', context_size: int) -> np.ndarray:
    """Convert vectors or ids to contexts [C, m] in float64."""
    z = np.asarray(contexts)
    if np.issubdtype(z.dtype, np.integer) and z.ndim == 1:
        if ((z < 0) | (z >= context_size)).any():
            raise ValueError(f'contexts = {z.tolist()}: expected ids in [0, {context_size})')
        return np.eye(context_size)[z]
    if z.ndim != 2 or z.shape[1] != context_size:
        raise ValueError(f'contexts {z.shape}: expected [C, {context_size}], or ids [C]')
    return z.astype(np.float64)


def _symmetrize(slices: np.ndarray, is_same_stream: bool) -> np.ndarray:
    """Return the symmetric matrices [..., d, d] of slices [..., m, n], as in `decompose_output`."""
    *leading, context_size, input_size = slices.shape
    transposed = np.swapaxes(slices, -1, -2)
    if is_same_stream:
        if context_size != input_size:
            raise ValueError(
                f'W [{context_size}, {input_size}, …]: expected m = n, because x and z are the '
                'same stream'
            )
        return (slices + transposed) / 2
    symmetric = np.zeros((*leading, context_size + input_size, context_size + input_size))
    symmetric[..., :context_size, context_size:] = slices / 2
    symmetric[..., context_size:, :context_size] = transposed / 2
    return symmetric
