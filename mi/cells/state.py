"""The initial state of the cells, and shape checks for their inputs."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype
from mi.kernels.lstm import Carry


def initial_carry(batch: int, features: int, dtype: DTypeLike = jnp.float32) -> Carry:
    """Return zeros (c, h), each [B, H], for an LSTM whose products have this dtype."""
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
      carry: arrays [B, H], where H can differ between the arrays.
      x: the inputs, [T, B, n].
      reset: [T, B], or None.
      keep: None, or an array with the shape of the carry's second array.
      features: H of each array in the carry.
    """
    if x.ndim != 3:
        raise ValueError(f'x must be [T, B, n]; got {x.shape}. For a single step, try x[None]')
    batch_size = x.shape[1]
    expected_shapes = [(batch_size, hidden_size) for hidden_size in features]
    shapes = [array.shape for array in carry]
    if shapes != expected_shapes:
        raise ValueError(
            f'for x {x.shape} the carry must be {expected_shapes}; got {shapes}. '
            f'Try cell.initial({batch_size})'
        )
    if reset is not None and reset.shape != x.shape[:2]:
        raise ValueError(f'for x {x.shape} reset must be {x.shape[:2]}; got {reset.shape}')
    if keep is not None and keep.shape != expected_shapes[1]:
        raise ValueError(f'for x {x.shape} keep must be {expected_shapes[1]}; got {keep.shape}')
