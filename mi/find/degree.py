"""Polynomial degrees of the outputs in each stream."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_DEGREE = 4  # differences of a higher order are lost in rounding errors
TOLERANCE = 1e-3  # of the largest term of a difference, in f32


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of the function.

    Attributes:
      name: path of the output in the output tree, or '' if the tree is a single array.
      shape: shape of the output.
      degrees: upper bound of the polynomial degree in each stream, which can be infinite.
      is_confirmed: whether finite differences at random points agree, or None if they were not
        computed.
    """

    name: str
    shape: tuple[int, ...]
    degrees: Mapping[str, float]
    is_confirmed: bool | None = None

    def describe(self) -> str:
        """Describe the form of the output, such as 'bi-affine in x and z'."""
        used = {name: degree for name, degree in self.degrees.items() if degree}
        affine = [name for name, degree in used.items() if degree == 1]
        polynomial = {name: degree for name, degree in used.items() if 1 < degree < math.inf}
        unbounded = [name for name, degree in used.items() if degree == math.inf]
        unused = [name for name in self.degrees if name not in used]

        # One phrase per kind of stream.
        phrases = []
        if len(used) == 2 and len(affine) == 2:
            phrases.append(f'bi-affine in {affine[0]} and {affine[1]}')
        elif affine:
            phrases += [f'affine in {name}' for name in affine]
        phrases += [
            f'polynomial of degree ≤ {int(degree)} in {name}' for name, degree in polynomial.items()
        ]
        phrases += [f'not polynomial in {name}' for name in unbounded]
        phrases += [f'independent of {name}' for name in unused]
        return ', '.join(phrases)


def confirm_outputs(
    function: Callable[..., Any],
    params: Any,
    streams: Mapping[str, Any],
    outputs: list[Output],
    seed: int = 0,
) -> list[Output]:
    """Check degrees by executing the function and taking finite differences along random lines.

    Along a line, the differences of order d + 1 of a polynomial of degree d are zero.
    """
    rng = np.random.default_rng(seed)
    params, streams = jax.tree.map(functools.partial(_draw, rng), (params, dict(streams)))
    verdicts = [output.is_confirmed for output in outputs]
    for name in streams:
        # The highest order that a bounded degree of this stream needs.
        degrees = [output.degrees[name] for output in outputs]
        order = int(max((d for d in degrees if d <= MAX_DEGREE), default=-1)) + 1
        if not order or not _has_floats(streams[name]):
            continue
        direction = jax.tree.map(functools.partial(_draw_direction, rng), streams[name])

        def evaluate(step: int, name: str = name, direction: Any = direction) -> list[Any]:
            moved = jax.tree.map(lambda x, v: x + step * v, streams[name], direction)
            return jax.tree.leaves(function(params, **{**streams, name: moved}))

        # An output is confirmed if no stream contradicts its degree.
        values = [evaluate(step) for step in range(order + 1)]
        for index, degree in enumerate(degrees):
            if degree <= MAX_DEGREE:
                terms = [value[index] for value in values[: int(degree) + 2]]
                is_zero = _is_zero_difference(terms)
                verdicts[index] = is_zero and verdicts[index] is not False
    return [
        dataclasses.replace(output, is_confirmed=verdict)
        for output, verdict in zip(outputs, verdicts, strict=True)
    ]


def _is_zero_difference(terms: list[Any]) -> bool:
    """Return whether Σ (−1)^i C(n, i) f_i is negligible relative to its largest term."""
    order = len(terms) - 1
    weighted = [
        (-1) ** i * math.comb(order, i) * np.asarray(term, np.float64)
        for i, term in enumerate(terms)
    ]
    scale = max((np.abs(term).max(initial=0.0) for term in weighted), default=0.0)
    difference = np.abs(sum(weighted)).max(initial=0.0)
    return bool(difference <= TOLERANCE * max(scale, 1e-30))


def _draw(rng: np.random.Generator, leaf: Any) -> Any:
    """Replace a shape with random numbers, but leave an array unchanged."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _draw_direction(rng: np.random.Generator, leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)


def _has_floats(tree: Any) -> bool:
    return any(
        jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) for leaf in jax.tree.leaves(tree)
    )
