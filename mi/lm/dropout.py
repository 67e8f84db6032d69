"""Dropout of a language model."""

from typing import NamedTuple

from jax import Array

from mi.dropout import RowDropout


class Rates(NamedTuple):
    """Dropout rates.

    Attributes:
      word: rate of words, dropped at all their positions in a segment (Gal & Ghahramani, 2016).
      input: rate of the core's input features.
      layer: rate of the features between recurrent layers, or of a Transformer's residual branches.
      state: rate of the features of h_{t−1} in recurrent layers; a segment drops the same ones at
        all steps.
      attention: rate of the attention weights.
      output: rate of the core's output features.
      locked: whether input, layer and output drop the same features at all steps of a segment, as
        in AWD-LSTM (Merity et al., 2018).
    """

    word: float = 0.0
    input: float = 0.0
    layer: float = 0.0
    state: float = 0.0
    attention: float = 0.0
    output: float = 0.0
    locked: bool = False


def drop(rate: float, rates: Rates, x: Array, train: bool, time: int = 0) -> Array:
    """Return x with features dropped; if locked, the same ones at all steps.

    Args:
      rate: share of the features.
      rates: rates of the model; only `locked` is used.
      x: [T, B, features], or [B, T, features] with `time` 1.
      train: whether to drop features.
      time: axis of the steps.
    """
    shared_axes = (time,) if rates.locked else ()
    dropout = RowDropout(rate, row_axis=1 - time, shared_axes=shared_axes)
    return dropout(x, deterministic=not train)
