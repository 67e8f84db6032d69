"""Rules that name the motif of a product. The first rule that matches applies.

| motif | rule |
| --- | --- |
| activation | both sides are elementwise functions of the same array (x², SiLU, GELU), or both are statistics of the same array |
| normalization | one side is a function of statistics of the other: x · rsqrt(mean x²), (x − mean x) / std x, eˣ / Σ eˣ |
| routing | one side holds parameters, or entries of an array, that are selected by data |
| dynamic convolution | weights that depend on data multiply overlapping slices of the other side; or a convolution whose kernel depends on data |
| attention mix | one side is a softmax whose logits are a product, which is then named attention scores; or a softmax is contracted over positions |
| mixture of experts | one side is any other softmax |
| gated recurrence | one side is bounded by a sigmoid or tanh, and one depends on the carry of the enclosing loop; or an elementwise product with the carry itself |
| gate | one side is bounded by a sigmoid, or exactly one by a tanh |
| bilinear pooling | both sides are bounded by a tanh |
| hypernetwork | one side is a generated matrix: a contraction over one feature axis of an affine map (or of a nonlinearity of it) that keeps another |
| bilinear pooling | an outer product, or a contraction of two affine maps |
| scale | elementwise; one side is 1 + an affine map |
| gate | elementwise; exactly one side is an activation of an affine map |
| bilinear pooling | elementwise; both sides are affine maps |
| scale | elementwise; exactly one side is an affine map |
| unnamed | everything else |

Activations are recorded separately, because they do not combine two streams. A product with a mask
from a comparison is a selection and is not recorded.
"""  # noqa: E501 - a table

from typing import NamedTuple

from mi.find.values import Value

ACTIVATION = 'activation'
NORMALIZATION = 'normalization'
ROUTING = 'routing'
DYNAMIC_CONVOLUTION = 'dynamic convolution'
SCORES = 'attention scores'
MIX = 'attention mix'
EXPERTS = 'mixture of experts'
GATED_RECURRENCE = 'gated recurrence'
GATE = 'gate'
HYPERNETWORK = 'hypernetwork'
SCALE = 'scale'
BILINEAR = 'bilinear pooling'
UNNAMED = 'unnamed'
MOTIFS = (
    NORMALIZATION, ROUTING, DYNAMIC_CONVOLUTION, SCORES, MIX, EXPERTS, GATED_RECURRENCE, GATE,
    HYPERNETWORK, SCALE, BILINEAR, UNNAMED,
)  # fmt: skip


class Contraction(NamedTuple):
    """The axes of a contraction.

    Attributes:
      left, right: the contracted axes of both sides.
      left_batch, right_batch: the batch axes, which both sides share in the result.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    left_batch: tuple[int, ...]
    right_batch: tuple[int, ...]


def name_product(left: Value, right: Value, contraction: Contraction | None) -> str:
    """Return the motif of a product, where `contraction` is None if it is elementwise."""
    sides = left, right
    if left.is_chosen or right.is_chosen:
        return ROUTING
    if contraction and any(
        side.is_mask and axes
        for side, axes in ((left, contraction.left), (right, contraction.right))
    ):
        return ROUTING
    if is_dynamic_convolution(left, right) or is_dynamic_convolution(right, left):
        return DYNAMIC_CONVOLUTION
    if any(side.is_softmax for side in sides):
        weights = left if left.is_softmax else right
        is_product = weights.products or weights.mapped_products
        return MIX if is_product or _mixes_positions(left, right, contraction) else EXPERTS

    # Bounded sides.
    squashes = {left.squash, right.squash}
    is_gate = 'sigmoid' in squashes or squashes == {'', 'tanh'}
    is_scaled_carry = contraction is None and (left.is_carry or right.is_carry)
    if is_scaled_carry or (squashes != {''} and (left.carried or right.carried)):
        return GATED_RECURRENCE
    if is_gate:
        return GATE
    if squashes == {'tanh'}:
        return BILINEAR

    # Affine maps.
    if contraction:
        generated = [
            _is_generated(left, contraction.left, contraction.left_batch),
            _is_generated(right, contraction.right, contraction.right_batch),
        ]
        if sum(generated) == 1:
            return HYPERNETWORK
        is_outer = not contraction.left
        return BILINEAR if is_outer or (left.linear and right.linear) else UNNAMED
    if any(side.is_shifted for side in sides):
        return SCALE
    if left.is_activation != right.is_activation:
        return GATE
    if left.linear and right.linear:
        return BILINEAR
    return SCALE if left.linear or right.linear else UNNAMED


def is_dynamic_convolution(weights: Value, windows: Value) -> bool:
    """Return whether weights that depend on data multiply several windows of the other side."""
    return windows.num_windows > 1 and bool(weights.is_softmax or weights.linear)


def _mixes_positions(left: Value, right: Value, contraction: Contraction | None) -> bool:
    """Return whether a softmax is contracted with axes that are not features of an affine map."""
    if contraction is None:
        return False
    operand, axes = (right, contraction.right) if left.is_softmax else (left, contraction.left)
    return bool(axes) and not any(axis in operand.features for axis in axes)


def _is_generated(side: Value, contracted: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    """Return whether a side is a matrix generated by an affine map, or by a nonlinearity of one."""
    free_axes = [
        axis
        for axis in side.features
        if axis not in contracted and axis not in batch and side.shape[axis] > 1
    ]
    is_map = bool(side.linear) or side.is_activation
    return is_map and bool(free_axes) and any(axis in side.features for axis in contracted)
