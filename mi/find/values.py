"""Abstract values, which hold the known properties of an array without its entries."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

INFINITY = math.inf
Streams = int  # bit i is set if the array depends on stream i
NO_IDS: frozenset[int] = frozenset()


class Source(NamedTuple):
    """An array that is mapped linearly by parameters or constants.

    Attributes:
      root: id of the array.
      streams: bit mask of the streams that the array depends on.
      size: number of features that the map contracts.
      is_carried: whether the array depends on the carry of an enclosing loop.
    """

    root: int
    streams: Streams
    size: int
    is_carried: bool = False


class Value(NamedTuple):
    """An abstract array.

    Attributes:
      shape: shape of the array.
      streams: bit mask of the streams that it depends on.
      has_params: whether it depends on parameters.
      degrees: upper bound of its polynomial degree in each stream, which can be infinite.
      base: id of the array that it is an elementwise function of, entry by entry.
      origin: like `base`, but preserved by reshapes, transposes and broadcasts.
      root: like `origin`, but also preserved by slices.
      reduced: the origins of the arrays whose statistics it is a function of.
      squash: 'sigmoid' or 'tanh' if it is bounded by one, or else ''.
      is_exp: whether it is the exponential of something.
      is_softmax: whether it is a softmax.
      is_literal: whether it is a constant whose entries are equal.
      is_mask: whether its entries are the zeros and ones of a comparison.
      is_choice: whether it depends on indices from a top-k, a sort or an argmax.
      is_chosen: whether it holds parameters that were selected by such indices.
      linear: the arrays that it is an affine map of, if it is one.
      features: axes of the affine map that come from the parameters.
      is_shifted: whether it is an affine map plus a constant, as in 1 + γ(z).
      is_activation: whether it is an elementwise nonlinear function of an affine map.
      is_window: whether it is a slice over most of an axis, as in a convolution by shifts.
      num_windows: number of such slices that were concatenated.
      parts: the arrays that were concatenated along `parts_axis`.
      parts_axis: negative axis of the concatenation, counted from the end.
      products: indices of the products that reach it through elementwise operations and sums.
      mapped_products: indices of the products that reach it through one more affine map.
      is_carry: whether it is itself the carry of a loop.
      carried: ids of the loops whose carry it depends on.
      pending: indices of the softmax divisions that a later product can absorb.
      ref: id of the mutable array that it refers to, or 0 if it is not a reference.
    """

    shape: tuple[int, ...]
    streams: Streams = 0
    has_params: bool = False
    degrees: tuple[float, ...] = ()
    base: int = 0
    origin: int = 0
    root: int = 0
    reduced: frozenset[int] = NO_IDS
    squash: str = ''
    is_exp: bool = False
    is_softmax: bool = False
    is_literal: bool = False
    is_mask: bool = False
    is_choice: bool = False
    is_chosen: bool = False
    linear: tuple[Source, ...] = ()
    features: tuple[int, ...] = ()
    is_shifted: bool = False
    is_activation: bool = False
    is_window: bool = False
    num_windows: int = 0
    parts: tuple[Source, ...] = ()
    parts_axis: int = 0
    products: frozenset[int] = NO_IDS
    mapped_products: frozenset[int] = NO_IDS
    is_carry: bool = False
    carried: frozenset[int] = NO_IDS
    pending: frozenset[int] = NO_IDS
    ref: int = 0

    def identify(self, value_id: int) -> 'Value':
        """Return the value with `value_id` as its identity, as a separate array."""
        return self._replace(base=value_id, origin=value_id, root=value_id)


def max_degrees(values: Sequence[Value]) -> tuple[float, ...]:
    """Return the degrees of a sum, which are the largest in each stream."""
    return tuple(max(column) for column in zip(*(value.degrees for value in values), strict=True))


def add_degrees(left: Value, right: Value) -> tuple[float, ...]:
    """Return the degrees of a product, which are the sums in each stream."""
    return tuple(a + b for a, b in zip(left.degrees, right.degrees, strict=True))


def unbound_degrees(values: Sequence[Value]) -> tuple[float, ...]:
    """Return the degrees of a function that is not a polynomial."""
    return tuple(INFINITY if degree else 0 for degree in max_degrees(values))


def unbind(values: Iterable[Value]) -> list[Value]:
    """Return the values with the degrees of functions that are not polynomials."""
    return [value._replace(degrees=unbound_degrees([value])) for value in values]


def blend(values: Sequence[Value], shape: tuple[int, ...], is_polynomial: bool = False) -> Value:
    """Return an array of this shape that depends on the values in an unknown way."""
    streams, has_params, is_choice, carried = 0, False, False, NO_IDS
    for value in values:
        streams |= value.streams
        is_choice = is_choice or value.is_choice
        has_params = has_params or value.has_params
        if value.carried:
            carried |= value.carried
    degrees = max_degrees(values) if is_polynomial else unbound_degrees(values)
    return Value(shape, streams, has_params, degrees, carried=carried, is_choice=is_choice)


def unite(values: Iterable[Value], field: str) -> frozenset[int]:
    """Return the union of a field, which is a set of ids, over all values."""
    return NO_IDS.union(*(getattr(value, field) for value in values))


def get_sources(value: Value) -> tuple[Source, ...]:
    """Return the arrays that a value is an affine map of, or the value itself if it is not one."""
    if value.linear:
        return value.linear
    size = value.shape[-1] if value.shape else 1
    return (Source(value.root, value.streams, size, bool(value.carried)),)
