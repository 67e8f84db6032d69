"""A motif in words: where its streams meet, in what form, and what it costs."""

import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mi import counting
from mi.precision import use_highest
from mi.unify.composition import Product, as_mi


@use_highest
def explain(module: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> str:
    """The products of a module and its costs, as text.

    For every product: the streams, the sizes m, n, k, the terms that are not zero, the form of W,
    and the ranks of its three unfoldings, m × nk, n × mk and k × mn, numerically. Then the
    parameters, the FLOPs of the products in the call as it is computed, and the bytes of the
    parameters and of the inputs and outputs.

    Args:
      module, variables, *args, **kwargs: as for `mi.unify.as_mi`.

    Raises:
      ValueError: as `mi.unify.as_mi`.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((variables, args))):
        raise ValueError('explain reads the numbers of the parameters: call it outside of jax.jit')
    composition = as_mi(module, variables, *args, **kwargs)
    lines = [type(module).__name__ + (f': {composition.around}' if composition.around else '')]
    for product in composition.products:
        lines += ['', f'  {product.name}', *(f'    {line}' for line in _product(product))]

    def call(variables: Any, args: Any) -> Any:
        return module.apply(variables, *args, **kwargs)

    flops = counting.flops(call, variables, args)
    output = jax.eval_shape(call, variables, args)
    lines += [
        '',
        f'  parameters  {counting.parameters(variables.get("params", {})):,}',
        f'  FLOPs       {flops:,} in products, for these inputs',
        f'  bytes       {_bytes(variables):,} of parameters, {_bytes((args, output)):,} in and out',
    ]
    return '\n'.join(lines)


def describe_form(W: np.ndarray) -> str:
    """The form of W [m, n, k], from where it is not zero and from its ranks."""
    W = np.asarray(W)
    m, n, k = W.shape
    if not W.any():
        return 'zero: no interaction'
    used = (W != 0).any(axis=0)  # [n, k]
    if n == k and not used[~np.eye(n, dtype=bool)].any():
        diagonal = W[:, np.arange(n), np.arange(n)]
        if n > 1 and (diagonal == diagonal[:, :1]).all():
            return 'scalar'
        if m == n and not diagonal[~np.eye(n, dtype=bool)].any():
            return 'pointwise product'
        return 'diagonal'
    if k == 1 and m == n and not W[~np.eye(n, dtype=bool)].any():
        return 'inner product'
    if used.mean() <= 0.5:
        return 'sparse' if not _blocks(used) else f'block-diagonal, {_blocks(used)} blocks'
    return 'low rank' if any(rank < full for rank, full in _ranks(W)) else 'full'


def _product(product: Product) -> list[str]:
    W = np.asarray(product.W)
    m, n, k = W.shape
    terms = [
        name
        for name, term in zip(('U', 'V', 'b'), (product.U, product.V, product.b), strict=True)
        if term is not None and np.any(np.asarray(term))
    ]
    ranks = ', '.join(f'{rank} of {full}' for rank, full in _ranks(W))
    return [
        f'x       {product.x_is} {list(product.x.shape)}',
        f'z       {product.z_is} {list(product.z.shape)}',
        f'W       [{m}, {n}, {k}], {describe_form(W)}; beside it {", ".join(terms) or "nothing"}',
        f'ranks   {ranks} (unfolded along z, x, y)',
    ]


def _ranks(W: np.ndarray) -> list[tuple[int, int]]:
    """The rank of each unfolding of W, and the most that its shape allows."""
    ranks = []
    for axis in range(3):
        unfolded = np.moveaxis(np.asarray(W, np.float64), axis, 0).reshape(W.shape[axis], -1)
        tolerance = 1e-5 * np.linalg.norm(unfolded, 2)  # W is f32
        ranks.append((int(np.linalg.matrix_rank(unfolded, tol=tolerance)), min(unfolded.shape)))
    return ranks


def _blocks(used: np.ndarray) -> int:
    """The number of blocks where [n, k] is block-diagonal as it stands, with equal blocks; or 0."""
    n, k = used.shape
    for blocks in range(min(n, k), 1, -1):
        if n % blocks == 0 and k % blocks == 0:
            mask = np.kron(np.eye(blocks, dtype=bool), np.ones((n // blocks, k // blocks), bool))
            if not used[~mask].any():
                return blocks
    return 0


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, 'dtype')
    )
