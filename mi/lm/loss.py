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


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Convert nats per token to bits per byte: nats · tokens / (ln 2 · bytes)."""
    return nats_per_token * tokens / (text_bytes * math.log(2))


def even_size(tokens: int, largest: int) -> int:
    """Return the size of equal parts with at most `largest` tokens, as few of them as possible.

    The last part is padded. Parts of exactly `largest` tokens would waste work on a device that has
    few more tokens than one part.
    """
    return -(-tokens // -(-tokens // largest))


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
    tokens, chunk = targets.size, objective.chunk
    flat, ids = y.reshape(tokens, -1), targets.reshape(-1)
    if chunk == 0 or chunk >= tokens:
        # All tokens in one product.
        losses = _losses_from_logits(_logits(flat, table, bias), ids, objective)
    else:
        # One chunk of tokens after another.
        chunks = -(-tokens // chunk)
        chunk = even_size(tokens, chunk)
        padding = chunks * chunk - tokens
        flat = jnp.pad(flat, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
        ids = jnp.pad(ids, (0, padding)).reshape(chunks, chunk)

        @jax.checkpoint
        def compute_chunk(rows: tuple[Array, Array]) -> Losses:
            y, targets = rows
            return _losses_from_logits(_logits(y, table, bias), targets, objective)

        losses = jax.lax.map(compute_chunk, (flat, ids))
        losses = jax.tree.map(lambda a: a.reshape(-1)[:tokens], losses)
    return Losses(*(a.reshape(targets.shape) for a in losses))


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
