"""What a module costs: parameters and FLOPs from shapes alone, and the size that meets a target.

Nothing is allocated or compiled: shapes come from `jax.eval_shape`, FLOPs from the jaxpr.

python -m mi.estimate --config=configs/lm.py prints what a run of a config costs: see `mi.estimate`.
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
    """A product of a function, as often as the function computes it.

    Attributes:
      flops: 2·a·b·c for [a, b] and [b, c].
      bytes: of both factors and of what comes out.
      times: how often.
    """

    flops: int
    bytes: int
    times: int


def products(function: Callable[..., Any], *args: Any) -> list[Product]:
    """List the products and convolutions of function(*args); args may be shapes only.

    The body of a loop counts once per iteration, and of a branch the side with more FLOPs.
    """
    return _products(jax.make_jaxpr(function)(*args).jaxpr, 1)


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the products in function(*args); args may be shapes only.

    A product of [a, b] and [b, c] counts 2·a·b·c; additions, activations and look-ups count
    nothing, a loop counts its body once per iteration, and of a branch the dearer side counts.
    `compiled.cost_analysis()` would count a loop's body once in all.
    """
    return _flops(products(function, *args))


def _flops(products: list[Product]) -> int:
    return sum(product.flops * product.times for product in products)


def _products(jaxpr: core.Jaxpr, times: int) -> list[Product]:
    products: list[Product] = []
    for eqn in jaxpr.eqns:
        shapes: list[tuple[int, ...]] = [getattr(v.aval, 'shape', ()) for v in eqn.invars]
        out = math.prod(getattr(eqn.outvars[0].aval, 'shape', ())) if eqn.outvars else 0
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            product_flops = 2 * math.prod(shapes[0][axis] for axis in contracted) * out
            products.append(Product(product_flops, _bytes(eqn), times))
        elif eqn.primitive.name == 'conv_general_dilated':
            out_features = shapes[1][eqn.params['dimension_numbers'].rhs_spec[0]]
            product_flops = 2 * math.prod(shapes[1]) // out_features * out
            products.append(Product(product_flops, _bytes(eqn), times))
        elif eqn.primitive.name == 'cond':
            sides = [_products(branch.jaxpr, times) for branch in eqn.params['branches']]
            costliest_branch: list[Product] = max(sides, key=_flops)
            products += costliest_branch
        else:
            length = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            for inner in _inner(eqn):
                products += _products(inner, times * length)
    return products


def _bytes(eqn: core.JaxprEqn) -> int:
    arrays: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def _inner(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """Yield the jaxprs that an equation calls: scan's body, a jit's or custom_vjp's function."""
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
    """Yield the parts of a Linen model whose names match, to count what they cost.

    Yields, for each: the module unbound, its variables, and the shapes of the arrays it is called
    with in model(*args); variables and args may be shapes only.
    """
    matches: dict[tuple[str, ...], tuple[nn.Module, list[jax.ShapeDtypeStruct]]] = {}

    def watch(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        module = context.module
        named = module.name and re.fullmatch(pattern, module.name)
        if named and context.method_name == '__call__':
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
            matches[module.path] = module.clone(parent=None), shapes
        return call(*inputs, **options)

    with nn.intercept_methods(watch):
        jax.eval_shape(model.apply, variables, *args)
    for path, (module, shapes) in matches.items():
        own = functools.reduce(lambda tree, key: tree.get(key, {}), path, variables['params'])
        yield module, {'params': own}, shapes


def nearest_size(cost: Callable[[int], int], target: int, low: int = 1) -> int:
    """Return the size s ≥ low whose cost is nearest to the target; costs must not fall with s.

    Raises:
      ValueError: if even the smallest size costs a tenth more than the target: nothing matches.
    """
    smallest = cost(low)
    if smallest > 1.1 * target:
        raise ValueError(f'the smallest size, {low}, costs {smallest:,}, the target is {target:,}')
    high = low + 1
    while cost(high) < target:
        low, high = high, 2 * high
        if high > 2**24:
            raise ValueError(f'no size up to {low:,} reaches the target {target:,}')
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return min((low, high), key=lambda size: abs(cost(size) - target))
