"""The LSTM of NVIDIA's cuDNN, by `jax.experimental.rnn`: one call for all steps.

Shapes: T steps, B sequences, n input features, H state features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap
from jax.experimental import rnn

Carry = tuple[Array, Array]  # (c, h), each [B, H], f32
_Weights = tuple[Array, Array, Array]  # W, U, b as in `mi.cells.LSTM`


@jax.custom_vjp
def lstm(carry: Carry, x: Array, weights: _Weights) -> tuple[Carry, Array]:
    """Compute `mi.cells.LSTM` in f32; under vmap one call after another. Reverse mode only.

    Like XLA's, cuDNN's products are TF32 unless jax_default_matmul_precision is 'highest'.

    Args:
      carry: (c, h), each [B, H].
      x: [T, B, n].
      weights: W [n, 4H], U [H, 4H] and b [4H], gates in the order i, f, o, j.

    Returns:
      (c, h) after the last step and h of every step [T, B, H].
    """
    return _forward(carry, x, weights)[0]


def pack_weights(W: Array, U: Array, b: Array) -> Array:
    """Return the vector of weights that cuDNN reads, with gates in the order i, f, j, o.

    Matrices are flattened with their outputs first, and the second bias is zero.
    """

    def flatten(a: Array) -> Array:
        i, f, o, j = jnp.split(a, 4, axis=-1)
        return jnp.concatenate([i, f, j, o], axis=-1).T.reshape(-1)

    return jnp.concatenate([flatten(W), flatten(U), flatten(b), jnp.zeros_like(b)])


def _forward(carry: Carry, x: Array, weights: _Weights) -> tuple[tuple[Carry, Array], Any]:
    @sequential_vmap
    def run(c: Array, h: Array, x: Array, vector: Array) -> Any:
        lengths = jnp.full(x.shape[0], x.shape[1], jnp.int32)
        return rnn.lstm_fwd(
            x, h[None], c[None], vector, lengths, *_describe_layer(x.shape[-1], h.shape[-1])
        )

    vector, unpack = jax.vjp(pack_weights, *weights)
    (y, h, c), residuals = run(*carry, x.swapaxes(0, 1), vector)
    return ((c[0], h[0]), y.swapaxes(0, 1)), (residuals, unpack)


def _backward(residuals: Any, cotangents: tuple[Carry, Array]) -> tuple[Carry, Array, _Weights]:
    call_residuals, unpack = residuals
    (dc, dh), dy = cotangents

    @sequential_vmap
    def run(residuals: Any, dy: Array, dh: Array, dc: Array) -> Any:
        layer = _describe_layer(residuals[0].shape[-1], dh.shape[-1])
        return rnn.lstm_bwd(*layer, residuals, (dy, dh[None], dc[None]))[:4]

    dx, dh, dc, dvector = run(call_residuals, dy.swapaxes(0, 1), dh, dc)
    return (dc[0], dh[0]), dx.swapaxes(0, 1), unpack(dvector)


def _describe_layer(n: int, H: int) -> tuple[int, int, int, float, bool, None]:
    """Return sizes, layers, dropout, directions, and None for JAX's current precision."""
    return n, H, 1, 0.0, False, None


lstm.defvjp(_forward, _backward)
