"""What is dropped in training."""

from typing import NamedTuple

from flax import linen as nn
from jax import Array


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
    """x with features dropped, the same along the axis `time` where locked."""
    locked = (time,) if rates.locked else ()
    return nn.Dropout(rate, broadcast_dims=locked)(x, deterministic=not train)
