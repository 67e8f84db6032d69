"""Tables from the name of a primitive to its rule, a function that returns its results."""

from collections.abc import Callable, Mapping

from mi.find import (
    contractions,
    control_flow,
    elementwise,
    kernels,
    primitives,
    reductions,
    references,
    shapes,
    solves,
)
from mi.find.interpreter import Interpreter
from mi.find.records import Equation
from mi.find.values import Value

PROGRAM_RULES: Mapping[str, Callable[[Interpreter, Equation], list[Value]]] = {
    'cond': control_flow.run_cond,
    'scan': control_flow.run_scan,
    'while': control_flow.run_while,
    'pallas_call': kernels.run_kernel,
    'run_scoped': references.run_scoped,
    'custom_linear_solve': solves.solve_by_function,
    **dict.fromkeys(primitives.ACCESSES, references.access),
}
"""Primitives that run programs or have side effects, with or without data."""

ONE_RESULT_RULES: Mapping[str, Callable[[Interpreter, Equation], Value]] = {
    # Primitives that move or rename elements.
    **dict.fromkeys(primitives.RESHAPES, shapes.reshape),
    'concatenate': shapes.concatenate,
    'gather': shapes.gather,
    # Elementwise arithmetic.
    **dict.fromkeys(('add', 'sub', 'add_any'), elementwise.add),
    'neg': elementwise.negate,
    **dict.fromkeys(('mul', 'div', 'pow'), elementwise.multiply),
    **dict.fromkeys(('square', 'integer_pow'), elementwise.raise_power),
    **dict.fromkeys(primitives.SELECTIONS, elementwise.select),
    # Products and sums over axes.
    **dict.fromkeys(primitives.SCALED, contractions.contract),
    'conv_general_dilated': contractions.convolve,
    **dict.fromkeys((*primitives.SCATTERS, 'complex', 'fft'), contractions.map_linearly),
    **dict.fromkeys(primitives.REDUCTION_PRODUCTS, reductions.reduce_product),
    'triangular_solve': solves.solve_triangular,
}
"""Primitives with one result."""

MANY_RESULTS_RULES: Mapping[str, Callable[[Interpreter, Equation], list[Value]]] = {
    **dict.fromkeys(primitives.IDENTITIES, elementwise.convert),
    **dict.fromkeys(primitives.MOVES, shapes.move),
    **dict.fromkeys(primitives.SLICES, shapes.slice_array),
    **dict.fromkeys((*primitives.SUMS, *primitives.REDUCTIONS), reductions.reduce),
    **dict.fromkeys(primitives.REDUCERS, reductions.reduce_by_function),
    **dict.fromkeys(primitives.CHOICES, reductions.choose),
}
"""Primitives that may have several results."""


def interpret(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Return the results of an equation, and record its product if it has one."""
    eqn, name, inputs = equation.eqn, equation.name, equation.inputs

    # Programs.
    if name in PROGRAM_RULES:
        return PROGRAM_RULES[name](interpreter, equation)
    jaxpr = None if name in primitives.REDUCERS else primitives.find_jaxpr(eqn)
    if jaxpr is not None and name not in primitives.OPAQUE:
        return control_flow.run_call(interpreter, equation, jaxpr)
    _count_flops(interpreter, equation)

    # Constants and random numbers do not interact.
    if name in primitives.NOISE or not any(value.streams for value in inputs):
        return _make_constants(interpreter, equation)
    if name in primitives.OPAQUE:
        return interpreter.blur(equation)

    # Values that depend on data.
    if name in MANY_RESULTS_RULES:
        return MANY_RESULTS_RULES[name](interpreter, equation)
    if name in ONE_RESULT_RULES:
        return [ONE_RESULT_RULES[name](interpreter, equation)]
    if primitives.is_product(name):
        return [contractions.contract(interpreter, equation)]
    return elementwise.apply_nonlinear(interpreter, equation)


def _count_flops(interpreter: Interpreter, equation: Equation) -> None:
    """Add an equation's FLOPs, counting one iteration of a while loop."""
    if equation.name in primitives.FREE or not equation.shapes:
        return
    scope = equation.scope
    flops = primitives.count_flops(equation.eqn, equation.inputs, equation.shape)
    interpreter.flops += scope.num_devices * flops * scope.times


def _make_constants(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Return results that do not depend on any stream."""
    inputs = equation.inputs
    has_params = any(value.has_params for value in inputs)
    is_literal = bool(inputs) and all(value.is_literal for value in inputs)
    return [interpreter.make_constant(shape, has_params, is_literal) for shape in equation.shapes]
