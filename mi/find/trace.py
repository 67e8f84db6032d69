"""The state of an analysis: identities of values, and records of products and meetings."""

import itertools
from collections.abc import Hashable, Sequence

from mi.find import motifs
from mi.find.motifs import Contraction
from mi.find.primitives import count_flops, is_integer
from mi.find.records import Equation, Geometry, Meeting, Product
from mi.find.values import Source, Value, blend


class Trace:
    """A trace of the analysis, which assigns ids to values and collects products and notes.

    Attributes:
      products, meetings: the records, in the order of the equations.
      notes: operations that could not be analyzed, as the keys of a dict.
      flops: FLOPs so far, counting one iteration of a while loop.
    """

    def __init__(self, num_streams: int):
        self.products: list[Product] = []
        self.meetings: list[Meeting] = []
        self.notes: dict[str, None] = {}
        self.flops = 0
        self._num_streams = num_streams
        self._ids = itertools.count(1)
        self._interned: dict[Hashable, int] = {}
        self._merged: dict[Hashable, int] = {}  # motif, place and sides → index of a product

    # ------------------------------------------------------------------------- identities

    def make_id(self) -> int:
        """Return a new id."""
        return next(self._ids)

    def make_value(self, shape: Sequence[int], streams: int, has_params: bool = False) -> Value:
        """Return the value for an input of the function."""
        degrees = tuple(float(streams >> bit & 1) for bit in range(self._num_streams))
        return self.identify(Value(tuple(shape), streams, has_params, degrees))

    def make_constant(
        self, shape: tuple[int, ...], has_params: bool = False, is_literal: bool = False
    ) -> Value:
        """Return a value that does not depend on any stream."""
        degrees = (0.0,) * self._num_streams
        return Value(shape, 0, has_params, degrees, is_literal=is_literal)

    def identify(self, value: Value) -> Value:
        """Return the value with a new identity, as a separate array."""
        return value.identify(self.make_id())

    def intern(self, *key: Hashable) -> int:
        """Return the id of a key, which is the same for equal keys."""
        if key not in self._interned:
            self._interned[key] = self.make_id()
        return self._interned[key]

    def broadcast(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Broadcast a value to the shape of an elementwise result."""
        if value.shape == shape:
            return value
        base = self.intern('base', value.base, 'broadcast', shape)
        return value._replace(shape=shape, base=base, parts=())

    def inherit_identity(self, value: Value, inputs: Sequence[Value]) -> Value:
        """Give a value the identity of its input, if it is an elementwise function of one array."""
        data = [operand for operand in inputs if operand.streams]
        first = data[0]
        for operand in data[1:]:
            if operand.base == first.base or first.origin in operand.reduced:
                continue
            if operand.origin in first.reduced:
                first = operand
            else:
                return self.identify(value)
        first = self.broadcast(first, value.shape)
        return value._replace(base=first.base, origin=first.origin, root=first.root)

    def blur(self, equation: Equation) -> list[Value]:
        """Return conservative results of a call that cannot be analyzed, and add a note."""
        self.notes[f'{equation.name}: its products cannot be read'] = None
        return [self.identify(blend(equation.inputs, shape)) for shape in equation.shapes]

    # ------------------------------------------------------------------------- products

    def record_product(
        self, equation: Equation, value: Value, contraction: Contraction | None = None
    ) -> Value:
        """Record a product, update the records that it includes, and return its result.

        Args:
          equation: the equation, whose inputs are the two sides.
          value: what is known about the result.
          contraction: the axes of the product, or None for an elementwise product.
        """
        left, right = equation.inputs
        motif = motifs.name_product(left, right, contraction)
        index = self.record(equation, motif)
        for weights in (left, right):
            if weights.is_softmax:
                for division in weights.pending:
                    self.products[division].is_absorbed = True
                if motif == motifs.MIX:
                    for scores in weights.products | weights.mapped_products:
                        self.products[scores].motif = motifs.SCORES
        return self.finish_product(value, index)

    def finish_product(self, value: Value, index: int | None) -> Value:
        """Return the result of a product, adding its id to the record."""
        value = self.identify(value)
        if index is None:
            return value
        self.products[index].roots += (value.root,)
        return value._replace(products=frozenset([index]))

    def record(self, equation: Equation, motif: str) -> int | None:
        """Record the product of two inputs and return its index.

        Products of the same two arrays at the same place are merged. Products of integers are not
        recorded.
        """
        eqn, inputs, shape = equation.eqn, equation.inputs, equation.shape
        if not equation.scope.is_recording or is_integer(eqn.outvars[0]) or 0 in shape:
            return None
        left, right = inputs
        scope = equation.enter()
        flops = scope.num_devices * count_flops(eqn, inputs, shape)
        key = motif, scope.path, scope.times, scope.is_in_while, *sorted((left.root, right.root))

        # Another term of a product that is recorded.
        index = self._merged.get(key)
        if index is not None and left.base != right.base and motif != motifs.ACTIVATION:
            product = self.products[index]
            product.count += 1
            product.flops += flops
            is_weighted = any(side.is_softmax or side.linear for side in inputs)
            if is_weighted and any(side.is_window for side in inputs):
                product.motif = motifs.DYNAMIC_CONVOLUTION
            return index

        # A new one.
        self._merged[key] = len(self.products)
        source = equation.find_line()
        self.products.append(
            Product(equation.name, motif, left, right, shape, flops, scope, source)
        )
        return len(self.products) - 1

    # ------------------------------------------------------------------------- meetings

    def record_parts(self, equation: Equation, value: Value, geometry: Geometry) -> None:
        """Record the pairs of concatenated arrays that are combined by an affine map."""
        for left, right in itertools.combinations(value.parts, 2):
            self.record_meetings(equation, 'concatenation', ((left,), (right,)), geometry)

    def record_meetings(
        self,
        equation: Equation,
        kind: str,
        sides: tuple[tuple[Source, ...], tuple[Source, ...]],
        geometry: Geometry,
    ) -> None:
        """Record the pairs of arrays, one from each side, that are combined by an affine map.

        Args:
          equation: the affine map, or the sum of two affine maps.
          kind: 'concatenation' or 'sum'.
          sides: the arrays of each side.
          geometry: axes of the affine map.
        """
        if not equation.scope.is_recording:
            return
        is_residual = kind == 'sum' and sum(map(len, sides)) > 2
        pairs = set()
        for left, right in itertools.product(*sides):
            pair = frozenset((left.root, right.root))
            if pair in pairs or not _are_different(left, right, is_residual):
                continue
            pairs.add(pair)
            scope, source = equation.enter(), equation.find_line()
            size, window = geometry.num_features, geometry.window
            meeting = Meeting(kind, left, right, geometry.shape, size, window, scope, source)
            self.meetings.append(meeting)


def _are_different(left: Source, right: Source, is_residual: bool) -> bool:
    """Return whether two arrays depend on different streams, or one depends on a loop's carry.

    In a residual sum, arrays do not count as different if one depends on all streams of the other.
    """
    if left.root == right.root:
        return False
    is_nested = left.streams | right.streams in (left.streams, right.streams)
    is_equal = left.streams == right.streams or (is_residual and is_nested)
    return not is_equal or left.is_carried or right.is_carried
