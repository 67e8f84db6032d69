"""Initializers for the weights and biases of the gates."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike


def orthogonal_gates(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Draw weights [n, 4H] with an orthogonal matrix [n, H] for each gate."""
    gate_shape = shape[0], shape[1] // 4
    gate_keys = jax.random.split(key, 4)
    gates = jax.vmap(lambda gate_key: orthogonal(gate_key, gate_shape, dtype))(gate_keys)
    return gates.swapaxes(0, 1).reshape(shape)


def orthogonal(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Draw an orthogonal matrix in f32 and cast it to `dtype`.

    Under vmap, the matrices are drawn one after another. On CPU, jaxlib decomposes a batch in an
    XLA thread that waits for other threads, so simultaneous decompositions on two devices can
    deadlock.
    """

    @jax.custom_batching.sequential_vmap
    def draw(key: Array) -> Array:
        return initializers.orthogonal()(key, shape, jnp.float32)

    return draw(key).astype(dtype)


def forget_bias(key: Array, shape: tuple[int], dtype: DTypeLike) -> Array:
    """Return a bias [4H] for i, f, o, j that is 1 for f and 0 for the others."""
    del key
    hidden_size = shape[0] // 4
    return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1)
