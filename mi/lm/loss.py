"""Losses of a softmax over a vocabulary, computed from the features y before the logits.

Shapes: y [..., E], output embedding [V, E], bias [V], targets [...].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.kernels.linear import linear


class Losses(NamedTuple):
    """Losses of each token.

    Attributes:
      nats: the reported loss, −ln p(target).
      objective: the minimized loss.
    """

    nats: Array
    objective: Array


class Objective(NamedTuple):
    """Options of the loss, see `softmax_losses`.

    Attributes:
      label_smoothing: weight s of label smoothing.
      z_loss: weight w of the z-loss.
      chunk: maximum number of tokens whose logits are in memory simultaneously, or 0 for all
        tokens. With chunks, the backward pass recomputes the logits at the cost of one more
        product.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Convert nats per token to bits per byte: nats · tokens / (ln 2 · bytes)."""
    return nats_per_token * num_tokens / (num_bytes * math.log(2))


def even_size(num_tokens: int, max_size: int) -> int:
    """Return the size of the fewest equal parts that have at most `max_size` tokens each.

    The last part is padded. Equal parts keep the padding small: parts of exactly `max_size` tokens
    would waste almost a whole part on a device that has slightly more than `max_size` tokens.
    """
    return -(-num_tokens // -(-num_tokens // max_size))


def softmax_losses(
    y: Array,
    table: Array,
    bias: Array,
    targets: Array,
    objective: Objective,
) -> Losses:
    """Compute the losses of a softmax over all words, with products in the dtype of y.

        logits = y · tableᵀ + bias
        objective = (1 − s) nats + s mean_v(−ln p(v)) + w (ln Z)²

    where s is the label smoothing (Szegedy et al., 2016), w the weight of the z-loss (Chowdhery et
    al., 2022), and Z the sum of the exponentials of the logits.

    Args:
      y: features [..., E].
      table: output embedding [V, E].
      bias: bias of the logits [V].
      targets: ids of the targets [...].
      objective: s, w and the chunk size.
    """
    num_tokens, chunk_size = targets.size, objective.chunk
    flat_features, flat_targets = y.reshape(num_tokens, -1), targets.reshape(-1)
    if chunk_size == 0 or chunk_size >= num_tokens:
        # All tokens in one product.
        losses = losses_from_logits(_logits(flat_features, table, bias), flat_targets, objective)
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
            return losses_from_logits(_logits(y, table, bias), targets, objective)

        losses = jax.lax.map(compute_chunk, (feature_chunks, target_chunks))
        losses = jax.tree.map(lambda array: array.reshape(-1)[:num_tokens], losses)
    return Losses(*(array.reshape(targets.shape) for array in losses))


def _logits(y: Array, table: Array, bias: Array) -> Array:
    logits = linear(y, table.T.astype(y.dtype), out_dtype=jnp.float32)
    return logits + bias.reshape(1, -1).astype(jnp.float32)


def losses_from_logits(
    logits: Array,
    targets: Array,
    options: Objective,
) -> Losses:
    """Compute the losses of targets [...] from logits [..., V], see `softmax_losses`."""
    nats, log_z = _cross_entropy(logits, targets)
    objective = nats
    if options.label_smoothing:
        uniform_nats = log_z - logits.mean(axis=-1)
        objective = (1 - options.label_smoothing) * nats + options.label_smoothing * uniform_nats
    if options.z_loss:
        objective = objective + options.z_loss * log_z**2
    return Losses(nats, objective)


@jax.custom_vjp
def _cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Compute −ln p(target) and ln Z of logits [..., V], and keep only the logits for the gradient.

        d(−ln p) / d logits = p − 1[v = target],   d(ln Z) / d logits = p

    `jax.nn.logsumexp` would also keep the exponentials, an array as large as the logits. At the
    target, the gradient is computed from −ln p. Without this dependence, XLA computes −ln p at the
    end of a training step, which reports it, and keeps the logits until then.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - target_logits, log_z


_Residuals = tuple[Array, Array, Array, Array]  # logits, targets, −ln p and ln Z


def _cross_entropy_forward(logits: Array, targets: Array) -> tuple[tuple[Array, Array], _Residuals]:
    nats, log_z = _cross_entropy(logits, targets)
    return (nats, log_z), (logits, targets, nats, log_z)


def _cross_entropy_backward(
    residuals: _Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    logits, targets, nats, log_z = residuals
    nats_cotangent, log_z_cotangent = cotangents
    scale = nats_cotangent + log_z_cotangent
    logit_cotangents = scale[..., None] * jnp.exp(logits - log_z[..., None])
    at_target = nats_cotangent * jnp.expm1(-nats) + log_z_cotangent * jnp.exp(-nats)
    return jnp.put_along_axis(
        logit_cotangents, targets[..., None], at_target[..., None], axis=-1, inplace=False
    ), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
