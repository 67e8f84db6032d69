"""The losses of a softmax over a vocabulary, computed from the features before the logits.

Shapes: y [..., E], output embedding [V, E], bias [V], targets [...].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mi.kernels.linear import linear


class Losses(NamedTuple):
    """The losses of each token.

    Attributes:
      nats: −ln p(target), which is reported.
      objective: the loss that is minimized.
    """

    nats: Array
    objective: Array


class Objective(NamedTuple):
    """Options of the loss, see `softmax_losses`.

    Attributes:
      label_smoothing, z_loss: weights of the terms beside −ln p(target).
      chunk: tokens whose logits are in memory simultaneously; 0 for all. The backward pass then
        recomputes the logits, which is one more product.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0


def nats(logits: Array, targets: Array) -> Array:
    """Compute −ln p(target) of each token, in nats: logits [..., V], targets [...] → [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Convert nats per token to bits per byte: nats · tokens / (ln 2 · bytes)."""
    return nats_per_token * num_tokens / (num_bytes * math.log(2))


def even_size(num_tokens: int, max_size: int) -> int:
    """Return the size of equal parts with at most `max_size` tokens, as few of them as possible.

    The last part is padded. Parts of exactly `max_size` tokens would waste work on a device that
    has few more tokens than one part.
    """
    return -(-num_tokens // -(-num_tokens // max_size))


def softmax_losses(
    y: Array,
    table: Array,
    bias: Array,
    targets: Array,
    objective: Objective,
) -> Losses:
    """Compute the losses of a softmax over all words, with products in y's dtype.

        logits = y · tableᵀ + bias
        objective = (1 − s) nats + s mean_v(−ln p(v)) + w (ln Z)²

    with s the label smoothing (Szegedy et al., 2016), w the z-loss (Chowdhery et al., 2022) and Z
    the sum of the exponentials of the logits.

    Args:
      y: [..., E].
      table: [V, E].
      bias: [V].
      targets: ids [...].
      objective: s, w and the chunk size.
    """
    num_tokens, chunk_size = targets.size, objective.chunk
    flat_features, flat_targets = y.reshape(num_tokens, -1), targets.reshape(-1)
    if chunk_size == 0 or chunk_size >= num_tokens:
        # All tokens in one product.
        losses = _losses_from_logits(_logits(flat_features, table, bias), flat_targets, objective)
    else:
        # One chunk of tokens after another.
        num_chunks = -(-num_tokens // chunk_size)
        chunk_size = even_size(num_tokens, chunk_size)
        padding = num_chunks * chunk_size - num_tokens
        feature_chunks = jnp.pad(flat_features, ((0, padding), (0, 0)))
        feature_chunks = feature_chunks.reshape(num_chunks, chunk_size, -1)
        target_chunks = jnp.pad(flat_targets, (0, padding)).reshape(num_chunks, chunk_size)

        @jax.checkpoint
        def compute_chunk(chunk: tuple[Array, Array]) -> Losses:
            y, targets = chunk
            return _losses_from_logits(_logits(y, table, bias), targets, objective)

        losses = jax.lax.map(compute_chunk, (feature_chunks, target_chunks))
        losses = jax.tree.map(lambda array: array.reshape(-1)[:num_tokens], losses)
    return Losses(*(array.reshape(targets.shape) for array in losses))


def _logits(y: Array, table: Array, bias: Array) -> Array:
    logits = linear(y, table.T.astype(y.dtype), out_dtype=jnp.float32)
    return logits + bias.reshape(1, -1).astype(jnp.float32)


def _losses_from_logits(logits: Array, targets: Array, options: Objective) -> Losses:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = objective = log_z - target_logits
    if options.label_smoothing:
        uniform_nats = log_z - logits.mean(axis=-1)
        objective = (1 - options.label_smoothing) * nats + options.label_smoothing * uniform_nats
    if options.z_loss:
        objective = objective + options.z_loss * log_z**2
    return Losses(nats, objective)
