"""What the cells share: initializers, shape checks and the zero carry."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype
from mi.kernels.lstm import Carry, broadcast_row


def initial_carry(batch: int, features: int, dtype: DTypeLike = jnp.float32) -> Carry:
    """The zero state of an LSTM with products of this dtype: (c, h), each [B, H]."""
    wide = accumulation_dtype(dtype)
    return jnp.zeros((batch, features), wide), jnp.zeros((batch, features), wide)


def normalize_groups(a: Array, *, gain: Array, shift: Array, groups: int) -> Array:
    """a [B, groups · H], each group with mean 0 and variance 1, times gain, plus shift."""
    each = a.reshape(a.shape[0], groups, -1)
    each = jax.nn.standardize(each, axis=-1, epsilon=1e-3)  # the ε of the authors' code
    return each.reshape(a.shape) * broadcast_row(gain, 2, a.dtype) + broadcast_row(
        shift, 2, a.dtype
    )


def check_shapes(
    carry: Sequence[Array],
    x: Array,
    reset: Array | None,
    keep: Array | None,
    features: Sequence[int],
) -> None:
    """Raises ValueError where the shapes do not fit; features are those of the carry."""
    if x.ndim != 3:
        raise ValueError(f'x must be [T, B, n]; got {x.shape}; one step is x[None]')
    T, B, _ = x.shape
    expected, got = [(B, H) for H in features], [a.shape for a in carry]
    if got != expected:
        raise ValueError(
            f'for x {x.shape} the carry must be {expected}; got {got}; initial_carry({B}) makes one'
        )
    if reset is not None and reset.shape != (T, B):
        raise ValueError(f'for x {x.shape} reset must be {(T, B)}; got {reset.shape}')
    if keep is not None and keep.shape != expected[1]:
        raise ValueError(f'for x {x.shape} keep must be {expected[1]}; got {keep.shape}')


def orthogonal_gates(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """[n, 4H]: an orthogonal matrix [n, H] for each gate."""
    n, H = shape[0], shape[1] // 4
    each = jax.vmap(lambda k: orthogonal(k, (n, H), dtype))(jax.random.split(key, 4))
    return each.swapaxes(0, 1).reshape(shape)


def orthogonal(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """An orthogonal matrix of any dtype; its decomposition is one of f32.

    Of many keys, one after another: on CPU, jaxlib's decomposition of a batch waits in one of XLA's
    threads for others of them, and two at once, as on two devices, can wait for ever.
    """

    @jax.custom_batching.sequential_vmap
    def draw(key: Array) -> Array:
        return initializers.orthogonal()(key, shape, jnp.float32)

    return draw(key).astype(dtype)


def forget_bias(key: Array, shape: tuple[int], dtype: DTypeLike) -> Array:
    """[4H]: 1 for f, 0 for i, o, j."""
    del key
    H = shape[0] // 4
    return jnp.zeros(shape, dtype).at[H : 2 * H].set(1)
