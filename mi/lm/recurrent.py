"""The recurrent core: layers of any cell of `mi.cells`, with the sites of a fusion."""

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

Carry = list[Any]


class Recurrent(nn.Module):
    """L recurrent layers, x_t → h_t, and where in them x meets z.

        encoder      what enters the first layer becomes fuse(x, z)
        input_gate   what enters each layer becomes fuse(x, z), where the Mogrifier has its gates
        norm         what enters each layer becomes fuse(x / rms(x), z)
        ffn          each layer is followed by h + FeedForward(h), its first product the fusion

    Without a z, the context is made here, an affine map of the top layer's h_{t−1}: the source
    'state'. T is 1 then, and the loop over time is around this module.

    Attributes:
      features: H of every layer.
      layers: L.
      cell: constructor, one of `mi.cells.CELLS`.
      hidden: of the feed-forward layers.
      site: one of the above, or any other word for none.
      fusion: constructor of (x, z) → y.
      context: m, of the context that is made here.
      rates: of dropout.
      dtype: of the products.
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
        """States, x [T, B, E], z [T, B, m] → states, h [T, B, H] and the z that was fused."""
        if z is None and self.context:
            z = Affine(self.context, dtype=self.dtype, name='context')(carry[-1][1][None])
        if self.site in ('encoder', 'both'):
            x = self._fuse('encoder', x, z)
        after = []
        for i, state in enumerate(carry):
            if i > 0:
                x = drop(self.rates.layer, self.rates, x, train)
            if self.site == 'norm':
                x = self._fuse(f'norm_{i}', nn.RMSNorm(use_scale=False, dtype=self.dtype)(x), z)
            elif self.site == 'input_gate':
                x = self._fuse(f'input_gate_{i}', x, z)
            keep = None
            if train and self.rates.state:
                keep = jnp.ones((x.shape[1], self.features))
                keep = RowDropout(self.rates.state, row_axis=0, collection='state')(keep, False)
            cell = self.cell(self.features, dtype=self.dtype, name=f'layer_{i}')
            last, x = cell(state, x, None, keep)
            if self.site == 'ffn':
                ffn = FeedForward(
                    self.hidden, fusion=self.fusion, dtype=self.dtype, name=f'ffn_{i}'
                )
                x = x + ffn(nn.RMSNorm(dtype=self.dtype, name=f'norm_{i}')(x), z)
            after.append(last)
        return after, x, z

    def initial(self, batch: int) -> Carry:
        """The states before the first token."""
        return [self.cell(self.features, parent=None).initial(batch) for _ in range(self.layers)]

    def _fuse(self, name: str, x: Array, z: Array | None) -> Array:
        assert self.fusion is not None
        return self.fusion(x.shape[-1], dtype=self.dtype, name=f'fuse_{name}')(x, z)
