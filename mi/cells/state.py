"""The state of the cells: the carry before the first step, and checks of its shape."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype
from mi.kernels.lstm import Carry


def initial_carry(batch: int, features: int, dtype: DTypeLike = jnp.float32) -> Carry:
    """Return the zero state (c, h) of an LSTM with products of this dtype, each [B, H]."""
    state_dtype = accumulation_dtype(dtype)
    return jnp.zeros((batch, features), state_dtype), jnp.zeros((batch, features), state_dtype)


def check_shapes(
    carry: Sequence[Array],
    x: Array,
    reset: Array | None,
    keep: Array | None,
    features: Sequence[int],
) -> None:
    """Raise ValueError if the shapes do not match.

    Args:
      carry: arrays [B, H], with an H of `features` each.
      x: [T, B, n].
      reset: [T, B], or None.
      keep: [B, H] of the second array of the carry, or None.
      features: H of each array of the carry.
    """
    if x.ndim != 3:
        raise ValueError(f'x must be [T, B, n]; got {x.shape}; one step is x[None]')
    T, B, _ = x.shape
    expected, shapes = [(B, H) for H in features], [a.shape for a in carry]
    if shapes != expected:
        raise ValueError(
            f'for x {x.shape} the carry must be {expected}; got {shapes}. Try cell.initial({B})'
        )
    if reset is not None and reset.shape != (T, B):
        raise ValueError(f'for x {x.shape} reset must be {(T, B)}; got {reset.shape}')
    if keep is not None and keep.shape != expected[1]:
        raise ValueError(f'for x {x.shape} keep must be {expected[1]}; got {keep.shape}')
