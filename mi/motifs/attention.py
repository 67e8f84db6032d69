"""Attention and its variants as Linen modules.

Two products are multiplicative interactions: the scores, which multiply two tokens, and the mix,
which multiplies weights and values. Shapes: x [..., T, n] are the query tokens and z [..., S, m]
the key tokens; leading axes broadcast. There are H heads with d features each. Scores, masks and
softmax are in at least f32, sums in f32, and outputs in the compute dtype.
`jax.nn.dot_product_attention` is not used because it does not support dropout, and returns the mean
of the values for a query that sees no key.
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def masked_softmax(scores: Array, mask: Array, dtype: DTypeLike | None = None) -> Array:
    """Return the softmax over unmasked entries of the last axis, and zeros for fully masked rows.

    Args:
      scores: the scores, [..., T, S]. The softmax is computed in their dtype.
      mask: bool, broadcastable to the scores. False entries are masked.
      dtype: dtype of the result. Defaults to that of the scores. The backward pass only keeps the
        result, so bf16 attention stores two bytes per weight instead of the four of an f32 score.
    """
    lowest_score = jnp.finfo(scores.dtype).min
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, lowest_score)), 0)
    return weights.astype(dtype or scores.dtype)


@masked_softmax.defjvp
def _differentiate_softmax(
    dtype: DTypeLike | None, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Return the softmax p and its tangent p ⊙ (ṡ − Σ p ⊙ ṡ) in the dtype of the scores s."""
    scores, mask = primals
    weights = masked_softmax(scores, mask, dtype)
    wide_weights, score_tangents = weights.astype(scores.dtype), tangents[0]
    mean_tangents = (wide_weights * score_tangents).sum(axis=-1, keepdims=True)
    return weights, (wide_weights * (score_tangents - mean_tangents)).astype(weights.dtype)


def align_tokens(x: Array, z: Array) -> tuple[Array, Array]:
    """Return x [..., T, n] and z [..., S, m] with the same number of axes.

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
            'broadcast. Try axes of length 1 where a stream is shared'
        ) from error
    ndim = max(x.ndim, z.ndim)
    return expand_rank(x, ndim), expand_rank(z, ndim)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017).

        q = A_q x_t + c_q,   k = A_k z_s + c_k,   v = A_v z_s + c_v   per head
        p_t = softmax_s(qᵀk / √d),   y_t = A_o [Σ_s p_ts v_s of every head] + c_o

    Query t has position t + S − T, so the T queries are the last T of the S positions, and z =
    [memory, x] gives the recurrence of Transformer-XL. A query that sees no key has zero weights,
    so y_t = c_o.

    With `positions='rotary'`, q and k are rotated by their positions, see `rotate` (Su et al.,
    2021). With 'relative', the scores are those of Transformer-XL (Dai et al., 2019), where r [n]
    are the sinusoids of the distance from key to query, R is [n, kv_heads · d], and the biases u
    and v [H, d] start at zero:

        score = ((q + u)ᵀk + (q + v)ᵀ R r) / √d

    To decode, initialize the module with `decode=True` and an x of the full length. The collection
    'cache' then has space for that many keys and values. Each call with `decode=True`, the cache
    and `mutable=['cache']` takes the next T ≥ 1 tokens. A call that exceeds the cache returns NaN,
    because the position is traced and cannot raise an error.

    Attributes:
      heads: H, the number of query heads.
      features: k, the number of output features. Defaults to n.
      head_features: d, the number of features per head. Defaults to k / H.
      kv_heads: number of key and value heads, each shared by H / kv_heads consecutive query heads
        (grouped-query attention, Ainslie et al., 2023). Defaults to H.
      causal: whether a query only sees its own and earlier positions.
      positions: 'none', 'rotary' or 'relative'.
      window: a query only sees positions closer than this, including its own. None means no limit.
      dropout: dropout rate of the weights, which requires the rng 'dropout'.
      dtype: dtype of the computation. Defaults to the promoted dtype of inputs and parameters.
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
        """Return the attention of x to z, [..., T, k].

        Args:
          x: the query tokens, [..., T, n].
          z: the key tokens, [..., S, m]. Defaults to x.
          mask: bool [..., T, S], True where a query may see a key. It has as many axes as x or z,
            of length 1 where it is shared. A padding mask for the keys is [..., 1, S]. With a
            cache, S is the length of the cache.
          decode: whether x continues the tokens in the cache.
          deterministic: whether to disable dropout.

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
        num_queries, input_size = x.shape[-2:]
        features, kv_heads, head_features = self._check_sizes(input_size)

        queries, keys, values = self._project_tokens(x, z, kv_heads, head_features)

        # Encode positions, and append keys and values to the cache.
        cache = self._get_cache(keys, values) if decode else None
        first_position = cache['filled'].value if cache else 0
        last_position = first_position + z.shape[-2] - 1  # of the last query and the last new key
        query_positions = last_position - jnp.arange(num_queries)[::-1]
        if self.positions == 'rotary':
            queries = rotate(queries, last_position + 1 - num_queries)
            keys = rotate(keys, first_position)
        if cache and not self.is_initializing():
            keys, values = _append(cache, keys, values)
        num_keys = keys.shape[-2]

        # Weigh the keys that each query sees.
        scores = self._compute_scores(queries, keys, last_position, input_size)
        scores = scores * head_features**-0.5
        distances = query_positions[:, None] - jnp.arange(num_keys)[None]
        visible = expand_rank(is_visible(distances, self.causal, self.window), x.ndim)
        if mask is not None:
            leading = jnp.broadcast_shapes(x.shape[:-2], z.shape[:-2])
            visible &= _check_mask(mask, (*leading, num_queries, num_keys))
        has_dropout = self.dropout > 0 and not deterministic
        weights_dtype = scores.dtype if has_dropout else values.dtype
        weights = masked_softmax(scores, visible[..., None, :, :], weights_dtype)
        row_axis = 0 if weights.ndim > 3 else None
        weights = RowDropout(self.dropout, row_axis)(weights, deterministic=deterministic)

        # Mix the values and project the heads to the output.
        mixture = _multiply_heads('...ts,...sd->...td', weights.astype(values.dtype), values)
        mixture = mixture.astype(values.dtype).swapaxes(-3, -2)
        mixture = mixture.reshape(*mixture.shape[:-2], self.heads * head_features)
        output = Affine(features, self.dtype, self.param_dtype, name='out')(mixture)
        return jnp.where(last_position < num_keys, output, jnp.nan) if decode else output

    def _check_sizes(self, input_size: int) -> tuple[int, int, int]:
        """Check all fields, and return features, kv_heads and head_features for x [..., n]."""
        heads, kv_heads = self.heads, self.kv_heads or self.heads
        features = self.features or input_size
        if heads % kv_heads:
            raise ValueError(f'kv_heads = {kv_heads}: expected a divisor of heads = {heads}')
        if self.head_features is None and features % heads:
            raise ValueError(
                f'features = {features}: expected a multiple of heads = {heads}. Try setting '
                f'head_features'
            )
        head_features = self.head_features or features // heads
        if self.positions not in get_args(Positions):
            hint = suggest(self.positions, get_args(Positions))
            raise ValueError(f'unknown positions {self.positions!r}; {hint}')
        if self.positions == 'rotary' and head_features % 2:
            raise ValueError(
                f'head_features = {head_features}: expected an even number for rotary positions'
            )
        if self.positions == 'relative' and input_size % 2:
            raise ValueError(
                f'x has {input_size} features: expected an even number for relative positions'
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f'window = {self.window}: expected at least 1, or None')
        return features, kv_heads, head_features

    def _project_tokens(
        self, x: Array, z: Array, kv_heads: int, head_features: int
    ) -> tuple[Array, Array, Array]:
        """Return queries [..., H, T, d], and keys and values [..., kv_heads, S, d]."""

        def project(tokens: Array, num_heads: int, name: str) -> Array:
            affine = Affine(num_heads * head_features, self.dtype, self.param_dtype, name=name)
            projected = affine(tokens).reshape(*tokens.shape[:-1], num_heads, head_features)
            return projected.swapaxes(-3, -2)

        queries = project(x, self.heads, 'query')
        keys, values = project(z, kv_heads, 'key'), project(z, kv_heads, 'value')
        queries, keys, values = nn.dtypes.promote_dtype(queries, keys, values, dtype=self.dtype)
        return queries, keys, values

    def _compute_scores(
        self, queries: Array, keys: Array, last_position: int | Array, input_size: int
    ) -> Array:
        """Return √d times the scores [..., H, T, S] in at least f32.

        Args:
          queries: [..., H, T, d].
          keys: [..., kv_heads, S, d].
          last_position: position of the last query.
          input_size: number of features of a token.
        """
        if self.positions != 'relative':
            return _multiply_heads('...td,...sd->...ts', queries, keys)

        # The biases u and v of each head.
        num_queries, head_features = queries.shape[-2:]
        kv_heads, num_keys = keys.shape[-3:-1]
        dtype, bias_shape = queries.dtype, (self.heads, head_features)
        u, v = (
            expand_rank(
                self.param(bias_name, initializers.zeros, bias_shape, self.param_dtype)
                .astype(dtype)
                .reshape(self.heads, 1, head_features),
                queries.ndim,
            )
            for bias_name in ('u', 'v')
        )

        # R r for each distance, from the largest visible distance to the smallest.
        R_shape = input_size, kv_heads * head_features
        R = self.param('R', input_init(), R_shape, self.param_dtype)
        num_distances = num_keys if self.causal else num_queries + num_keys - 1
        distances = last_position - jnp.arange(num_distances)
        r = compute_sinusoids(distances, input_size, dtype).astype(dtype)
        distance_keys = linear(r, R.astype(dtype))
        distance_keys = distance_keys.reshape(num_distances, kv_heads, head_features)
        distance_keys = expand_rank(distance_keys.swapaxes(0, 1), queries.ndim)

        # The scores of keys and of distances.
        distance_scores = _multiply_heads('...td,...ld->...tl', queries + v, distance_keys)
        key_scores = _multiply_heads('...td,...sd->...ts', queries + u, keys)
        return key_scores + shift_relative(distance_scores, num_keys)

    def _get_cache(self, keys: Array, values: Array) -> dict[str, nn.Variable]:
        """Return the cache after checking that its shape fits the new keys."""
        if not (self.has_variable('cache', 'filled') or self.is_initializing()):
            raise ValueError(
                "decode = True: expected a 'cache' collection, but found none. Try initializing "
                'the module with decode=True and an x of the full length'
            )
        cache = {
            'keys': self.variable('cache', 'keys', jnp.zeros, keys.shape, keys.dtype),
            'values': self.variable('cache', 'values', jnp.zeros, values.shape, values.dtype),
            'filled': self.variable('cache', 'filled', jnp.zeros, (), jnp.int32),
        }
        cache_shape = cache['keys'].value.shape
        if keys.shape[:-2] != cache_shape[:-2] or keys.shape[-2] > cache_shape[-2]:
            raise ValueError(
                f'the cache {cache_shape} cannot hold keys {keys.shape}. Initialize it with '
                'this batch and the full length'
            )
        return cache


def _append(cache: dict[str, nn.Variable], keys: Array, values: Array) -> tuple[Array, Array]:
    """Write the new keys and values to the cache, and return the keys and values in it."""
    for variable_name, update in (('keys', keys), ('values', values)):
        buffer = cache[variable_name]
        buffer.value = jax.lax.dynamic_update_slice_in_dim(
            buffer.value,
            update.astype(buffer.value.dtype),
            cache['filled'].value,
            axis=update.ndim - 2,
        )
    cache['filled'].value += keys.shape[-2]
    return cache['keys'].value.astype(keys.dtype), cache['values'].value.astype(values.dtype)


def _check_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """Check that the mask is bool, of this rank, and broadcastable to this shape, and return it."""
    is_broadcastable = mask.ndim == len(shape) and all(
        size in (1, full_size) for size, full_size in zip(mask.shape, shape, strict=True)
    )
    if not is_broadcastable or mask.dtype != bool:
        raise ValueError(
            f'mask must be bool {shape}, with axes of length 1 where it is shared; got '
            f'{mask.dtype} {mask.shape}'
        )
    return mask


def einsum(equation: str, *operands: Array) -> Array:
    """Compute an einsum that accumulates and returns at least f32."""
    return jnp.einsum(equation, *operands, preferred_element_type=accumulation_dtype(*operands))


def _multiply_heads(equation: str, head_rows: Array, kv_rows: Array) -> Array:
    """Multiply rows of each head with the rows of its key or value head.

    Heads come before tokens, so that a product reads contiguous rows, and a key or value head
    meets the tokens of all heads that share it in one product.

    Args:
      equation: einsum of the last two axes, as '...td,...sd->...ts'.
      head_rows: [..., H, T, d] or [..., H, T, S].
      kv_rows: [..., kv_heads, S, d], where H is a multiple of kv_heads.

    Returns:
      The products [..., H, T, S] or [..., H, T, d] in at least f32.
    """
    *leading, num_heads, num_tokens, size = head_rows.shape
    kv_heads = kv_rows.shape[-3]
    grouped_rows = head_rows.reshape(*leading, kv_heads, num_heads // kv_heads * num_tokens, size)
    products = einsum(equation, grouped_rows, kv_rows)
    return products.reshape(*products.shape[:-3], num_heads, num_tokens, products.shape[-1])


class GatedCrossAttention(nn.Module):
    """Gated cross-attention (Alayrac et al., 2022, Flamingo): y = x + tanh(a) Attention(x, z).

    The scalar a starts at 0, so the module starts as the identity. The norm of x and the gated
    feed-forward layer of the paper's block are not included.

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
        """Return y [..., T, n] for x [..., T, n] and z [..., S, m], masked as in `Attention`."""
        mixture = _make_attention(self)(x, z, mask, deterministic=deterministic)
        a = self.param('a', initializers.zeros, (), self.param_dtype)
        x = expand_rank(x.astype(mixture.dtype), mixture.ndim)
        return x + jnp.tanh(a).astype(mixture.dtype) * mixture


class LatentCrossAttention(nn.Module):
    """The cross-attention of the Perceiver (Jaegle et al., 2021): y = x + Attention(x, z).

    The queries x [L, d] are learned latents, so the cost is linear in the length of z. The norms
    and the feed-forward layer of the paper's block are not included.

    Attributes:
      latents: L, the number of latents.
      features: d, the number of features in the latents and the output.
      heads: number of heads, which is 1 in the paper.
      head_features, kv_heads, dropout, dtype, param_dtype: as in `Attention`.
      latents_init: initializer of the latents. Defaults to a normal with standard deviation 0.02,
        truncated at two standard deviations.
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
        """Return y [..., L, d] for z [..., S, m], masked as in `Attention`."""
        latents_shape = self.latents, self.features
        x = self.param('latents', self.latents_init, latents_shape, self.param_dtype)
        x, z = align_tokens(x, z)
        x, z = nn.dtypes.promote_dtype(x, z, dtype=self.dtype)
        return x + _make_attention(self)(x, z, mask, deterministic=deterministic)


def _make_attention(module: GatedCrossAttention | LatentCrossAttention) -> Attention:
    """Return the submodule 'attention', configured by the fields of the module."""
    return Attention(
        module.heads,
        head_features=module.head_features,
        kv_heads=module.kv_heads,
        dropout=module.dropout,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name='attention',
    )
