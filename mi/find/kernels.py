"""Rules for Pallas kernels, which are interpreted as loops over references."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

from mi.find.control_flow import iterate
from mi.find.interpreter import Interpreter
from mi.find.primitives import ACCESSES, get_shape
from mi.find.records import Equation, Scope
from mi.find.references import drop_axes, make_reference
from mi.find.values import Value


class Kernel(NamedTuple):
    """A Pallas kernel.

    Attributes:
      jaxpr: the kernel's program, whose arguments are references to indices, inputs, outputs and
        scratch.
      num_steps: number of steps of the grid, or None if it depends on an operand.
      num_bounds: number of operands that are sizes of the grid.
      num_indices: number of operands that select blocks.
    """

    jaxpr: core.Jaxpr
    num_steps: int | None
    num_bounds: int
    num_indices: int


def run_kernel(interpreter: Interpreter, equation: Equation) -> list[Value]:
    """Run a kernel as a loop over its grid that reads and writes blocks."""
    kernel, inputs = _read_kernel(equation.eqn), equation.inputs
    operands = inputs[kernel.num_bounds :] if kernel else inputs
    chooses_blocks = kernel and any(value.streams for value in operands[: kernel.num_indices])
    if kernel is None or chooses_blocks or any(value.ref for value in inputs):
        return interpreter.blur(equation)

    # References to blocks of the operands, then to outputs and scratch.
    variables = kernel.jaxpr.invars
    blocks = [
        _take_block(interpreter, value, get_shape(var))
        for value, var in zip(operands, variables, strict=False)
    ]
    blocks += [interpreter.make_constant(get_shape(var)) for var in variables[len(operands) :]]
    refs = [make_reference(interpreter, block) for block in blocks]

    # One step of the grid needs no fixed point.
    def step(carry: list[Value], scope: Scope) -> list[Value]:
        return interpreter.run(kernel.jaxpr, refs, scope)

    scope = equation.enter_call()
    if kernel.num_steps == 1:
        step([], scope)
    else:
        iterate(interpreter, step, [], scope.repeat(kernel.num_steps))
    outputs = [interpreter.contents[ref.ref] for ref in refs[len(operands) :]]
    return [
        interpreter.identify(output._replace(shape=shape, parts=(), features=()))
        for output, shape in zip(outputs, equation.shapes, strict=False)
    ]


def _take_block(interpreter: Interpreter, value: Value, shape: tuple[int, ...]) -> Value:
    """Return the operand's block that a single step of the grid sees."""
    if shape == value.shape or not value.streams:
        return value._replace(shape=shape)
    block = value._replace(shape=shape, features=drop_axes(value, shape), parts=())
    return interpreter.identify(block)._replace(root=value.root)


def _read_kernel(eqn: core.JaxprEqn) -> Kernel | None:
    """Return the kernel of a pallas_call, or None if it uses primitives without a rule."""
    jaxpr, mapping = eqn.params.get('jaxpr'), eqn.params.get('grid_mapping')
    grid = getattr(mapping, 'grid', None)
    if not isinstance(jaxpr, core.Jaxpr) or grid is None or jaxpr.constvars:
        return None
    if _find_unreadable(jaxpr):
        return None
    sizes = [size for size in grid if isinstance(size, int)]
    num_bounds = len(grid) - len(sizes)
    num_steps = None if num_bounds else math.prod(sizes)
    return Kernel(jaxpr, num_steps, num_bounds, getattr(mapping, 'num_index_operands', 0))


def _find_unreadable(jaxpr: core.Jaxpr) -> str:
    """Return the first primitive that takes a reference but has no rule, or '' if there is none."""
    for eqn in jaxpr.eqns:
        inner = list(_list_jaxprs(eqn))
        takes_reference = any(_is_reference(atom) for atom in eqn.invars)
        if not inner and takes_reference and eqn.primitive.name not in ACCESSES:
            return eqn.primitive.name
        for nested in inner:
            name = _find_unreadable(nested)
            if name:
                return name
    return ''


def _is_reference(atom: Any) -> bool:
    """Return whether a jaxpr's variable is a reference to a mutable array."""
    return hasattr(atom.aval, 'inner_aval')


def _list_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for param in eqn.params.values():
        for item in param if isinstance(param, tuple | list) else (param,):
            jaxpr = getattr(item, 'jaxpr', item)
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr
