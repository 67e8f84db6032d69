"""The Transformer core: a decoder with a memory of earlier segments, and the sites of a fusion."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.layers import Affine
from mi.lm.dropout import Rates, drop
from mi.lm.feed_forward import FeedForward
from mi.motifs.attention import Attention, Positions

Carry = dict[str, Array]


class Transformer(nn.Module):
    """L pre-norm blocks, x_t → h_t, and where in them x meets z.

        x ← x + attention(n, n),   n = norm(x)
        x ← x + FeedForward(norm(x))
        h = norm(x)

        encoder      what enters the first block becomes fuse(x, z)
        input_gate   before each block, x ← x + fuse(norm(x), z)
        attention    the queries are made of fuse(n, z): scores that x_t, z_t and x_s meet in
        ffn          the first product of each feed-forward layer is the fusion
        norm         every norm(x) becomes fuse(x / rms(x), z); AdaLN with the fusion 'film'

    Norms are RMSNorm (Zhang & Sennrich, 2019). With a memory of M > 0, a token attends to itself
    and to the M tokens before it, in this segment or in those before (Transformer-XL, Dai et al.,
    2019: no gradient goes into the memory), so that where segments end has no effect on the result.
    Without one it attends to what its segment has.

    Attributes:
      features: H.
      layers: L.
      heads, kv_heads: of the attention, see `mi.motifs.attention.Attention`; kv_heads None for
        heads.
      hidden: of the feed-forward layers.
      activation: of the feed-forward layers: 'swiglu', 'relu' or 'gelu'.
      positions: 'rotary' or 'relative'.
      memory: M, tokens.
      site: one of the above, or any other word for none.
      fusion: constructor of (x, z) → y.
      rates: of dropout.
      remat: whether the backward pass makes the activations of each block anew.
      decode: whether a call continues the tokens in the collection 'cache', as `Attention` has it;
        the memory is not used then.
      dtype: of the products; the memory is f32.
    """

    features: int
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    hidden: int = 512
    activation: str = 'swiglu'
    positions: Positions = 'rotary'
    memory: int = 0
    site: str = 'none'
    fusion: Callable[..., nn.Module] | None = None
    rates: Rates = Rates()
    remat: bool = False
    decode: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, z: Array | None, train: bool = False
    ) -> tuple[Carry, Array, Array | None]:
        """Memory [B, M, …], x [T, B, E], z [T, B, m] → memory, h [T, B, H] and z."""
        T, B, E = x.shape
        M = 0 if self.decode else self.memory
        x = x.swapaxes(0, 1)
        of_rows = None if z is None else jnp.broadcast_to(z.swapaxes(0, 1), (B, T, z.shape[-1]))
        if self.site in ('encoder', 'both'):
            assert self.fusion is not None
            x = self.fusion(E, dtype=self.dtype, name='fuse_encoder')(x, of_rows)
        if self.features != E:
            x = Affine(self.features, self.dtype, name='input')(x)
        mask = None
        if M > 0:  # the memory is filled from its end
            there = jnp.arange(M)[None] >= M - carry['filled'][:, None]
            mask = jnp.concatenate([there, jnp.ones((B, T), bool)], axis=1)[:, None]
        block = functools.partial(
            nn.remat(_Block) if self.remat else _Block,
            heads=self.heads,
            kv_heads=self.kv_heads,
            hidden=self.hidden,
            activation=self.activation,
            positions=self.positions,
            memory=self.memory,
            site=self.site,
            fusion=self.fusion,
            rates=self.rates,
            decode=self.decode,
            dtype=self.dtype,
            train=train,
        )
        kept = []
        for i in range(self.layers):
            before = carry['inputs'][:, :, i] if M > 0 else None
            x, n = block(name=f'block_{i}')(x, before, mask, of_rows)
            kept.append(n)
        h = _norm(self, 'norm_out', x, of_rows)
        after: Carry = {}
        if M > 0:
            inputs = jnp.stack(kept, axis=2).astype(jnp.float32)
            inputs = jnp.concatenate([carry['inputs'], inputs], axis=1)[:, -M:]
            after = {'inputs': inputs, 'filled': jnp.minimum(carry['filled'] + T, M)}
        return after, h.swapaxes(0, 1), z

    def initial(self, batch: int) -> Carry:
        """An empty memory."""
        if self.memory == 0 or self.decode:
            return {}
        return {
            'inputs': jnp.zeros((batch, self.memory, self.layers, self.features)),
            'filled': jnp.zeros(batch, jnp.int32),
        }


class _Block(nn.Module):
    heads: int
    kv_heads: int | None
    hidden: int
    activation: str
    positions: Positions
    memory: int
    site: str
    fusion: Callable[..., nn.Module] | None
    rates: Rates
    decode: bool
    dtype: DTypeLike
    train: bool

    @nn.compact
    def __call__(
        self, x: Array, memory: Array | None, mask: Array | None, z: Array | None
    ) -> tuple[Array, Array]:
        """x [B, T, H], memory [B, M, H], mask [B, 1, M + T] → x after, n [B, T, H]."""
        H, rates = x.shape[-1], self.rates

        def branch(y: Array) -> Array:
            return x + drop(rates.layer, rates, y, self.train, time=1)

        if self.site == 'input_gate':
            n = nn.RMSNorm(dtype=self.dtype, name='norm_gate')(x)
            x = branch(self._fused(n, z))
        n = _norm(self, 'norm', x, z)
        query = self._fused(n, z) if self.site == 'attention' else n
        attention = Attention(
            self.heads,
            features=H,
            kv_heads=self.kv_heads,
            causal=True,
            positions=self.positions,
            window=self.memory + 1 if self.memory else None,
            dropout=rates.attention,
            dtype=self.dtype,
            name='attention',
        )
        if memory is None and self.site != 'attention':
            asked = None
        elif memory is None:
            asked = n
        else:
            asked = jnp.concatenate([memory.astype(n.dtype), n], axis=1)
        x = branch(attention(query, asked, mask, decode=self.decode, deterministic=not self.train))
        ffn = FeedForward(
            self.hidden,
            self.activation,
            self.fusion if self.site == 'ffn' else None,
            self.dtype,
            name='feed_forward',
        )
        x = branch(ffn(_norm(self, 'norm_feed_forward', x, z), z))
        return x, n

    def _fused(self, n: Array, z: Array | None) -> Array:
        assert self.fusion is not None
        return self.fusion(n.shape[-1], dtype=self.dtype, name=f'fuse_{self.site}')(n, z)


def _norm(module: Any, name: str, x: Array, z: Array | None) -> Array:
    """The module's norm of this name, which is fused with z at the site 'norm'."""
    if module.site != 'norm':
        return nn.RMSNorm(dtype=module.dtype, name=name)(x)
    x = nn.RMSNorm(use_scale=False, dtype=module.dtype, name=name)(x)
    return module.fusion(x.shape[-1], dtype=module.dtype, name=f'fuse_{name}')(x, z)
