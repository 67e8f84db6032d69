"""Dropout with one mask per row, so that each device only draws the masks of its own rows."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mi import rows


class RowDropout(nn.Module):
    """Dropout, x ⊙ m / (1 − rate) with a mask m ~ Bernoulli(1 − rate).

    The mask of a row depends only on the random key and on the row's index in the full batch, not
    on the number of devices. Each device only draws the masks of its own rows.

    Attributes:
      rate: probability that an entry is zero.
      row_axis: axis of x that holds the rows, or None if all devices share one mask.
      shared_axes: axes along which the mask is constant.
      collection: name of the RNG stream that the mask is drawn from.
    """

    rate: float
    row_axis: int | None
    shared_axes: tuple[int, ...] = ()
    collection: str = 'dropout'

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Return x [..., rows, ...] with dropout, or unchanged if `deterministic` is True."""
        if deterministic or self.rate == 0:
            return x
        rng_key, keep_rate = self.make_rng(self.collection), 1 - self.rate
        shape = tuple(
            1 if axis in self.shared_axes else length for axis, length in enumerate(x.shape)
        )
        if self.row_axis is None:
            mask = jax.random.bernoulli(rng_key, keep_rate, shape)
        else:
            row_keys = rows.make_row_keys(rng_key, shape[self.row_axis])
            row_shape = shape[: self.row_axis] + shape[self.row_axis + 1 :]
            draw_masks = jax.vmap(
                lambda row_key: jax.random.bernoulli(row_key, keep_rate, row_shape),
                out_axes=self.row_axis,
            )
            mask = draw_masks(row_keys)
        return jnp.where(mask, x / keep_rate, 0).astype(x.dtype)
