"""Records of the interpreter: equations, products, meetings, and their scopes."""

import dataclasses
import math
from typing import Any, NamedTuple

from jax.extend import core

from mi.find.primitives import find_line
from mi.find.values import Source, Value


class Scope(NamedTuple):
    """The place of a jaxpr in the program.

    Attributes:
      path: the names of the enclosing modules.
      times: number of times that it runs, counting one iteration of each while loop.
      is_in_while: whether a while loop encloses it, so that its number of runs is unknown.
      frame: the source line of the enclosing call, for equations that have no line.
      is_recording: whether products are recorded.
      num_devices: number of devices of a shard_map that execute it.
    """

    path: str = ''
    times: int = 1
    is_in_while: bool = False
    frame: str = ''
    is_recording: bool = True
    num_devices: int = 1

    def repeat(self, times: int | None) -> 'Scope':
        """Return the scope of a loop's body, where `times` is None if the trip count is unknown."""
        if times is None:
            return self._replace(is_in_while=True)
        return self._replace(times=self.times * times)

    @property
    def known_times(self) -> int | None:
        """Return the number of times that it runs, or None if it depends on a while loop."""
        return None if self.is_in_while else self.times


class Equation(NamedTuple):
    """An equation in a jaxpr, with the values of its operands.

    Attributes:
      eqn: the equation of the jaxpr.
      inputs: the operands.
      scope: the place of the jaxpr.
      shapes: shapes of the results.
    """

    eqn: core.JaxprEqn
    inputs: list[Value]
    scope: Scope
    shapes: list[tuple[int, ...]]

    @property
    def name(self) -> str:
        """Return the name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Return the parameters of the primitive."""
        return self.eqn.params

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the first result, or () if there is none."""
        return self.shapes[0] if self.shapes else ()

    def enter(self) -> Scope:
        """Return the scope with its path extended by the modules that enclose the equation."""
        names = str(self.eqn.source_info.name_stack).split('/')
        names = [name for name in names if name and '->' not in name]  # jnp.einsum adds its own
        return self.scope._replace(path='/'.join(filter(None, [self.scope.path, *names])))

    def enter_call(self) -> Scope:
        """Return the scope of a jaxpr that this equation calls, with the line if it is recorded."""
        scope = self.enter()
        return scope._replace(frame=self.find_line()) if scope.is_recording else scope

    def find_line(self) -> str:
        """Return the source line of the equation, or that of the enclosing call."""
        return find_line(self.eqn) or self.scope.frame


class Geometry(NamedTuple):
    """The axes of an affine map.

    Attributes:
      shape: shape of the result.
      features: the axes of the result that come from the parameters.
      contracted: the axes of the operand that the map sums over.
      window: number of positions of a convolution's kernel.
    """

    shape: tuple[int, ...]
    features: tuple[int, ...]
    contracted: tuple[int, ...] = ()
    window: int = 1

    @property
    def num_features(self) -> int:
        """Return the number of features of the result."""
        return math.prod(self.shape[axis] for axis in self.features)


@dataclasses.dataclass
class Product:
    """A recorded product.

    Attributes:
      primitive: name of the primitive.
      motif: name of the motif, from `mi.find.motifs`.
      left, right: the two sides.
      shape: shape of the result.
      flops: FLOPs of one execution.
      scope, source: the place in the program, and the source line.
      count: number of equations that form it, such as the terms of a convolution by shifts.
      is_absorbed: whether another product includes it.
      roots: ids of the results, one per equation, and of affine maps of them.
    """

    primitive: str
    motif: str
    left: Value
    right: Value
    shape: tuple[int, ...]
    flops: int
    scope: Scope
    source: str
    count: int = 1
    is_absorbed: bool = False
    roots: tuple[int, ...] = ()


@dataclasses.dataclass
class Meeting:
    """Two streams that are concatenated or added in an affine map.

    Attributes:
      kind: 'concatenation' or 'sum'.
      left, right: the arrays that meet.
      shape: shape of the affine map's result.
      features: number of features of the result.
      window: number of positions of a convolution's kernel.
      scope, source: the place in the program, and the source line.
    """

    kind: str
    left: Source
    right: Source
    shape: tuple[int, ...]
    features: int
    window: int
    scope: Scope
    source: str
