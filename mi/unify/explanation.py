"""A text report on a module: its products, their forms, and its cost."""

import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import linen as nn

from mi import counting
from mi.precision import use_highest
from mi.unify.composition import Product, Variables
from mi.unify.registry import as_mi

if TYPE_CHECKING:
    import chex


@use_highest
def explain(module: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> str:
    """Return a text report on the products of a module and its cost.

    For every product, the report lists the streams, the sizes m, n, k, the nonzero terms, the form
    of W, and the numerical ranks of its three unfoldings m × nk, n × mk and k × mn. It ends with
    the number of parameters, the FLOPs of the products in the module's call, and the bytes of the
    parameters, inputs and outputs.

    Args:
      module, variables, *args, **kwargs: as for `mi.unify.as_mi`.

    Raises:
      ValueError: as in `mi.unify.as_mi`, or if the parameters are traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((variables, args))):
        raise ValueError('explain requires concrete parameters. Try calling it outside of jax.jit')
    composition = as_mi(module, variables, *args, **kwargs)
    lines = [type(module).__name__ + (f': {composition.around}' if composition.around else '')]
    for product in composition.products:
        lines += ['', f'  {product.name}', *(f'    {line}' for line in _describe_product(product))]

    def call(variables: Variables, args: tuple[Any, ...]) -> 'chex.ArrayTree':
        return module.apply(variables, *args, **kwargs)

    flops = counting.flops(call, variables, args)
    output = jax.eval_shape(call, variables, args)
    num_bytes = _count_bytes(variables)
    lines += [
        '',
        f'  parameters  {counting.parameters(variables.get("params", {})):,}',
        f'  FLOPs       {flops:,} in products, for these inputs',
        f'  bytes       {num_bytes:,} of parameters, {_count_bytes((args, output)):,} in and out',
    ]
    return '\n'.join(lines)


def describe_form(W: np.ndarray) -> str:
    """Describe the form of W [m, n, k] by its nonzero entries and its ranks."""
    W = np.asarray(W)
    context_size, input_size, output_size = W.shape
    if not W.any():
        return 'zero: no interaction'
    is_nonzero = (W != 0).any(axis=0)  # [n, k]
    off_diagonal = ~np.eye(input_size, dtype=bool)
    if input_size == output_size and not is_nonzero[off_diagonal].any():
        diagonal = np.diagonal(W, axis1=1, axis2=2)
        if input_size > 1 and (diagonal == diagonal[:, :1]).all():
            return 'scalar'
        if context_size == input_size and not diagonal[off_diagonal].any():
            return 'pointwise product'
        return 'diagonal'
    if output_size == 1 and context_size == input_size and not W[off_diagonal].any():
        return 'inner product'
    if is_nonzero.mean() <= 0.5:
        num_blocks = _count_blocks(is_nonzero)
        return f'block-diagonal, {num_blocks} blocks' if num_blocks else 'sparse'
    return 'low rank' if any(rank < full_rank for rank, full_rank in _compute_ranks(W)) else 'full'


def _describe_product(product: Product) -> list[str]:
    W = np.asarray(product.W)
    tensors = {'U': product.U, 'V': product.V, 'b': product.b}
    terms = [
        letter
        for letter, tensor in tensors.items()
        if tensor is not None and np.any(np.asarray(tensor))
    ]
    ranks = ', '.join(f'{rank} of {full_rank}' for rank, full_rank in _compute_ranks(W))
    return [
        f'x       {product.x_is} {list(product.x.shape)}',
        f'z       {product.z_is} {list(product.z.shape)}',
        f'W       {list(W.shape)}, {describe_form(W)}; beside it {", ".join(terms) or "nothing"}',
        f'ranks   {ranks} (unfolded along z, x, y)',
    ]


def _compute_ranks(W: np.ndarray) -> list[tuple[int, int]]:
    """Return the rank of each unfolding, with the largest rank that its shape allows."""
    ranks = []
    for axis in range(3):
        unfolded = np.moveaxis(np.asarray(W, np.float64), axis, 0).reshape(W.shape[axis], -1)
        tolerance = 1e-5 * np.linalg.norm(unfolded, 2)  # W is f32
        ranks.append((int(np.linalg.matrix_rank(unfolded, tol=tolerance)), min(unfolded.shape)))
    return ranks


def _count_blocks(is_nonzero: np.ndarray) -> int:
    """Return the number of equal blocks if the mask [n, k] is block-diagonal, or 0 otherwise."""
    input_size, output_size = is_nonzero.shape
    for num_blocks in range(min(is_nonzero.shape), 1, -1):
        if input_size % num_blocks == 0 and output_size % num_blocks == 0:
            block_shape = input_size // num_blocks, output_size // num_blocks
            blocks = np.kron(np.eye(num_blocks, dtype=bool), np.ones(block_shape, bool))
            if not is_nonzero[~blocks].any():
                return num_blocks
    return 0


def _count_bytes(tree: 'chex.ArrayTree') -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, 'dtype')
    )
