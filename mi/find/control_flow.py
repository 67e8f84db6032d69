"""Rules for calls, conditionals and loops.

The carry of a loop is first iterated to a fixed point without recording. Then the body is recorded
once, with the number of its iterations.
"""

import math
from collections.abc import Callable, Sequence

from jax.extend import core

from mi.counting import list_branches
from mi.find.interpreter import Interpreter
from mi.find.primitives import count_devices, count_scan_inputs, get_shape, open_jaxpr
from mi.find.records import Equation, Scope
from mi.find.values import Value, blend, max_degrees, unbound_degrees

Step = Callable[[list[Value], Scope], list[Value]]
"""The body of a loop: (carry, scope) → the next carry and further outputs."""


def run_call(
    interpreter: Interpreter, equation: Equation, jaxpr: core.ClosedJaxpr | core.Jaxpr
) -> list[Value]:
    """Return the results of calling a jaxpr, such as that of a jitted function."""
    inputs, variables = equation.inputs, open_jaxpr(jaxpr).invars
    if len(variables) != len(inputs):
        return interpreter.blur(equation)
    scope = equation.enter_call()
    if equation.name == 'shard_map':  # its shapes are those of one device
        inputs = [
            value._replace(shape=get_shape(var))
            for value, var in zip(inputs, variables, strict=True)
        ]
        num_devices = scope.num_devices * count_devices(equation.eqn)
        scope = scope._replace(num_devices=num_devices)
    outputs = interpreter.run(jaxpr, inputs, scope)
    return [output._replace(shape=shape) if len(output.shape) == len(shape) else output
            for output, shape in zip(outputs, equation.shapes, strict=True)]  # fmt: skip


# --------------------------------------------------------------------------- conditionals


def run_cond(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Record all branches, merge their results, and only count the costliest branch.

    `jax.lax.platform_dependent` has only the branch for `mi.kernels.linear.target_platform()`.
    """
    predicate, *operands = equation.inputs
    scope = equation.enter()
    start_flops, start_contents = interpreter.flops, interpreter.contents
    outputs, costs, contents = [], [], []
    for branch in list_branches(equation.eqn):
        interpreter.flops, interpreter.contents = 0, dict(start_contents)
        outputs.append(interpreter.run(branch, operands, scope))
        costs.append(interpreter.flops)
        contents.append(interpreter.contents)
    interpreter.flops = start_flops + max(costs)
    interpreter.contents = {
        ref: merge(interpreter, [branch_contents[ref] for branch_contents in contents], predicate)
        for ref in start_contents
    }
    return [merge(interpreter, values, predicate) for values in zip(*outputs, strict=True)]


def merge(interpreter: Interpreter, values: Sequence[Value], predicate: Value) -> Value:
    """Return a value that is one of several, chosen by a predicate."""
    if all(value is values[0] for value in values):
        return values[0]
    chosen = predicate._replace(degrees=unbound_degrees([predicate]))
    merged = blend([*values, chosen], values[0].shape, is_polynomial=True)
    if not merged.streams:
        return merged
    has_one_base = len({value.base for value in values}) == 1
    if has_one_base and values[0].base:  # constants have none
        return values[0]._replace(streams=merged.streams, degrees=merged.degrees)
    return interpreter.identify(merged)


# --------------------------------------------------------------------------- loops


def run_scan(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Return the final carry of a scan, and its stacked outputs."""
    inputs, body, length = equation.inputs, equation.params['jaxpr'], equation.params['length']
    num_consts, num_carry = count_scan_inputs(equation.eqn)
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    elements = [_take_element(interpreter, value) for value in inputs[num_consts + num_carry :]]

    def step(carry: list[Value], scope: Scope) -> list[Value]:
        return interpreter.run(body, [*consts, *carry, *elements], scope)

    outputs = iterate(interpreter, step, carry, equation.enter_call().repeat(length))
    stacked = [
        output._replace(shape=(length, *output.shape),
                        features=tuple(axis + 1 for axis in output.features), parts=())
        for output in outputs[num_carry:]
    ]  # fmt: skip
    return [*outputs[:num_carry], *stacked]


def _take_element(interpreter: Interpreter, value: Value) -> Value:
    """Return the array element that a single iteration of a scan sees."""
    features = tuple(axis - 1 for axis in value.features if axis > 0)
    element = value._replace(shape=value.shape[1:], features=features, parts=())
    return interpreter.identify(element) if value.streams else element


def run_while(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Return the final carry of a while loop."""
    inputs, params = equation.inputs, equation.params
    num_cond, num_body = params['cond_nconsts'], params['body_nconsts']
    cond_consts = inputs[:num_cond]
    body_consts, carry = inputs[num_cond : num_cond + num_body], inputs[num_cond + num_body :]
    predicates: list[Value] = []

    def step(carry: list[Value], scope: Scope) -> list[Value]:
        predicates[:] = interpreter.run(params['cond_jaxpr'], [*cond_consts, *carry], scope)
        return interpreter.run(params['body_jaxpr'], [*body_consts, *carry], scope)

    # Every output depends on the number of iterations, which may be zero.
    outputs = iterate(interpreter, step, carry, equation.enter_call().repeat(None))
    return [
        merge(interpreter, [initial, output], predicates[0])
        for initial, output in zip(carry, outputs, strict=True)
    ]


def iterate(interpreter: Interpreter, step: Step, carry: list[Value], scope: Scope) -> list[Value]:
    """Return the outputs of a loop, recording its body once.

    The contents of references that the body writes are part of the carry.
    """
    written = _list_written(interpreter, step, carry, scope)
    if not written:
        return _iterate_carry(interpreter, step, carry, scope)
    num_carry = len(carry)
    initial = [interpreter.contents[ref] for ref in written]

    def step_with_contents(values: list[Value], scope: Scope) -> list[Value]:
        interpreter.contents |= dict(zip(written, values[num_carry:], strict=True))
        outputs = step(values[:num_carry], scope)
        contents = [interpreter.contents[ref] for ref in written]
        return [*outputs[:num_carry], *contents, *outputs[num_carry:]]

    outputs = _iterate_carry(interpreter, step_with_contents, [*carry, *initial], scope)
    finals = outputs[num_carry : num_carry + len(written)]
    for ref, first, final in zip(written, initial, finals, strict=True):
        if scope.is_in_while:  # perhaps never written
            streams, degrees = first.streams | final.streams, max_degrees([first, final])
            interpreter.contents[ref] = final._replace(streams=streams, degrees=degrees)
        elif interpreter.contents[ref].carried:
            interpreter.contents[ref] = final
    return [*outputs[:num_carry], *outputs[num_carry + len(written) :]]


def _list_written(
    interpreter: Interpreter, step: Step, carry: list[Value], scope: Scope
) -> list[int]:
    """List the references that the body of a loop writes."""
    if not interpreter.contents:
        return []
    contents, flops = dict(interpreter.contents), interpreter.flops
    step(carry, scope._replace(is_recording=False))
    written = [ref for ref, content in contents.items() if interpreter.contents[ref] is not content]
    interpreter.contents, interpreter.flops = contents, flops
    return written


def _iterate_carry(
    interpreter: Interpreter, step: Step, carry: list[Value], scope: Scope
) -> list[Value]:
    """Iterate the dependencies of the carry to a fixed point, then record the body once."""
    loop = frozenset([interpreter.make_id()])
    flops = interpreter.flops
    while True:
        carry = [
            interpreter.identify(blend([value], value.shape, is_polynomial=True))
            if value.streams or value.has_params
            else value._replace(is_literal=False)
            for value in carry
        ]
        outputs = step(_mark_carry(carry, loop), scope._replace(is_recording=False))
        pairs = list(zip(carry, outputs[: len(carry)], strict=True))
        carry = [_widen(previous, value) for previous, value in pairs]
        if all(
            _get_dependence(previous) == _get_dependence(value)
            for (previous, _), value in zip(pairs, carry, strict=True)
        ):
            break

    # Record the body, and forget the carry of this loop outside of it.
    interpreter.flops = flops
    outputs = step(_mark_carry(carry, loop), scope)
    finals = [
        interpreter.identify(blend([value], value.shape, is_polynomial=True))
        if value.streams
        else value
        for value in outputs[: len(carry)]
    ]
    return [
        value._replace(carried=value.carried - loop, is_carry=False)
        for value in (*finals, *outputs[len(carry) :])
    ]


def _mark_carry(carry: list[Value], loop: frozenset[int]) -> list[Value]:
    """Mark the values that depend on data as the carry of this loop."""
    return [
        value._replace(carried=value.carried | loop, is_carry=True) if value.streams else value
        for value in carry
    ]


def _get_dependence(value: Value) -> tuple[int, bool, tuple[float, ...], bool]:
    """Return the properties that are compared to detect the fixed point of a carry."""
    return value.streams, value.has_params, value.degrees, value.is_choice


def _widen(previous: Value, value: Value) -> Value:
    """Merge a value of the carry with its next value, making degrees that grow unbounded."""
    degrees = tuple(
        previous_degree
        if degree <= previous_degree
        else (degree if previous_degree == 0 and degree <= 1 else math.inf)
        for previous_degree, degree in zip(previous.degrees, value.degrees, strict=True)
    )
    return previous._replace(
        streams=previous.streams | value.streams,
        has_params=previous.has_params or value.has_params,
        degrees=degrees,
        is_choice=previous.is_choice or value.is_choice,
    )
