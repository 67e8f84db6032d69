"""Counts of parameters and FLOPs from shapes alone, and the model size that meets a target.

Nothing is allocated or compiled: shapes come from `jax.eval_shape`, FLOPs from the jaxpr. The
command `python -m mi.estimate --config=FILE` prints the cost of a run.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.extend import core


def parameters(tree: Any) -> int:
    """Count the entries of a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class Product(NamedTuple):
    """A matrix product or convolution in a function.

    Attributes:
      flops: 2·a·b·c for [a, b] and [b, c].
      bytes: bytes of both factors and of the result.
      times: number of executions.
    """

    flops: int
    bytes: int
    times: int


def products(function: Callable[..., Any], *args: Any) -> list[Product]:
    """Return the products and convolutions of function(*args); args may be shapes only.

    The body of a loop counts once per iteration; of a branch, the side with more FLOPs counts.
    """
    return _find_products(jax.make_jaxpr(function)(*args).jaxpr, 1)


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Count the floating-point operations of the products in function(*args).

    A product of [a, b] and [b, c] counts 2·a·b·c. Additions, activations and look-ups count
    nothing. The body of a loop counts once per iteration, whereas `compiled.cost_analysis()` counts
    it once; of a branch, the more expensive side counts. The args may be shapes only.
    """
    return _sum_flops(products(function, *args))


def _sum_flops(matmuls: list[Product]) -> int:
    return sum(product.flops * product.times for product in matmuls)


def _find_products(jaxpr: core.Jaxpr, times: int) -> list[Product]:
    """Return the products of a jaxpr that is executed `times` times."""
    matmuls: list[Product] = []
    for eqn in jaxpr.eqns:
        shapes: list[tuple[int, ...]] = [getattr(v.aval, 'shape', ()) for v in eqn.invars]
        out_size = math.prod(getattr(eqn.outvars[0].aval, 'shape', ())) if eqn.outvars else 0
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            count = 2 * math.prod(shapes[0][axis] for axis in contracted) * out_size
            matmuls.append(Product(count, _count_bytes(eqn), times))
        elif eqn.primitive.name == 'conv_general_dilated':
            out_features = shapes[1][eqn.params['dimension_numbers'].rhs_spec[0]]
            count = 2 * math.prod(shapes[1]) // out_features * out_size
            matmuls.append(Product(count, _count_bytes(eqn), times))
        elif eqn.primitive.name == 'cond':
            sides = [_find_products(branch.jaxpr, times) for branch in eqn.params['branches']]
            costliest_branch: list[Product] = max(sides, key=_sum_flops)
            matmuls += costliest_branch
        else:
            length = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            for inner in _inner_jaxprs(eqn):
                matmuls += _find_products(inner, times * length)
    return matmuls


def _count_bytes(eqn: core.JaxprEqn) -> int:
    arrays: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def _inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """Return the jaxprs that an equation calls: the body of a scan, the function of a jit."""
    jaxprs = []
    for value in eqn.params.values():
        if isinstance(value, core.ClosedJaxpr):
            jaxprs.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            jaxprs.append(value)
    return jaxprs


def modules(
    model: nn.Module, pattern: str, variables: Any, *args: Any
) -> Iterator[tuple[nn.Module, Any, list[jax.ShapeDtypeStruct]]]:
    """Yield the submodules of a Linen model whose names match a pattern.

    Each item is the unbound module, its variables, and the shapes of its inputs in model(*args);
    variables and args may be shapes only.
    """
    calls: dict[tuple[str, ...], tuple[nn.Module, list[jax.ShapeDtypeStruct]]] = {}

    # Record the inputs of the matching submodules during an abstract call of the model.
    def record(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        module = context.module
        is_match = module.name and re.fullmatch(pattern, module.name)
        if is_match and context.method_name == '__call__':
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
            calls[module.path] = module.clone(parent=None), shapes
        return call(*inputs, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(model.apply, variables, *args)
    # Select the parameters of each.
    for path, (module, shapes) in calls.items():
        params = functools.reduce(lambda tree, key: tree.get(key, {}), path, variables['params'])
        yield module, {'params': params}, shapes


def nearest_size(cost: Callable[[int], int], target: int, low: int = 1) -> int:
    """Return the size s ≥ low whose cost is nearest to the target; cost must not fall with s.

    Raises:
      ValueError: if even the smallest size costs over a tenth more than the target.
    """
    smallest = cost(low)
    if smallest > 1.1 * target:
        raise ValueError(f'the smallest size, {low}, costs {smallest:,}, the target is {target:,}')
    # Double the size until it reaches the target, then bisect.
    high = low + 1
    while cost(high) < target:
        low, high = high, 2 * high
        if high > 2**24:
            raise ValueError(f'no size up to {low:,} reaches the target {target:,}')
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return min((low, high), key=lambda size: abs(cost(size) - target))
