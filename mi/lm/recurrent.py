"""The recurrent core: layers of a cell from `mi.cells`, with several fusion sites."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi import cells
from mi.dropout import RowDropout
from mi.layers import Affine
from mi.lm.dropout import Rates, drop
from mi.lm.feed_forward import FeedForward

Carry = list[Any]  # the state of each layer


class Recurrent(nn.Module):
    """A stack of L recurrent layers, x_t → h_t, which can fuse x with z at one site:

        encoder      the input of the first layer becomes fuse(x, z)
        input_gate   the input of each layer becomes fuse(x, z), as the Mogrifier gates its input
        norm         the input of each layer becomes fuse(x / rms(x), z)
        ffn          each layer is followed by h + FeedForward(h), whose first product is the fusion

    For the source 'state', z is None, and this module computes it as an affine map of the top
    layer's h_{t−1}. In that case T is 1, and the loop over time is outside this module.

    Attributes:
      features: H, the number of features of every layer.
      layers: L, the number of layers.
      cell: constructor of a cell, one of `mi.cells.CELLS`.
      hidden: number of hidden features of the feed-forward layers.
      site: position of the fusion, from the list above, or any other value for no fusion here.
      fusion: constructor of a module (x, z) → y.
      context: m if this module computes the context, or 0 otherwise.
      rates: dropout rates.
      dtype: dtype of the products.
    """

    features: int
    layers: int = 1
    cell: Callable[..., nn.Module] = cells.LSTM
    hidden: int = 512
    site: str = 'none'
    fusion: Callable[..., nn.Module] | None = None
    context: int = 0
    rates: Rates = Rates()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, z: Array | None, train: bool = False
    ) -> tuple[Carry, Array, Array | None]:
        """Map the states, x [T, B, E] and z [T, B, m] to new states, h [T, B, H] and z."""
        if z is None and self.context:
            z = Affine(self.context, dtype=self.dtype, name='context')(carry[-1][1][None])
        if self.site in ('encoder', 'both'):
            x = self._fuse('encoder', x, z)
        next_carry = []
        for layer_index, layer_state in enumerate(carry):
            # The input of the layer.
            if layer_index > 0:
                x = drop(self.rates.layer, self.rates, x, train)
            if self.site == 'norm':
                normed = nn.RMSNorm(use_scale=False, dtype=self.dtype)(x)
                x = self._fuse(f'norm_{layer_index}', normed, z)
            elif self.site == 'input_gate':
                x = self._fuse(f'input_gate_{layer_index}', x, z)

            # The layer, with dropout of its state.
            keep_mask = None
            if train and self.rates.state:
                dropout = RowDropout(self.rates.state, row_axis=0, collection='state')
                keep_mask = dropout(jnp.ones((x.shape[1], self.features)), False)
            cell = self.cell(self.features, dtype=self.dtype, name=f'layer_{layer_index}')
            next_state, x = cell(layer_state, x, None, keep_mask)
            next_carry.append(next_state)

            # The feed-forward layer.
            if self.site == 'ffn':
                feed_forward = FeedForward(
                    self.hidden, fusion=self.fusion, dtype=self.dtype, name=f'ffn_{layer_index}'
                )
                norm = nn.RMSNorm(dtype=self.dtype, name=f'norm_{layer_index}')
                x = x + feed_forward(norm(x), z)
        return next_carry, x, z

    def initial(self, batch: int) -> Carry:
        """Return the all-zero initial states."""
        return [self.cell(self.features, parent=None).initial(batch) for _ in range(self.layers)]

    def _fuse(self, name: str, x: Array, z: Array | None) -> Array:
        assert self.fusion is not None
        return self.fusion(x.shape[-1], dtype=self.dtype, name=f'fuse_{name}')(x, z)
