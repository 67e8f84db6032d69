"""The loss of a language model."""

import math

import optax
from jax import Array


def nats(logits: Array, targets: Array) -> Array:
    """−ln p(target) of each token, in nats: [..., V], [...] → [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """The loss of a text of so many tokens and bytes, per byte: nats · tokens / (ln 2 · bytes)."""
    return nats_per_token * tokens / (text_bytes * math.log(2))
