"""Rules for contractions and convolutions, which are products or affine maps."""

import math

from mi.find import motifs
from mi.find.motifs import Contraction
from mi.find.primitives import SCATTERS, get_dimension_numbers
from mi.find.records import Equation, Geometry
from mi.find.trace import Trace
from mi.find.values import (
    Source,
    Value,
    add_degrees,
    blend,
    get_sources,
    max_degrees,
    unbind,
)


def contract(trace: Trace, equation: Equation) -> Value:
    """Return the result of a product that sums over axes of both sides.

    A ragged product has a third operand, the sizes of its groups. If they depend on data, they
    choose which entries of the side without data are multiplied.
    """
    left, right, *groups = equation.inputs
    axes, batch = get_dimension_numbers(equation.eqn, left, right)
    contraction = Contraction(*axes, *batch)
    sizes = [value for value in groups if value.streams]
    if not (left.streams or right.streams):  # only the group sizes depend on data
        return trace.identify(blend(equation.inputs, equation.shape))
    if sizes and not right.streams:
        right = blend([right, *sizes], right.shape)._replace(is_chosen=True)
    elif sizes and not left.streams:
        left = blend([left, *sizes], left.shape)._replace(is_chosen=True)
    if left.streams and right.streams:
        product = equation._replace(inputs=[left, right, *groups])
        return _contract_data(trace, product, contraction)

    # An affine map: its features come from the side without data.
    is_left = bool(left.streams)
    value, weights = (left, right) if is_left else (right, left)
    num_used = len(contraction.right) + len(contraction.right_batch)
    if not is_left:
        num_used = len(contraction.left) + len(contraction.left_batch)
    num_free = len(weights.shape) - num_used
    first = len(equation.shape) - num_free if is_left else len(contraction.left_batch)
    geometry = Geometry(
        equation.shape,
        features=tuple(range(first, first + num_free)),
        contracted=contraction.left if is_left else contraction.right,
    )
    return _map_affine(trace, equation, (value, weights), geometry)


def _contract_data(trace: Trace, equation: Equation, contraction: Contraction) -> Value:
    """Return the result of a product whose two sides both depend on data."""
    left, right, *groups = equation.inputs
    value = blend(equation.inputs, equation.shape)._replace(degrees=add_degrees(left, right))
    if groups:
        value = value._replace(degrees=max_degrees([value, *unbind(groups)]))
    product = equation._replace(inputs=[left, right])
    sides = (
        (left, contraction.left, contraction.left_batch),
        (right, contraction.right, contraction.right_batch),
    )
    is_inner = all(len(side.shape) == len(axes) + len(batch) for side, axes, batch in sides)
    if left.base == right.base and is_inner:  # a sum of squares
        trace.record(product, motifs.ACTIVATION)
        return trace.identify(value)._replace(reduced=left.reduced | {left.origin})
    return trace.record_product(product, value, contraction)


def convolve(trace: Trace, equation: Equation) -> Value:
    """Return a convolution, which is an affine map unless its kernel depends on data."""
    left, right = equation.inputs
    if left.streams and right.streams:
        value = blend(equation.inputs, equation.shape)._replace(degrees=add_degrees(left, right))
        index = trace.record(equation, motifs.DYNAMIC_CONVOLUTION)
        return trace.finish_product(value, index)
    numbers = equation.params['dimension_numbers']
    value, weights, spec = left, right, numbers.lhs_spec
    if not left.streams:
        value, weights, spec = right, left, numbers.rhs_spec
    geometry = Geometry(
        equation.shape,
        features=(numbers.out_spec[1],),
        contracted=(spec[1],),
        window=math.prod(right.shape[axis] for axis in numbers.rhs_spec[2:]),
    )
    return _map_affine(trace, equation, (value, weights), geometry)


def _map_affine(
    trace: Trace, equation: Equation, operands: tuple[Value, Value], geometry: Geometry
) -> Value:
    """Return the result of an affine map whose weights do not depend on data."""
    value, weights = operands
    size = math.prod(value.shape[axis] for axis in geometry.contracted) * geometry.window
    source = Source(value.root, value.streams, size, bool(value.carried))
    has_parts = bool(value.parts) and len(value.shape) + value.parts_axis in geometry.contracted
    if has_parts and weights.has_params:
        trace.record_parts(equation, value, geometry)
    result = trace.identify(blend([value, weights], geometry.shape, is_polynomial=True))
    for index in value.products | value.mapped_products:
        trace.products[index].roots += (result.root,)
    return result._replace(
        linear=(source,),
        features=geometry.features,
        is_chosen=value.is_chosen or weights.is_chosen,
        mapped_products=value.products,
    )


def map_linearly(trace: Trace, equation: Equation) -> Value:
    """Return the result of a linear map: a Fourier transform, a scatter, or a complex number."""
    operands, indices = _split_indices(equation)
    shape = equation.shape
    value = trace.identify(blend([*operands, *unbind(indices)], shape, is_polynomial=True))
    # Constants at indices from data are a linear map of a one-hot code, as in a gather.
    data = [operand for operand in operands if operand.streams]
    data = data or [index for index in indices if index.streams]
    sources = tuple(source for operand in data for source in get_sources(operand))
    is_overwritten = equation.name in SCATTERS and 'add' not in equation.name
    if is_overwritten and not all(operand.linear for operand in data):
        sources = ()
    return value._replace(linear=tuple(dict.fromkeys(sources)), features=(len(shape) - 1,))


def _split_indices(equation: Equation) -> tuple[list[Value], list[Value]]:
    """Return the operands that a linear map is linear in, and the indices of a scatter."""
    inputs = equation.inputs
    if equation.name == 'dynamic_update_slice':
        return inputs[:2], inputs[2:]
    if equation.name in SCATTERS:
        array, indices, updates = inputs
        return [array, updates], [indices]
    return inputs, []
