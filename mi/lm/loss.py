"""The loss of a language model, from what its logits are linear in.

Shapes: y [..., E], output embedding [V, E], bias [V], targets [...].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mi.kernels.linear import linear


class Losses(NamedTuple):
    """What each token costs.

    Attributes:
      nats: −ln p(target): what is reported.
      objective: what is minimised.
    """

    nats: Array
    objective: Array


def nats(logits: Array, targets: Array) -> Array:
    """−ln p(target) of each token, in nats: [..., V], [...] → [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """The loss of a text of so many tokens and bytes, per byte: nats · tokens / (ln 2 · bytes)."""
    return nats_per_token * tokens / (text_bytes * math.log(2))


def even_size(tokens: int, largest: int) -> int:
    """Return the size of as few equal parts as have at most `largest` tokens, the last one padded.

    Parts of `largest` would compute for nothing where a device has little more than one of them.
    """
    return -(-tokens // -(-tokens // largest))


def softmax_losses(
    y: Array,
    table: Array,
    bias: Array,
    targets: Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> Losses:
    """The losses of a softmax over all words, logits = y · tableᵀ + bias, products in y's dtype.

        objective = (1 − s) nats + s mean_v(−ln p(v)) + w (ln Z)²

    with s the label smoothing (Szegedy et al., 2016), w the z-loss (Chowdhery et al., 2022) and Z
    the sum of the exponentials of the logits.

    Args:
      y: [..., E].
      table: [V, E].
      bias: [V].
      targets: [...], ids.
      label_smoothing, z_loss: s and w.
      chunk: how many tokens' logits are there at once, forward and backward, where they are made
        anew: one product more; 0 for all of them.
    """
    tokens = targets.size
    of_logits = functools.partial(_losses, label_smoothing=label_smoothing, z_loss=z_loss)
    flat, ids = y.reshape(tokens, -1), targets.reshape(-1)
    if chunk == 0 or chunk >= tokens:
        losses = of_logits(_logits(flat, table, bias), ids)
    else:
        chunks = -(-tokens // chunk)
        chunk = even_size(tokens, chunk)
        padding = chunks * chunk - tokens
        rows = jnp.pad(flat, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
        of_rows = jnp.pad(ids, (0, padding)).reshape(chunks, chunk)

        @jax.checkpoint
        def one(row: tuple[Array, Array]) -> Losses:
            return of_logits(_logits(row[0], table, bias), row[1])

        losses = jax.lax.map(one, (rows, of_rows))
        losses = jax.tree.map(lambda a: a.reshape(-1)[:tokens], losses)
    return Losses(*(a.reshape(targets.shape) for a in losses))


def _logits(y: Array, table: Array, bias: Array) -> Array:
    logits = linear(y, table.T.astype(y.dtype), out_dtype=jnp.float32)
    return logits + bias.reshape(1, -1).astype(jnp.float32)


def _losses(logits: Array, targets: Array, label_smoothing: float, z_loss: float) -> Losses:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    objective = of_target = log_z - own
    if label_smoothing:
        spread = log_z - logits.mean(axis=-1)
        objective = (1 - label_smoothing) * of_target + label_smoothing * spread
    if z_loss:
        objective = objective + z_loss * log_z**2
    return Losses(of_target, objective)
