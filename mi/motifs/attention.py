"""Attention and its variants as Linen modules.

Two products are multiplicative interactions: the scores multiply two tokens, and the mix multiplies
weights and values. Shapes: x [..., T, n] are the query tokens, z [..., S, m] the key tokens;
leading axes broadcast. There are H heads of d features each. Scores, masks and softmax are in f32
at least, sums in f32, outputs in the compute dtype. `jax.nn.dot_product_attention` is not used: it
has no dropout, and it returns the mean of the values for a query that sees no key.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.config import suggest
from mi.dropout import RowDropout
from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import Affine, check_dense, expand_rank, input_init
from mi.motifs.positions import compute_sinusoids, is_visible, rotate, shift_relative

Positions = Literal['none', 'rotary', 'relative']


def masked_softmax(scores: Array, mask: Array) -> Array:
    """Return the softmax over the last axis where the mask is True; fully masked rows are zero."""
    lowest = jnp.finfo(scores.dtype).min
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, lowest)), 0)


def align_tokens(x: Array, z: Array) -> tuple[Array, Array]:
    """Return x [..., T, n] and z [..., S, m] with equally many axes.

    Raises:
      ValueError: if x or z has fewer than two axes, their leading axes do not broadcast, or z holds
        integers.
    """
    if z is not x:
        check_dense(z)
    if x.ndim < 2 or z.ndim < 2:
        raise ValueError(f'x must be [..., T, n] and z [..., S, m]; got x {x.shape}, z {z.shape}')
    try:
        jnp.broadcast_shapes(x.shape[:-2], z.shape[:-2])
    except ValueError as error:
        raise ValueError(
            f'the leading axes (all but the last two) of x {x.shape} and z {z.shape} do not '
            f'broadcast; give a stream length 1 along an axis over which it is shared'
        ) from error
    ndim = max(x.ndim, z.ndim)
    return expand_rank(x, ndim), expand_rank(z, ndim)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017).

        q = A_q x_t + c_q,   k = A_k z_s + c_k,   v = A_v z_s + c_v   per head
        p_t = softmax_s(qᵀk / √d),   y_t = A_o [Σ_s p_ts v_s of every head] + c_o

    Query t has position t + S − T, so the T queries are the last T of the S positions. Thus
    z = [memory, x] gives the recurrence of Transformer-XL. A query that sees no key has zero
    weights, and y_t = c_o.

    Positions: 'rotary' rotates q and k by their positions (Su et al., 2021), see `rotate`.
    'relative' is the scheme of Transformer-XL (Dai et al., 2019). Its r [n] are the sinusoids of
    the distance from key to query, R is [n, kv_heads · d], and the biases u and v [H, d] start at
    zero:

        score = ((q + u)ᵀk + (q + v)ᵀ R r) / √d

    Decoding: initialize with `decode=True` and an x of the full length. The collection 'cache' then
    has space for that many keys and values. Each call with `decode=True`, the cache and
    `mutable=['cache']` takes the next T ≥ 1 tokens. A call that exceeds the cache returns NaN,
    because an error cannot depend on a traced position.

    Attributes:
      heads: H.
      features: k of the output; None for n.
      head_features: d; None for k / H.
      kv_heads: heads of keys and values, each shared by H / kv_heads consecutive heads of queries
        (grouped-query attention, Ainslie et al., 2023); None for H.
      causal: whether a query sees only its own and earlier positions.
      positions: 'none', 'rotary' or 'relative'.
      window: a query sees positions closer than this, including its own; None for all.
      dropout: rate at which weights are dropped; needs the rng 'dropout'.
      dtype: dtype of the computation; None for the promoted dtype of inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    heads: int
    features: int | None = None
    head_features: int | None = None
    kv_heads: int | None = None
    causal: bool = False
    positions: Positions = 'none'
    window: int | None = None
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None = None,
        mask: Array | None = None,
        *,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array:
        """Return attention of x to z: x [..., T, n], z [..., S, m] → [..., T, k].

        Args:
          x: the query tokens.
          z: the key tokens; None for x.
          mask: bool, True where a query may see a key: [..., T, S] with as many axes as x or z and
            length 1 along shared axes. A padding mask of keys is [..., 1, S]. With a cache, S is
            the length of the cache.
          decode: whether x continues the tokens in the cache.
          deterministic: whether dropout is off.

        Raises:
          ValueError: if sizes or shapes do not match, `positions` is unknown, or the cache is
            missing or too short.
        """
        x, z = align_tokens(x, x if z is None else z)
        if decode and (z.shape[-2] != x.shape[-2] or not self.causal):
            raise ValueError(
                f'decode = True: expected causal self-attention (got causal={self.causal}, '
                f'x {x.shape} and z {z.shape}). Try decode=False'
            )
        T, n = x.shape[-2:]
        features, kv_heads, d = self._check_sizes(n)

        # Project tokens to queries, keys and values.
        affine = functools.partial(Affine, dtype=self.dtype, param_dtype=self.param_dtype)
        query = affine(self.heads * d, name='query')(x).reshape(*x.shape[:-1], self.heads, d)
        key = affine(kv_heads * d, name='key')(z).reshape(*z.shape[:-1], kv_heads, d)
        value = affine(kv_heads * d, name='value')(z).reshape(*z.shape[:-1], kv_heads, d)
        query, key, value = nn.dtypes.promote_dtype(query, key, value, dtype=self.dtype)

        # Encode positions, and append keys and values to the cache.
        cache = self._get_cache(key, value) if decode else None
        start = cache['filled'].value if cache else jnp.zeros((), jnp.int32)
        last = start + z.shape[-2] - 1  # position of the last query and of the last new key
        query_positions = last - jnp.arange(T)[::-1]
        if self.positions == 'rotary':
            query = rotate(query, query_positions)
            key = rotate(key, start + jnp.arange(key.shape[-3]))
        if cache and not self.is_initializing():
            key, value = _append(cache, key, value)
        S = key.shape[-3]

        # Weigh the keys that each query sees.
        query = query.reshape(*x.shape[:-1], kv_heads, self.heads // kv_heads, d)
        scores = self._compute_scores(query, key, last, n) * d**-0.5
        distance = query_positions[:, None] - jnp.arange(S)[None]
        visible = expand_rank(is_visible(distance, self.causal, self.window), x.ndim)
        if mask is not None:
            visible &= _check_mask(mask, (*jnp.broadcast_shapes(x.shape[:-2], z.shape[:-2]), T, S))
        weights = masked_softmax(scores, visible[..., None, None, :, :])
        row_axis = 0 if weights.ndim > 4 else None
        weights = RowDropout(self.dropout, row_axis)(weights, deterministic=deterministic)

        # Mix the values and project the heads to the output.
        mixture = einsum('...kgts,...skd->...tkgd', weights.astype(value.dtype), value)
        mixture = mixture.astype(value.dtype).reshape(*mixture.shape[:-3], self.heads * d)
        y = affine(features, name='out')(mixture)
        return jnp.where(last < S, y, jnp.nan) if decode else y

    def _check_sizes(self, n: int) -> tuple[int, int, int]:
        """Return features, kv_heads and head_features for x [..., n] after checking all fields."""
        heads, features, kv_heads = self.heads, self.features or n, self.kv_heads or self.heads
        if heads % kv_heads:
            raise ValueError(f'kv_heads = {kv_heads}: expected a divisor of heads = {heads}')
        if self.head_features is None and features % heads:
            raise ValueError(
                f'{features} features do not divide into {heads} heads; give head_features'
            )
        d = self.head_features or features // heads
        if self.positions not in get_args(Positions):
            hint = suggest(self.positions, get_args(Positions))
            raise ValueError(f'unknown positions {self.positions!r}; {hint}')
        if self.positions == 'rotary' and d % 2:
            raise ValueError(f'rotary positions need an even head_features (got {d})')
        if self.positions == 'relative' and n % 2:
            raise ValueError(
                f'relative positions need an even number of features (got x [..., {n}])'
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f'window = {self.window}: expected at least 1, or None')
        return features, kv_heads, d

    def _compute_scores(self, query: Array, key: Array, last: Array, n: int) -> Array:
        """Return √d times the scores [..., kv_heads, group, T, S], in f32 at least.

        Args:
          query: [..., T, kv_heads, group, d].
          key: [..., S, kv_heads, d].
          last: position of the last query.
          n: features of a token.
        """
        if self.positions != 'relative':
            return einsum('...tkgd,...skd->...kgts', query, key)
        T, kv_heads, group, d = query.shape[-4:]
        S = key.shape[-3]
        u, v = (
            expand_rank(
                self.param(name, initializers.zeros, (self.heads, d), self.param_dtype)
                .astype(query.dtype)
                .reshape(kv_heads, group, d),
                query.ndim,
            )
            for name in ('u', 'v')
        )
        R = self.param('R', input_init(), (n, kv_heads * d), self.param_dtype)
        # From the largest visible distance to the smallest.
        distances = last - jnp.arange(S if self.causal else T + S - 1)
        r = compute_sinusoids(distances, n, query.dtype).astype(query.dtype)
        r = linear(r, R.astype(query.dtype)).reshape(len(distances), kv_heads, d)
        distance_scores = einsum('...tkgd,lkd->...kgtl', query + v, r)
        key_scores = einsum('...tkgd,...skd->...kgts', query + u, key)
        return key_scores + shift_relative(distance_scores, S)

    def _get_cache(self, key: Array, value: Array) -> dict[str, nn.Variable]:
        """Return the cache after checking that it has space for the new keys."""
        if not (self.has_variable('cache', 'filled') or self.is_initializing()):
            raise ValueError(
                f'decode = True: expected a cache for keys {key.shape}. Try init with decode=True '
                f'and an x of the full length'
            )
        cache = {
            'keys': self.variable('cache', 'keys', jnp.zeros, key.shape, key.dtype),
            'values': self.variable('cache', 'values', jnp.zeros, value.shape, value.dtype),
            'filled': self.variable('cache', 'filled', jnp.zeros, (), jnp.int32),
        }
        cache_shape = cache['keys'].value.shape
        if key.shape[:-3] != cache_shape[:-3] or key.shape[-3] > cache_shape[-3]:
            raise ValueError(
                f'the cache has keys {cache_shape} and no space for {key.shape}; '
                f'initialize one with this batch and the full length'
            )
        return cache


def _append(cache: dict[str, nn.Variable], key: Array, value: Array) -> tuple[Array, Array]:
    """Write the new keys and values into the cache, and return everything in it."""
    for name, update in (('keys', key), ('values', value)):
        buffer = cache[name]
        buffer.value = jax.lax.dynamic_update_slice_in_dim(
            buffer.value,
            update.astype(buffer.value.dtype),
            cache['filled'].value,
            axis=update.ndim - 3,
        )
    cache['filled'].value += key.shape[-3]
    return cache['keys'].value.astype(key.dtype), cache['values'].value.astype(value.dtype)


def _check_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """Return the mask if it is bool and broadcasts to this shape from equally many axes."""
    is_broadcastable = mask.ndim == len(shape) and all(
        size in (1, full_size) for size, full_size in zip(mask.shape, shape, strict=True)
    )
    if not is_broadcastable or mask.dtype != bool:
        raise ValueError(
            f'mask must be bool {shape}, with axes of length 1 where it is shared; '
            f'got {mask.dtype} {mask.shape}'
        )
    return mask


def einsum(equation: str, *operands: Array) -> Array:
    """Return the einsum, accumulated and returned in f32 at least."""
    return jnp.einsum(equation, *operands, preferred_element_type=accumulation_dtype(*operands))


class GatedCrossAttention(nn.Module):
    """Gated cross-attention (Alayrac et al., 2022, Flamingo): y = x + tanh(a) Attention(x, z).

    The scalar a starts at 0, so the module starts as the identity. The caller adds the norm of x
    and the gated feed-forward layer of the paper's block.

    Attributes:
      heads, head_features, kv_heads, dropout, dtype, param_dtype: as in `Attention`.
    """

    heads: int
    head_features: int | None = None
    kv_heads: int | None = None
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, z: Array, mask: Array | None = None, *, deterministic: bool = True
    ) -> Array:
        """Return y [..., T, n] for x [..., T, n], z [..., S, m]; mask as in `Attention`."""
        attention = Attention(
            self.heads,
            head_features=self.head_features,
            kv_heads=self.kv_heads,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='attention',
        )
        y = attention(x, z, mask, deterministic=deterministic)
        a = self.param('a', initializers.zeros, (), self.param_dtype)
        x = expand_rank(x.astype(y.dtype), y.ndim)
        return x + jnp.tanh(a).astype(y.dtype) * y


class LatentCrossAttention(nn.Module):
    """The cross-attention of the Perceiver (Jaegle et al., 2021): y = x + Attention(x, z).

    The queries x [L, d] are learned latents, so the cost is linear in the length of z. The caller
    adds the norms and the feed-forward layer of the paper's block.

    Attributes:
      latents: L.
      features: d of the latents and the output.
      heads: number of heads; 1 in the paper.
      head_features, kv_heads, dropout, dtype, param_dtype: as in `Attention`.
      latents_init: by default a normal with standard deviation 0.02, truncated at two.
    """

    latents: int
    features: int
    heads: int = 1
    head_features: int | None = None
    kv_heads: int | None = None
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    latents_init: Initializer = initializers.truncated_normal(0.02)

    @nn.compact
    def __call__(self, z: Array, mask: Array | None = None, *, deterministic: bool = True) -> Array:
        """Return y [..., L, d] for z [..., S, m]; mask as in `Attention`."""
        x = self.param(
            'latents', self.latents_init, (self.latents, self.features), self.param_dtype
        )
        x, z = align_tokens(x, z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        attention = Attention(
            self.heads,
            head_features=self.head_features,
            kv_heads=self.kv_heads,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='attention',
        )
        return x + attention(x, z, mask, deterministic=deterministic)
