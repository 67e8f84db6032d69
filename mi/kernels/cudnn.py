"""The LSTM of NVIDIA's cuDNN, which runs all steps in one call of `jax.experimental.rnn`.

Shapes: T steps, B sequences, n input features, H state features.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap
from jax.experimental import rnn

from mi.kernels.lstm import Carry, LSTMWeights


class _Residuals(NamedTuple):
    """The arrays that the backward pass reads.

    Attributes:
      call: residuals of `rnn.lstm_fwd`, starting with x [B, T, n].
      unpack_weights: the transpose of `pack_weights`, which maps its cotangent to the cotangents of
        W, U and b.
    """

    call: tuple[Array, ...]
    unpack_weights: Callable[[Array], tuple[Array, Array, Array]]


@jax.custom_vjp
def lstm(carry: Carry, x: Array, weights: LSTMWeights) -> tuple[Carry, Array]:
    """Compute `mi.cells.LSTM` in f32, sequentially under vmap. Only supports reverse mode.

    As with XLA, products are in TF32 unless jax_default_matmul_precision is 'highest'.

    Args:
      carry: the initial (c, h), each f32 [B, H].
      x: the inputs, [T, B, n].
      weights: as in `mi.kernels.lstm.lstm`.

    Returns:
      (c, h) after the last step, and h of every step [T, B, H].
    """
    return _forward(carry, x, weights)[0]


def pack_weights(W: Array, U: Array, b: Array) -> Array:
    """Return the weights as the vector that cuDNN expects, with the gates in the order i, f, j, o.

    Each matrix is flattened with its output axis first. cuDNN's second bias is zero.
    """

    def flatten(array: Array) -> Array:
        i, f, o, j = jnp.split(array, 4, axis=-1)
        return jnp.concatenate([i, f, j, o], axis=-1).T.reshape(-1)

    return jnp.concatenate([flatten(W), flatten(U), flatten(b), jnp.zeros_like(b)])


def _forward(
    carry: Carry, x: Array, weights: LSTMWeights
) -> tuple[tuple[Carry, Array], _Residuals]:
    @sequential_vmap
    def run_layer(
        cell: Array, hidden: Array, x: Array, weight_vector: Array
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        lengths = jnp.full(x.shape[0], x.shape[1], jnp.int32)
        layer = _describe_layer(x.shape[-1], hidden.shape[-1])
        return rnn.lstm_fwd(x, hidden[None], cell[None], weight_vector, lengths, *layer)

    weight_vector, unpack_weights = jax.vjp(pack_weights, *weights)
    (outputs, hidden, cell), residuals = run_layer(*carry, x.swapaxes(0, 1), weight_vector)
    return ((cell[0], hidden[0]), outputs.swapaxes(0, 1)), _Residuals(residuals, unpack_weights)


def _backward(
    residuals: _Residuals, cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, LSTMWeights]:
    (cell_cotangent, hidden_cotangent), output_cotangent = cotangents

    @sequential_vmap
    def run_layer(
        residuals: tuple[Array, ...], outputs: Array, hidden: Array, cell: Array
    ) -> tuple[Array, Array, Array, Array]:
        layer = _describe_layer(residuals[0].shape[-1], hidden.shape[-1])
        return rnn.lstm_bwd(*layer, residuals, (outputs, hidden[None], cell[None]))[:4]

    x_cotangent, hidden_cotangent, cell_cotangent, vector_cotangent = run_layer(
        residuals.call, output_cotangent.swapaxes(0, 1), hidden_cotangent, cell_cotangent
    )
    return (
        (cell_cotangent[0], hidden_cotangent[0]),
        x_cotangent.swapaxes(0, 1),
        LSTMWeights(*residuals.unpack_weights(vector_cotangent)),
    )


def _describe_layer(input_size: int, hidden_size: int) -> tuple[int, int, int, float, bool, None]:
    """Return cuDNN's description of the layer: sizes, layers, dropout, directions and precision."""
    return input_size, hidden_size, 1, 0.0, False, None


lstm.defvjp(_forward, _backward)
