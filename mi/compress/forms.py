"""Approximation of W [m, n, k] by a cheaper form: CP, Tucker or block-diagonal."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mi.compress.calibration import calibrate
from mi.config import suggest, suggest_install
from mi.layers import (
    BlockMultiplicativeInteraction,
    LowRankMultiplicativeInteraction,
    MultiplicativeInteraction,
    TuckerMultiplicativeInteraction,
)
from mi.unify.composition import Variables
from mi.unify.tensors import Tensors, compute_tensors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Form = Literal['cp', 'tucker', 'block']
Factors = dict[str, np.ndarray]  # the parameters that stand for W in a form, by name

MAX_SWEEPS = 1000  # of alternating least squares
TOLERANCE = 1e-10  # change of the relative error at which a decomposition ends


class Compressed(NamedTuple):
    """A compressed layer.

    Attributes:
      module: the compressed layer, an instance of a class in `FORMS`. It takes contexts [..., m] or
        integer ids [...].
      variables: the variables of the module; module.apply(variables, x, z) is the compressed
        output.
      error: relative error ‖Ŵ − W‖ / ‖W‖, or that of the outputs if there are calibration inputs.
    """

    module: MultiplicativeInteraction
    variables: dict[str, Any]
    error: float


def compress(
    variables: Variables,
    *,
    form: Form = 'cp',
    rank: int | None = None,
    blocks: int | None = None,
    inputs: 'tuple[ArrayLike, ArrayLike] | None' = None,
) -> Compressed:
    """Approximate an MI layer by a layer of a cheaper form.

        cp      W ≈ Σ_r p_r ⊗ q_r ⊗ o_r, by alternating least squares
        tucker  W ≈ Σ_abc G_abc p_a ⊗ q_b ⊗ o_c, by higher-order orthogonal iteration
        block   W ≈ its g blocks on the diagonal over (n, k), which is the nearest W of this form

    The first two are decompositions by TensorLy (Kossaifi et al., JMLR 2019), which find local
    optima. U, V and b are unchanged. If `inputs` are given, L-BFGS then fits all parameters to
    minimize the mean squared error of the outputs at these inputs, starting from the approximation
    of W.

    Args:
      variables: variables of the full, low-rank, Tucker or block-diagonal form, or of `MultiHead`.
      form: 'cp', 'tucker' or 'block'.
      rank: r, the rank of 'cp' and 'tucker'. 'cp' is exact for r ≥ min(mn, mk, nk).
      blocks: g, the number of blocks of 'block'.
      inputs: calibration inputs x [..., n] and z [..., m], or integer ids z [...]. If None, only W
        is approximated.

    Raises:
      ValueError: if the form is unknown, its size is missing or that of another form is given, or
        `variables` have no W [m, n, k].
      ImportError: if TensorLy is not installed, for 'cp' and 'tucker'.
    """
    # Check the form and its size, and compute W.
    if form not in FORMS:
        raise ValueError(f'form = {form!r} is unknown; {suggest(form, FORMS)}')
    size_name, size = ('blocks', blocks) if form == 'block' else ('rank', rank)
    if size is None or size < 1:
        raise ValueError(f'{size_name} = {size}: expected at least 1 for form = {form!r}')
    unused_name, unused = ('rank', rank) if form == 'block' else ('blocks', blocks)
    if unused is not None:
        raise ValueError(f'{unused_name} = {unused}: expected None for form = {form!r}')
    tensors = compute_tensors(variables)
    if np.ndim(variables['params'].get('W', 0.0)) == 2:
        raise ValueError(
            'variables: expected those of a layer with W [m, n, k], because a diagonal or scalar '
            'form is already smaller than any compressed form'
        )

    # Compress, in the dtype of the given parameters.
    dtype = np.result_type(*(leaf.dtype for leaf in variables['params'].values()))
    module = make_module(form, size, tensors)
    factors = _decompose(tensors.W, form, size)
    term_arrays = {name: array for name, array in tensors._asdict().items() if array is not None}
    params = {name: term_arrays[name] for name in term_arrays.keys() - {'W'}} | factors
    if inputs is not None:
        params = calibrate(module, params, tensors, inputs)
    params = {name: params[name].astype(dtype) for name in sorted(params)}
    error = _measure_error(params, tensors, inputs)
    return Compressed(module, {'params': params}, error)


def make_module(form: Form, size: int, tensors: Tensors) -> MultiplicativeInteraction:
    """Return a module of this form that has the same terms as the tensors."""
    context_size, _, output_size = tensors.W.shape
    sizes: dict[str, Any] = {'blocks': size} if form == 'block' else {'rank': size}
    return FORMS[form](
        output_size,
        contexts=context_size,
        use_U=tensors.U is not None,
        use_V=tensors.V is not None,
        use_b=tensors.b is not None,
        **sizes,
    )


def _decompose(W: np.ndarray, form: Form, size: int) -> Factors:
    if form == 'block':
        return {'W': _get_blocks(W, size)}
    return _decompose_cp(W, size) if form == 'cp' else _decompose_tucker(W, size)


def _get_blocks(W: np.ndarray, num_blocks: int) -> np.ndarray:
    """Return the diagonal blocks [g, m, ⌈n/g⌉, ⌈k/g⌉], padding the last one with zeros."""
    _, input_size, output_size = W.shape
    rows, columns = -(-input_size // num_blocks), -(-output_size // num_blocks)
    padding = (0, 0), (0, num_blocks * rows - input_size), (0, num_blocks * columns - output_size)
    padded = np.pad(W, padding)
    return np.stack([
        padded[:, g * rows : (g + 1) * rows, g * columns : (g + 1) * columns]
        for g in range(num_blocks)
    ])  # fmt: skip


def _decompose_cp(W: np.ndarray, rank: int) -> Factors:
    """Return P [m, r], Q [n, r] and O [r, k], where each component's factors have equal norms."""
    factors = _expand_exactly(W, rank)
    if factors is None:
        _, factors = _call_tensorly(
            'parafac',
            W,
            rank,
            init='svd',
            n_iter_max=MAX_SWEEPS,
            tol=TOLERANCE,
            linesearch=True,
            random_state=0,
        )

    # Spread the length of each component over its factors, so that none is tiny in f32.
    lengths = [np.linalg.norm(factor, axis=0) for factor in factors]
    mean_length = np.prod(lengths, axis=0) ** (1 / 3)
    P, Q, O = (  # noqa: E741
        np.divide(factor * mean_length, length, out=np.zeros_like(factor), where=length > 0)
        for factor, length in zip(factors, lengths, strict=True)
    )
    return {'P': P, 'Q': Q, 'O': O.T}


def _expand_exactly(W: np.ndarray, rank: int) -> list[np.ndarray] | None:
    """Return exact factors [m, r], [n, r], [k, r] of W, or None if the rank is too low.

    There is one component for each pair of indices along the two smaller axes, and its third factor
    is the vector of W at these indices. Further components are zero.
    """
    longest = int(np.argmax(W.shape))
    shorter = [axis for axis in range(3) if axis != longest]
    first_size, second_size = (W.shape[axis] for axis in shorter)
    num_components = first_size * second_size
    if rank < num_components:
        return None
    factors = [np.zeros((size, rank)) for size in W.shape]
    first, second = np.divmod(np.arange(num_components), second_size)
    factors[shorter[0]][first, np.arange(num_components)] = 1
    factors[shorter[1]][second, np.arange(num_components)] = 1
    factors[longest][:, :num_components] = np.moveaxis(W, longest, 0).reshape(-1, num_components)
    return factors


def _decompose_tucker(W: np.ndarray, rank: int) -> Factors:
    """Return P [m, r], Q [n, r], O [r, k] and the core G [r, r, r].

    Along an axis shorter than r, the core is padded with zeros and the factor with random columns.
    If both were zero, neither would get a gradient.
    """
    ranks = [min(rank, size) for size in W.shape]
    core, factors = _call_tensorly(
        'tucker', W, ranks, init='svd', n_iter_max=MAX_SWEEPS, tol=TOLERANCE, random_state=0
    )
    rng = np.random.default_rng(0)
    padded = []
    for factor in factors:
        extra = rng.normal(size=(len(factor), rank - factor.shape[1])) / np.sqrt(len(factor))
        padded.append(np.concatenate([factor, extra], axis=1))
    G = np.pad(core, [(0, rank - size) for size in core.shape])
    P, Q, O = padded  # noqa: E741
    return {'P': P, 'Q': Q, 'G': G, 'O': O.T}


def _call_tensorly(function_name: str, W: np.ndarray, rank: object, **options: object) -> Any:
    """Decompose W with a function of TensorLy, on its NumPy backend."""
    try:
        import tensorly
        import tensorly.decomposition
    except ImportError as error:
        raise ImportError(
            f'TensorLy is not installed. Try {suggest_install("compress")}'
        ) from error
    if not W.any():  # its stopping rule divides by ‖W‖
        raise ValueError('W is zero: expected at least one nonzero entry')
    decompose = getattr(tensorly.decomposition, function_name)
    with warnings.catch_warnings(), tensorly.backend_context('numpy', local_threadsafe=True):
        # An axis shorter than the rank; TensorLy fills the missing columns at random.
        warnings.filterwarnings('ignore', message='Trying to compute SVD with n_eigenvecs')
        return decompose(W, rank, **options)


def _measure_error(
    params: Mapping[str, np.ndarray],
    tensors: Tensors,
    inputs: 'tuple[ArrayLike, ArrayLike] | None',
) -> float:
    """Return the relative error of W, or of the outputs if there are inputs."""
    compressed = compute_tensors({'params': params})
    if inputs is None:
        return _compare(compressed.W, tensors.W)
    return _compare(compressed.apply(*inputs), tensors.apply(*inputs))


def _compare(approximation: np.ndarray, target: np.ndarray) -> float:
    scale = np.linalg.norm(target)
    return float(np.linalg.norm(approximation - target) / (scale or 1.0))


FORMS: dict[str, type[MultiplicativeInteraction]] = {
    'cp': LowRankMultiplicativeInteraction,
    'tucker': TuckerMultiplicativeInteraction,
    'block': BlockMultiplicativeInteraction,
}
"""Form → the module of `mi.layers` that has it."""
