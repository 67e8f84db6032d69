"""Parameter and FLOP counts from shapes alone, and a search for the size that meets a target.

Nothing is allocated or compiled: shapes come from `jax.eval_shape`, and FLOPs from the jaxpr. The
command `python -m mi.estimate --config=FILE` prints the cost of a run.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import linen as nn
from jax.extend import core

from mi.kernels.linear import target_platform

PRODUCTS_BY_ID = ('multiply_sorted_rows', 'sum_sorted_products')
"""Jitted functions of `mi.kernels.by_id`. Each multiplies every row of its inputs once."""

if TYPE_CHECKING:
    import chex


def parameters(tree: 'chex.ArrayTree') -> int:
    """Count the entries in a tree of arrays or `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class Product(NamedTuple):
    """A matrix product or convolution in a function.

    Attributes:
      flops: FLOPs of one execution, which are 2·a·b·c for factors [a, b] and [b, c].
      bytes: total size of the factors and the result, in bytes.
      times: number of executions.
    """

    flops: int
    bytes: int
    times: int


def products(function: Callable[..., object], *args: object) -> list[Product]:
    """Return the matrix products and convolutions that function(*args) computes.

    The body of a scan counts once per iteration, the body of a while loop once, and a conditional
    counts as its most expensive branch. `jax.lax.platform_dependent` counts as its branch for
    `target_platform()`. The kernel for W[ids] x counts as one product, because its loops have a
    dynamic length. The arguments can be arrays or shapes.
    """
    return _find_products(jax.make_jaxpr(function)(*args).jaxpr, 1)


def flops(function: Callable[..., object], *args: object) -> int:
    """Count the floating-point operations of the products in function(*args).

    A product of [a, b] and [b, c] counts 2·a·b·c. Additions, activations and look-ups are not
    counted. The body of a scan counts once per iteration, whereas `compiled.cost_analysis()` counts
    it only once. The body of a while loop counts once, because its number of iterations is not
    known. The loops of the kernel for W[ids] x are an exception: with x [B, n] and W [m, n, k],
    they count 2·B·n·k. A conditional counts as its most expensive branch, and
    `jax.lax.platform_dependent` as its branch for `target_platform()`. The arguments can be arrays
    or shapes.
    """
    return _sum_flops(products(function, *args))


def _sum_flops(matmuls: list[Product]) -> int:
    return sum(product.flops * product.times for product in matmuls)


def _find_products(jaxpr: core.Jaxpr, times: int) -> list[Product]:
    """Return the products of a jaxpr that runs `times` times."""
    matmuls: list[Product] = []
    for eqn in jaxpr.eqns:
        shapes: list[tuple[int, ...]] = [getattr(var.aval, 'shape', ()) for var in eqn.invars]
        output_size = math.prod(getattr(eqn.outvars[0].aval, 'shape', ())) if eqn.outvars else 0
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            num_flops = 2 * math.prod(shapes[0][axis] for axis in contracted) * output_size
            matmuls.append(Product(num_flops, _count_bytes(eqn), times))
        elif eqn.primitive.name == 'conv_general_dilated':
            out_features = shapes[1][eqn.params['dimension_numbers'].rhs_spec[0]]
            num_flops = 2 * math.prod(shapes[1]) // out_features * output_size
            matmuls.append(Product(num_flops, _count_bytes(eqn), times))
        elif eqn.primitive.name == 'jit' and eqn.params['name'] in PRODUCTS_BY_ID:
            matmuls.append(Product(_count_flops_by_id(eqn), _count_bytes(eqn), times))
        elif eqn.primitive.name == 'cond':
            branches = [_find_products(branch.jaxpr, times) for branch in list_branches(eqn)]
            costliest_branch: list[Product] = max(branches, key=_sum_flops)
            matmuls += costliest_branch
        else:
            num_iterations = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            for inner_jaxpr in _list_inner_jaxprs(eqn):
                matmuls += _find_products(inner_jaxpr, times * num_iterations)
    return matmuls


def list_branches(eqn: core.JaxprEqn) -> Sequence[core.ClosedJaxpr]:
    """Return the branches of a conditional, or the one that runs on the target platform."""
    branches: Sequence[core.ClosedJaxpr] = eqn.params['branches']
    platforms = eqn.params.get('branches_platforms')  # of `jax.lax.platform_dependent`
    if platforms is None:
        return branches
    platform = target_platform()
    names = {'cuda', 'rocm'} if platform == 'gpu' else {platform}
    for branch, branch_platforms in zip(branches, platforms, strict=True):
        if branch_platforms is None or not names.isdisjoint(branch_platforms):  # None: all others
            return [branch]
    return branches


def _count_flops_by_id(eqn: core.JaxprEqn) -> int:
    """Count 2·B·n·k for rows [B, n] and [B, k]. `jax.vmap` may have batched one or both."""
    variables: Any = (*eqn.invars[:2], eqn.outvars[0])
    x_shape, factor_shape, output_shape = (variable.aval.shape for variable in variables)
    is_forward = eqn.params['name'] == 'multiply_sorted_rows'
    y_shape = output_shape if is_forward else factor_shape
    return 2 * max(math.prod(x_shape) * y_shape[-1], x_shape[-1] * math.prod(y_shape))


def _count_bytes(eqn: core.JaxprEqn) -> int:
    arrays: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def _list_inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """Return the jaxprs that an equation calls, such as the body of a scan."""
    jaxprs = []
    for param in eqn.params.values():
        if isinstance(param, core.ClosedJaxpr):
            jaxprs.append(param.jaxpr)
        elif isinstance(param, core.Jaxpr):
            jaxprs.append(param)
    return jaxprs


Calls = dict[tuple[str, ...], tuple[nn.Module, list[jax.ShapeDtypeStruct]]]


def find_calls(
    model: nn.Module,
    is_match: Callable[[nn.Module], bool],
    variables: Mapping[str, Any],
    *args: object,
) -> Calls:
    """Return the submodules that match, by path, with the shapes of their inputs.

    The modules are unbound and ordered by their first call in model(*args). `variables` and `args`
    can be arrays or shapes.
    """
    calls: Calls = {}

    # Record the inputs of the matching submodules during an abstract call of the model.
    def record(
        call: Callable[..., object],
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        module = context.module
        if context.method_name == '__call__' and is_match(module):
            shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs]
            calls[module.path] = module.clone(parent=None), shapes
        return call(*inputs, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(model.apply, variables, *args)
    return calls


def has_name(module: nn.Module, pattern: str) -> bool:
    """Return whether the name of a submodule matches a pattern."""
    return bool(module.name and re.fullmatch(pattern, module.name))


def modules(
    model: nn.Module, pattern: str, variables: Mapping[str, Any], *args: object
) -> Iterator[tuple[nn.Module, dict[str, Any], list[jax.ShapeDtypeStruct]]]:
    """Yield the submodules of a Linen model whose names match a pattern.

    Each item is the unbound module, its variables, and the shapes of its inputs in model(*args).
    `variables` and `args` can be arrays or shapes.
    """
    calls = find_calls(model, lambda module: has_name(module, pattern), variables, *args)
    for path, (module, shapes) in calls.items():
        params = functools.reduce(_get_subtree, path, variables['params'])
        yield module, {'params': params}, shapes


def _get_subtree(params: Mapping[str, Any], module_name: str) -> Mapping[str, Any]:
    """Return the parameters of a submodule, or {} if it has none."""
    subtree: Mapping[str, Any] = params.get(module_name, {})
    return subtree


def nearest_size(
    cost: Callable[[int], int], target: int, smallest: int = 1, guess: int | None = None
) -> int:
    """Return the size whose cost is nearest to the target.

    Args:
      cost: function from a size to its cost, which must not decrease with the size.
      target: the desired cost.
      smallest: the smallest size to consider.
      guess: the size to start from, which saves calls of `cost` if it is near the result.

    Raises:
      ValueError: if the smallest size costs over 10 % more than the target, or no size reaches it.
    """
    cost = functools.cache(cost)

    # Find two sizes with the target between them.
    lower_bound = upper_bound = max(smallest, guess or smallest)
    while lower_bound > smallest and cost(lower_bound) >= target:
        lower_bound, upper_bound = max(smallest, lower_bound // 2), lower_bound
    if cost(lower_bound) > 1.1 * target:
        raise ValueError(
            f'the smallest size, {smallest}, costs {cost(smallest):,}, more than the target '
            f'of {target:,}'
        )
    if cost(lower_bound) >= target:
        return lower_bound
    while cost(upper_bound) < target:
        lower_bound, upper_bound = upper_bound, 2 * upper_bound
        if upper_bound > 2**24:
            raise ValueError(f'no size up to {lower_bound:,} reaches the target of {target:,}')

    # Move the two together by the Illinois method. It interpolates linearly, and halves the weight
    # of a bound that stays where it is, so that both bounds move.
    lower_weight = float(target - cost(lower_bound))
    upper_weight = float(cost(upper_bound) - target)
    while upper_bound - lower_bound > 1:
        share = lower_weight / (lower_weight + upper_weight)
        size = lower_bound + round(share * (upper_bound - lower_bound))
        size = min(max(size, lower_bound + 1), upper_bound - 1)
        excess = cost(size) - target
        if excess < 0:
            lower_bound, lower_weight, upper_weight = size, -excess, upper_weight / 2
        else:
            upper_bound, upper_weight, lower_weight = size, excess, lower_weight / 2
    return min((lower_bound, upper_bound), key=lambda size: abs(cost(size) - target))
