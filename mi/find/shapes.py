"""Rules for primitives that move elements: reshapes, slices, concatenations and gathers."""

from collections.abc import Iterator, Mapping

from jax.extend import core

from mi.find import motifs
from mi.find.records import Equation
from mi.find.trace import Trace
from mi.find.values import Source, Value, blend, max_degrees, unbind, unite


def move(trace: Trace, equation: Equation) -> list[Value]:
    """Return arrays that are moved to other devices."""
    return [
        trace.identify(value._replace(shape=shape, features=(), parts=()))
        for value, shape in zip(equation.inputs, equation.shapes, strict=False)
    ]


# --------------------------------------------------------------------------- reshapes


def reshape(trace: Trace, equation: Equation) -> Value:
    """Return a value with the same elements in another shape or order."""
    name, value, shape = equation.name, equation.inputs[0], equation.shape
    if shape == value.shape and name not in ('transpose', 'rev'):
        return value
    params = _format_params({k: v for k, v in equation.params.items() if k != 'sharding'})
    axis_map = _map_axes(equation.eqn, value.shape, shape)
    parts_axis = _map_parts_axis(value, shape, axis_map)
    return value._replace(
        shape=shape,
        base=trace.intern('base', value.base, name, shape, params),
        features=tuple(sorted({out for axis in value.features for out in axis_map.get(axis, ())})),
        parts_axis=parts_axis,
        parts=value.parts if parts_axis else (),
    )


def _map_parts_axis(
    value: Value, shape: tuple[int, ...], axis_map: Mapping[int, tuple[int, ...]]
) -> int:
    """Return the axis of concatenation after a reshape, or 0 if it is no longer a single axis."""
    if not value.parts:
        return 0
    axes = axis_map.get(len(value.shape) + value.parts_axis, ())
    if len(axes) != 1:
        return 0
    parts_axis = axes[0] - len(shape)
    return parts_axis if shape[parts_axis] == value.shape[value.parts_axis] else 0


def _map_axes(
    eqn: core.JaxprEqn, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Return the axes of the result that each axis of the operand becomes."""
    name, params = eqn.primitive.name, eqn.params
    if name == 'transpose':
        return {axis: (i,) for i, axis in enumerate(params['permutation'])}
    if name == 'broadcast_in_dim':
        return {i: (axis,) for i, axis in enumerate(params['broadcast_dimensions'])}
    if name == 'rev':
        return {axis: (axis,) for axis in range(len(in_shape))}
    return {
        axis: tuple(out for out in outs if out_shape[out] > 1)
        for axes, outs in _group_axes(in_shape, out_shape)
        for axis in axes
        if in_shape[axis] > 1
    }


def _group_axes(
    in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest groups of input and output axes of a reshape that have equal sizes."""
    i = j = 0
    while i < len(in_shape) and j < len(out_shape):
        axes, outs = [i], [j]
        size, out_size = in_shape[i], out_shape[j]
        i, j = i + 1, j + 1
        while size != out_size:
            if size < out_size and i < len(in_shape):
                size, i, axes = size * in_shape[i], i + 1, [*axes, i]
            elif j < len(out_shape):
                out_size, j, outs = out_size * out_shape[j], j + 1, [*outs, j]
            else:
                return
        yield axes, outs


def _format_params(params: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Return the parameters of a primitive in a hashable form."""
    return tuple((key, str(param)) for key, param in sorted(params.items()))


# --------------------------------------------------------------------------- slices


def slice_array(trace: Trace, equation: Equation) -> list[Value]:
    """Return slices of an array, or a padded array."""
    name, value, *operands = equation.name, *equation.inputs
    indices = [operand for operand in operands if operand.streams]
    if name == 'dynamic_slice' and indices and value.streams:
        return [look_up(trace, equation, value, indices)]
    params = _format_params(equation.params)
    outputs = []
    for index, shape in enumerate(equation.shapes):
        # Equal slices of equal arrays are equal, unless their indices are unknown.
        key = (trace.make_id(),) if name == 'dynamic_slice' else (index, params)
        output = value._replace(
            shape=shape,
            base=trace.intern('base', value.base, name, *key),
            origin=trace.intern('origin', value.origin, name, *key),
            is_window=value.is_window or _is_window(name, value.shape, shape),
            parts=(),
        )
        if indices:  # indices of parameters, or padding
            operand = blend(indices, ())
            output = output._replace(
                streams=output.streams | operand.streams, degrees=max_degrees([output, operand])
            )
        outputs.append(output)
    return outputs


def _is_window(name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> bool:
    """Return whether a slice takes most of an axis, so that several such slices overlap."""
    if name not in ('slice', 'dynamic_slice') or len(in_shape) != len(out_shape):
        return False
    pairs = zip(in_shape, out_shape, strict=True)
    return any(length < full and 2 * length > full for full, length in pairs)


def concatenate(trace: Trace, equation: Equation) -> Value:
    """Return a concatenation of arrays that keeps a list of its parts.

    An affine map of the result combines the parts with each other, see `Trace.record_parts`.
    """
    inputs, shape = equation.inputs, equation.shape
    data = [value for value in inputs if value.streams]
    squashes = {operand.squash for operand in data}
    roots = {operand.root for operand in data}

    # The arrays along the axis; those of an earlier concatenation along it stay apart.
    axis = equation.params['dimension'] - len(shape)
    parts: list[Source] = []
    for operand in data:
        size, is_carried = operand.shape[axis], bool(operand.carried)
        undivided = (Source(operand.root, operand.streams, size, is_carried),)
        parts += operand.parts if operand.parts_axis == axis else undivided

    # What all of them are, the result is too.
    value = trace.identify(blend(inputs, shape, is_polynomial=True))
    if len(roots) == 1:
        value = value._replace(root=data[0].root)
    is_linear = all(operand.linear for operand in data)
    sources = dict.fromkeys(source for operand in data for source in operand.linear)
    return value._replace(
        squash=squashes.pop() if len(squashes) == 1 else '',
        linear=tuple(sources) if is_linear else (),
        features=data[0].features,
        is_activation=all(operand.is_activation for operand in data),
        num_windows=sum(operand.is_window for operand in data) if len(roots) == 1 else 0,
        parts=tuple(parts),
        parts_axis=axis,
        products=unite(data, 'products'),
        mapped_products=unite(data, 'mapped_products'),
    )


# --------------------------------------------------------------------------- gathers


def gather(trace: Trace, equation: Equation) -> Value:
    """Return entries of a table or of data at indices."""
    value, indices = equation.inputs
    numbers, shape = equation.params['dimension_numbers'], equation.shape
    if not indices.streams:
        key = 'gather', trace.make_id()
        return value._replace(
            shape=shape,
            base=trace.intern('base', value.base, *key),
            origin=trace.intern('origin', value.origin, *key),
            features=(),
            parts=(),
        )
    if value.streams:
        return look_up(trace, equation, value, [indices])

    # Rows of a table: a linear map of a one-hot code.
    result = trace.identify(blend(equation.inputs, shape))
    size = value.shape[numbers.start_index_map[0]] if numbers.start_index_map else 1
    return result._replace(
        linear=(Source(indices.root, indices.streams, size, bool(indices.carried)),),
        features=tuple(numbers.offset_dims),
        is_chosen=indices.is_choice,
    )


def look_up(trace: Trace, equation: Equation, value: Value, indices: list[Value]) -> Value:
    """Record and return entries of data that are selected by data."""
    chosen = trace.identify(blend([value, *indices], equation.shape))
    trace.record(equation._replace(inputs=[value, indices[0]]), motifs.ROUTING)
    return chosen._replace(degrees=max_degrees([value, *unbind(indices)]))
