"""The Transformer core, with a memory of earlier segments and several fusion sites."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.layers import Affine
from mi.lm.dropout import Rates, drop
from mi.lm.feed_forward import FeedForward
from mi.motifs.attention import Attention, Positions

Carry = dict[str, Array]  # the memory: 'inputs' [B, M, L, H], 'filled' [B]; {} without one


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Options of a block. See the fields of the same names in `Transformer`."""

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


class Transformer(nn.Module):
    """A stack of L pre-norm blocks, x_t → h_t, which can fuse x with z at one site.

        x ← x + attention(n, n),   n = norm(x)
        x ← x + FeedForward(norm(x))
        h = norm(x)

        encoder      the input of the first block becomes fuse(x, z)
        input_gate   before each block, x ← x + fuse(norm(x), z)
        attention    queries are computed from fuse(n, z): scores are products of x_t, z_t and x_s
        ffn          the first product of each feed-forward layer is the fusion
        norm         every norm(x) becomes fuse(x / rms(x), z), which is AdaLN for the fusion 'film'

    Norms are RMSNorm (Zhang & Sennrich, 2019). With a memory of M > 0 tokens, a token attends to
    itself and to the M tokens before it, in this segment or in earlier ones (Transformer-XL, Dai et
    al., 2019). No gradient flows into the memory, and segment boundaries have no effect on the
    result. Without a memory, a token only attends to its own segment.

    Attributes:
      features: H, the number of features.
      layers: L, the number of blocks.
      heads, kv_heads: number of attention heads, see `mi.motifs.attention.Attention`. kv_heads is
        None for the same number as heads.
      hidden: number of hidden features of the feed-forward layers.
      activation: activation of the feed-forward layers: 'swiglu', 'relu' or 'gelu'.
      positions: 'rotary' or 'relative'.
      memory: M, the size of the memory in tokens.
      site: position of the fusion, from the list above, or any other value for no fusion here.
      fusion: constructor of a module (x, z) → y.
      rates: dropout rates.
      remat: whether the backward pass recomputes the activations of each block.
      decode: whether a call continues the tokens in the collection 'cache', see `Attention`. If so,
        the memory is not used.
      dtype: dtype of the products. The memory is f32.
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
        """Map the memory, x [T, B, E] and z [T, B, m] to the new memory, h [T, B, H] and z."""
        # The input of the first block, [B, T, H].
        num_steps, batch_size, num_inputs = x.shape
        memory_size = 0 if self.decode else self.memory
        x = x.swapaxes(0, 1)
        z_rows = z
        if z is not None:
            z_rows = jnp.broadcast_to(z.swapaxes(0, 1), (batch_size, num_steps, z.shape[-1]))
        if self.site in ('encoder', 'both'):
            assert self.fusion is not None
            x = self.fusion(num_inputs, dtype=self.dtype, name='fuse_encoder')(x, z_rows)
        if self.features != num_inputs:
            x = Affine(self.features, self.dtype, name='input')(x)

        # The mask of the keys: the memory is filled from its end.
        mask = None
        if memory_size > 0:
            is_filled = jnp.arange(memory_size)[None] >= memory_size - carry['filled'][:, None]
            is_token = jnp.ones((batch_size, num_steps), bool)
            mask = jnp.concatenate([is_filled, is_token], axis=1)[:, None]

        # The blocks.
        block_config = self._make_block_config()
        block_class = nn.remat(_Block) if self.remat else _Block
        block_inputs = []
        for block_index in range(self.layers):
            memory = carry['inputs'][:, :, block_index] if memory_size > 0 else None
            block = block_class(block_config, train, name=f'block_{block_index}')
            x, block_input = block(x, memory, mask, z_rows)
            block_inputs.append(block_input)
        h = _normalize(block_config, 'norm_out', x, z_rows)

        # The memory of the next segment.
        next_carry: Carry = {}
        if memory_size > 0:
            inputs = jnp.stack(block_inputs, axis=2).astype(jnp.float32)
            inputs = jnp.concatenate([carry['inputs'], inputs], axis=1)[:, -memory_size:]
            num_filled = jnp.minimum(carry['filled'] + num_steps, memory_size)
            next_carry = {'inputs': inputs, 'filled': num_filled}
        return next_carry, h.swapaxes(0, 1), z

    def initial(self, batch: int) -> Carry:
        """Return an empty memory."""
        if self.memory == 0 or self.decode:
            return {}
        return {
            'inputs': jnp.zeros((batch, self.memory, self.layers, self.features)),
            'filled': jnp.zeros(batch, jnp.int32),
        }

    def _make_block_config(self) -> BlockConfig:
        """Return the options of a block, from the fields of the same names."""
        field_names = [field.name for field in dataclasses.fields(BlockConfig)]
        return BlockConfig(**{name: getattr(self, name) for name in field_names})


class _Block(nn.Module):
    """A block of attention and a feed-forward layer."""

    config: BlockConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: Array, memory: Array | None, mask: Array | None, z: Array | None
    ) -> tuple[Array, Array]:
        """Map x [B, T, H], memory [B, M, H] and mask [B, 1, M + T] to x and norm(x) [B, T, H]."""
        config, num_features = self.config, x.shape[-1]

        def add_branch(y: Array) -> Array:
            return x + drop(config.rates.layer, config.rates, y, self.train, time=1)

        # The gate of the input.
        if config.site == 'input_gate':
            normed = _rms_norm(config, 'norm_gate', x)
            x = add_branch(self._fuse(normed, z))

        # Attention: the keys and values are the memory and this segment, which is the default.
        normed = _normalize(config, 'norm', x, z)
        query = self._fuse(normed, z) if config.site == 'attention' else normed
        attention = Attention(
            config.heads,
            features=num_features,
            kv_heads=config.kv_heads,
            causal=True,
            positions=config.positions,
            window=config.memory + 1 if config.memory else None,
            dropout=config.rates.attention,
            dtype=config.dtype,
            name='attention',
        )
        if memory is None and config.site != 'attention':
            context = None
        elif memory is None:
            context = normed
        else:
            context = jnp.concatenate([memory.astype(normed.dtype), normed], axis=1)
        x = add_branch(
            attention(query, context, mask, decode=config.decode, deterministic=not self.train)
        )

        # The feed-forward layer.
        feed_forward = FeedForward(
            config.hidden,
            config.activation,
            config.fusion if config.site == 'ffn' else None,
            config.dtype,
            name='feed_forward',
        )
        x = add_branch(feed_forward(_normalize(config, 'norm_feed_forward', x, z), z))
        return x, normed

    def _fuse(self, normed: Array, z: Array | None) -> Array:
        config = self.config
        assert config.fusion is not None
        name = f'fuse_{config.site}'
        return config.fusion(normed.shape[-1], dtype=config.dtype, name=name)(normed, z)


def _normalize(config: BlockConfig, name: str, x: Array, z: Array | None) -> Array:
    """Normalize x, and at the site 'norm' fuse the result with z."""
    if config.site != 'norm':
        return _rms_norm(config, name, x)
    assert config.fusion is not None
    x = _rms_norm(config, name, x, use_scale=False)
    return config.fusion(x.shape[-1], dtype=config.dtype, name=f'fuse_{name}')(x, z)


def _rms_norm(config: BlockConfig, name: str, x: Array, use_scale: bool = True) -> Array:
    """Normalize x as rows, so that the gradient of the scale is a sum over one axis."""
    norm = nn.RMSNorm(use_scale=use_scale, dtype=config.dtype, name=name)
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
