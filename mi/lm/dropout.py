"""Dropout of a language model."""

from typing import NamedTuple

from jax import Array

from mi.dropout import RowDropout


class Rates(NamedTuple):
    """Dropout rates of a language model.

    Attributes:
      word: rate for words. A dropped word is dropped at all its positions in a segment (Gal &
        Ghahramani, 2016).
      input: rate for the input features of the core.
      layer: rate for the features between recurrent layers, or for the residual branches of a
        Transformer.
      state: rate for the features of h_{t−1} in recurrent layers. All steps of a segment drop the
        same features.
      attention: rate for the attention weights.
      output: rate for the output features of the core.
      locked: whether `input`, `layer` and `output` drop the same features at all steps of a
        segment, as in AWD-LSTM (Merity et al., 2018).
    """

    word: float = 0.0
    input: float = 0.0
    layer: float = 0.0
    state: float = 0.0
    attention: float = 0.0
    output: float = 0.0
    locked: bool = False


def drop(rate: float, rates: Rates, x: Array, train: bool, time: int = 0) -> Array:
    """Apply dropout to the features of x.

    Args:
      rate: fraction of the features to drop.
      rates: dropout rates of the model. Only `locked` is used.
      x: array [T, B, features], or [B, T, features] if `time` is 1.
      train: whether to drop features. Otherwise, x is returned unchanged.
      time: axis of the steps.
    """
    shared_axes = (time,) if rates.locked else ()
    dropout = RowDropout(rate, row_axis=1 - time, shared_axes=shared_axes)
    return dropout(x, deterministic=not train)
