"""Kernels and references: which jaxprs with references the interpreter can read."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

# Primitives with a rule for the contents of a reference.
ACCESSES = {'get', 'swap', 'addupdate', 'new_ref', 'empty_ref', 'freeze', 'free_ref'}


class Kernel(NamedTuple):
    """A Pallas kernel.

    Attributes:
      jaxpr: its program; the arguments are references to indices, inputs, outputs and scratch.
      num_steps: number of steps of its grid; None if an operand decides.
      num_bounds: number of operands that are sizes of the grid.
      num_indices: number of operands that choose blocks.
    """

    jaxpr: core.Jaxpr
    num_steps: int | None
    num_bounds: int
    num_indices: int


def read_kernel(eqn: core.JaxprEqn) -> Kernel | None:
    """Return the kernel of a pallas_call; None if it has primitives without a rule."""
    jaxpr, mapping = eqn.params.get('jaxpr'), eqn.params.get('grid_mapping')
    grid = getattr(mapping, 'grid', None)
    if not isinstance(jaxpr, core.Jaxpr) or grid is None or jaxpr.constvars:
        return None
    if find_unreadable(jaxpr):
        return None
    sizes = [size for size in grid if isinstance(size, int)]
    num_bounds = len(grid) - len(sizes)
    num_steps = None if num_bounds else math.prod(sizes)
    return Kernel(jaxpr, num_steps, num_bounds, getattr(mapping, 'num_index_operands', 0))


def find_unreadable(jaxpr: core.Jaxpr) -> str:
    """Return the first primitive that takes a reference and has no rule; '' if there is none."""
    for eqn in jaxpr.eqns:
        inner = list(_list_jaxprs(eqn))
        takes_reference = any(is_reference(atom) for atom in eqn.invars)
        if not inner and takes_reference and eqn.primitive.name not in ACCESSES:
            return eqn.primitive.name
        for nested in inner:
            name = find_unreadable(nested)
            if name:
                return name
    return ''


def is_reference(atom: Any) -> bool:
    """Return whether a variable of a jaxpr is a reference to a mutable array."""
    return hasattr(atom.aval, 'inner_aval')


def _list_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for param in eqn.params.values():
        for item in param if isinstance(param, tuple | list) else (param,):
            jaxpr = getattr(item, 'jaxpr', item)
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr
