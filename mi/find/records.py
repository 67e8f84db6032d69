"""What the interpreter reads and records: equations, products and meetings, and where they are."""

import dataclasses
import math
from typing import Any, NamedTuple

from jax.extend import core

from mi.find.primitives import find_line
from mi.find.values import Source, Value


class Scope(NamedTuple):
    """Where a jaxpr is.

    Attributes:
      path: the names of the enclosing modules.
      times: how often it runs; None if a while loop decides.
      frame: the source line of the outermost call without a line of its own.
      is_recording: whether products are recorded.
      num_devices: how many devices of a shard_map execute it.
    """

    path: str = ''
    times: int | None = 1
    frame: str = ''
    is_recording: bool = True
    num_devices: int = 1

    def repeat(self, times: int | None) -> 'Scope':
        """Return the scope of a loop's body; times is None if the number is unknown."""
        if self.times is None or times is None:
            return self._replace(times=None)
        return self._replace(times=self.times * times)


class Equation(NamedTuple):
    """An equation of a jaxpr and the values of its operands.

    Attributes:
      eqn: the equation.
      inputs: its operands.
      scope: where its jaxpr is.
      shapes: shapes of its results.
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
        """Return the shape of the first result; () if there is none."""
        return self.shapes[0] if self.shapes else ()

    def enter(self) -> Scope:
        """Return the scope, with its path extended by the equation's enclosing modules."""
        names = str(self.eqn.source_info.name_stack).split('/')
        names = [name for name in names if name and '->' not in name]  # jnp.einsum adds its own
        return self.scope._replace(path='/'.join(filter(None, [self.scope.path, *names])))

    def enter_call(self) -> Scope:
        """Return the scope of a jaxpr that this equation runs; only records need the line."""
        scope = self.enter()
        return scope._replace(frame=self.find_line()) if scope.is_recording else scope

    def find_line(self) -> str:
        """Return the source line of the equation, or of the call around it."""
        return find_line(self.eqn) or self.scope.frame


class Geometry(NamedTuple):
    """The axes of an affine map.

    Attributes:
      shape: shape of its result.
      features: the axes of the result that come from the parameters.
      contracted: the axes of the operand that it sums over.
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
      motif: from `mi.find.motifs`.
      left, right: its sides.
      shape: shape of the result.
      flops: of one execution.
      scope, source: where it is.
      count: how many equations make it, such as the terms of a convolution by shifts.
      is_absorbed: whether another product includes it.
      roots: ids of its results, one per equation, and of affine maps of them.
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
    """Two streams that are concatenated or added and then meet parameters.

    Attributes:
      kind: 'concatenation' or 'sum'.
      left, right: the arrays that meet.
      shape: shape of the affine map's result.
      features: number of its features.
      window: number of positions of a convolution's kernel.
      scope, source: where it is.
    """

    kind: str
    left: Source
    right: Source
    shape: tuple[int, ...]
    features: int
    window: int
    scope: Scope
    source: str
