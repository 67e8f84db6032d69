"""What is dropped in training."""

from typing import NamedTuple

from jax import Array

from mi.dropout import RowDropout


class Rates(NamedTuple):
    """Rates of dropout, by what is dropped.

    Attributes:
      word: words, at all their places in a segment (Gal & Ghahramani, 2016).
      input: features of what enters the core.
      layer: features between recurrent layers; in a Transformer those of what each branch adds.
      state: features of h_{t−1} in recurrent layers, the same at all steps of a segment.
      attention: weights of attention.
      output: features of what leaves the core.
      locked: whether input, layer and output drop the same features at all steps of a segment, as
        AWD-LSTM does (Merity et al., 2018).
    """

    word: float = 0.0
    input: float = 0.0
    layer: float = 0.0
    state: float = 0.0
    attention: float = 0.0
    output: float = 0.0
    locked: bool = False


def drop(rate: float, rates: Rates, x: Array, train: bool, time: int = 0) -> Array:
    """Return x with features dropped, the same along the axis `time` where locked.

    Args:
      rate: share of the features.
      rates: for whether they are locked.
      x: [T, B, features], or [B, T, features] with `time` 1.
      train: whether to drop any.
      time: axis of the steps.
    """
    shared_axes = (time,) if rates.locked else ()
    dropout = RowDropout(rate, row_axis=1 - time, shared_axes=shared_axes)
    return dropout(x, deterministic=not train)
