"""Rules for reductions: sums, extremes, products, custom reductions, and choices."""

import math

from mi.find.interpreter import Interpreter
from mi.find.primitives import SUMS, find_jaxpr, is_integer
from mi.find.records import Equation
from mi.find.trace import Trace
from mi.find.values import NO_IDS, Value, blend, unbound_degrees


def reduce(trace: Trace, equation: Equation) -> list[Value]:
    """Return sums or extremes along axes, which count as statistics of the arrays."""
    return [
        _reduce(trace, equation, value, shape)
        for value, shape in zip(equation.inputs, equation.shapes, strict=False)
    ]


def _reduce(trace: Trace, equation: Equation, value: Value, shape: tuple[int, ...]) -> Value:
    """Return a statistic of a single array."""
    is_sum = equation.name in SUMS
    is_linear = is_sum and not equation.name.startswith('cum')
    reduced_axes = equation.params.get('axes', ())
    axes = [axis for axis in range(len(value.shape)) if axis not in reduced_axes]
    return trace.identify(value)._replace(
        shape=shape,
        degrees=value.degrees if is_sum else unbound_degrees([value]),
        reduced=value.reduced | {value.origin},
        squash='',
        is_exp=False,
        is_softmax=False,
        linear=value.linear if is_linear else (),
        features=tuple(axes.index(axis) for axis in value.features if axis in axes),
        is_activation=False,
        is_window=False,
        is_carry=False,
        parts=(),
        pending=NO_IDS,
    )


def reduce_product(trace: Trace, equation: Equation) -> Value:
    """Return products or cumulative products of an array's entries along axes."""
    value = equation.inputs[0]
    axes = equation.params.get('axes', (equation.params.get('axis', 0),))
    length = math.prod(value.shape[axis] for axis in axes)
    degrees = tuple(length * degree for degree in value.degrees)
    result = blend([value], equation.shape)._replace(degrees=degrees)
    if length > 1 and not value.is_mask:
        entries = value._replace(is_softmax=False)
        sides = [entries, trace.identify(entries)]
        result = trace.record_product(equation._replace(inputs=sides), result)
    else:
        result = trace.identify(result)._replace(is_mask=value.is_mask)
    return result._replace(reduced=value.reduced | {value.origin})


def reduce_by_function(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Return the result of a reduction by a custom function, which runs once per entry."""
    reducer = find_jaxpr(equation.eqn)
    if reducer is None:
        return interpreter.blur(equation)
    inputs, shapes = equation.inputs, equation.shapes
    entries = inputs[: len(inputs) // 2]
    accumulated = [interpreter.identify(value) for value in entries]
    window = equation.params.get('window_dimensions')
    num_entries = math.prod((*shapes[0], *window) if window else entries[0].shape)
    scope = equation.enter_call().repeat(num_entries)
    outputs = interpreter.run(reducer, [*entries, *accumulated], scope)
    return [
        interpreter.identify(blend([output, *inputs], shape))
        for output, shape in zip(outputs, shapes, strict=True)
    ]


def choose(trace: Trace, equation: Equation) -> list[Value]:
    """Return the entries and indices that a top-k, a sort or an argmax selects."""
    first = equation.inputs[0]
    outputs = []
    for var, shape in zip(equation.eqn.outvars, equation.shapes, strict=True):
        value = trace.identify(blend(equation.inputs, shape))
        if is_integer(var):
            outputs.append(value._replace(is_choice=True))
        else:
            outputs.append(value._replace(is_choice=first.is_choice, is_softmax=first.is_softmax,
                                          pending=first.pending,
                                          products=first.products))  # fmt: skip
    return outputs
