"""Attention: scores in which two tokens meet, and a mix in which weights and values meet.

Shapes: x [..., T, n] asks, z [..., S, m] is asked; leading axes broadcast. H heads of d features
each. Scores, masks and softmax are in f32 at least, sums in f32, outputs in the compute dtype.
`jax.nn.dot_product_attention` is not used: it has no dropout, and a query that may see no key gets
the mean of the values from it.
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
from mi.kernels.bilinear import accumulation_dtype, linear
from mi.layers import Affine, check_dense, input_init, interaction_init
from mi.motifs.positions import compute_sinusoids, is_visible, rotate, shift_relative

Positions = Literal['none', 'rotary', 'relative']


def masked_softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the last axis of what the mask has; a row that has nothing is all zeros."""
    lowest = jnp.finfo(scores.dtype).min
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, lowest)), 0)


def align_tokens(x: Array, z: Array) -> tuple[Array, Array]:
    """x and z with the same number of axes, [..., T, n] and [..., S, m].

    Raises:
      ValueError: if one has less than two axes, their leading axes do not broadcast, or z are
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
            f'the axes before the last two of x {x.shape} and z {z.shape} do not broadcast; '
            f'give an axis of length 1 where one is shared'
        ) from error
    ndim = max(x.ndim, z.ndim)
    x = x.reshape((1,) * (ndim - x.ndim) + x.shape)
    z = z.reshape((1,) * (ndim - z.ndim) + z.shape)
    return x, z


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017).

        q = A_q x_t + c_q,   k = A_k z_s + c_k,   v = A_v z_s + c_v   per head
        p_t = softmax_s(qᵀk / √d),   y_t = A_o [Σ_s p_ts v_s of every head] + c_o

    The T queries are the last T of the S positions, in self-attention all: position t + S − T. So
    z = [memory, x] gives the recurrence of Transformer-XL, and a causal x as long as z sees what is
    not after it. A query that sees no key has weights of zero, and y_t = c_o.

    Positions: 'rotary' turns q and k by their positions (Su et al., 2021), half-split as in
    `rotate`. 'relative' is that of Transformer-XL (Dai et al., 2019), with r [n] the sinusoids of
    the distance from key to query, R [n, kv_heads · d], and biases u and v [H, d], at first zeros:

        score = ((q + u)ᵀk + (q + v)ᵀ R r) / √d

    Decoding: initialise with `decode=True` and an x of the full length; the collection 'cache' then
    holds that many keys and values, none filled. Each call with `decode=True`, the cache and
    `mutable=['cache']` takes the next T ≥ 1 tokens. A call that runs past the end returns NaN, as a
    traced position cannot raise.

    Attributes:
      heads: H.
      features: k of the output; None for n.
      head_features: d; None for k / H.
      kv_heads: heads of keys and values, each shared by H / kv_heads consecutive heads of queries
        (grouped-query attention, Ainslie et al., 2023); None for H.
      causal: whether a query sees only its own position and those before.
      positions: 'none', 'rotary' or 'relative'.
      window: a query sees positions closer than this, its own included; None for all.
      dropout: rate at which weights are dropped; its random numbers are called 'dropout'.
      dtype: of the computation; None for the promoted dtype of inputs and parameters.
      param_dtype: of the parameters.
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
        """x [..., T, n], z [..., S, m] → [..., T, k].

        Args:
          x: the tokens that ask.
          z: the tokens that are asked; None for x itself.
          mask: bool, True where a query may see a key: [..., T, S] with as many axes as x or z,
            of length 1 where shared, so that of padded keys is [..., 1, S]. With a cache, S is the
            cache's length.
          decode: whether x continues the tokens in the cache.
          deterministic: whether to leave dropout out.

        Raises:
          ValueError: if sizes, shapes or words do not fit, or there is no cache or it is too short.
        """
        x, z = align_tokens(x, x if z is None else z)
        if decode and (z.shape[-2] != x.shape[-2] or not self.causal):
            raise ValueError(
                f'decode=True is for causal self-attention; got causal={self.causal}, x {x.shape} '
                f'and z {z.shape}: leave decode out'
            )
        T, n = x.shape[-2:]
        features, kv_heads, d = self._sizes(n)
        affine = functools.partial(Affine, dtype=self.dtype, param_dtype=self.param_dtype)
        query = affine(self.heads * d, name='query')(x).reshape(*x.shape[:-1], self.heads, d)
        key = affine(kv_heads * d, name='key')(z).reshape(*z.shape[:-1], kv_heads, d)
        value = affine(kv_heads * d, name='value')(z).reshape(*z.shape[:-1], kv_heads, d)
        query, key, value = nn.dtypes.promote_dtype(query, key, value, dtype=self.dtype)

        cache = self._cache(key, value) if decode else None
        start = cache['filled'].value if cache else jnp.zeros((), jnp.int32)
        last = start + z.shape[-2] - 1  # position of the last query and of the last key given
        if self.positions == 'rotary':
            query = rotate(query, last - jnp.arange(T)[::-1])
            key = rotate(key, start + jnp.arange(key.shape[-3]))
        if cache and not self.is_initializing():
            key, value = _append(cache, key, value)
        S = key.shape[-3]

        query = query.reshape(*x.shape[:-1], kv_heads, self.heads // kv_heads, d)
        scores = self._scores(query, key, last, n) * d**-0.5  # [..., kv_heads, group, T, S]
        distance = (last - jnp.arange(T)[::-1])[:, None] - jnp.arange(S)[None]
        seen = is_visible(distance, self.causal, self.window)
        seen = seen.reshape((1,) * (x.ndim - 2) + seen.shape)
        if mask is not None:
            seen &= _checked(mask, (*jnp.broadcast_shapes(x.shape[:-2], z.shape[:-2]), T, S))
        weights = masked_softmax(scores, seen[..., None, None, :, :])
        row_axis = 0 if weights.ndim > 4 else None
        weights = RowDropout(self.dropout, row_axis)(weights, deterministic=deterministic)

        mixed = _einsum('...kgts,...skd->...tkgd', weights.astype(value.dtype), value)
        mixed = mixed.astype(value.dtype).reshape(*mixed.shape[:-3], self.heads * d)
        y = affine(features, name='out')(mixed)
        return jnp.where(last < S, y, jnp.nan) if decode else y

    def _sizes(self, n: int) -> tuple[int, int, int]:
        """features, kv_heads and head_features for an x [..., n], once all fields are checked."""
        heads, features, kv_heads = self.heads, self.features or n, self.kv_heads or self.heads
        if heads % kv_heads:
            raise ValueError(f'{heads} heads cannot share {kv_heads} kv_heads; give a divisor')
        if self.head_features is None and features % heads:
            raise ValueError(
                f'{features} features do not divide into {heads} heads; give head_features'
            )
        d = self.head_features or features // heads
        if self.positions not in get_args(Positions):
            known = suggest(self.positions, get_args(Positions))
            raise ValueError(f'unknown positions {self.positions!r}; {known}')
        if self.positions == 'rotary' and d % 2:
            raise ValueError(f'rotary positions turn pairs; got head_features {d}: make it even')
        if self.positions == 'relative' and n % 2:
            raise ValueError(f'sines and cosines come in pairs; got x [..., {n}]: make it even')
        if self.window is not None and self.window < 1:
            raise ValueError(
                f'a window of {self.window} holds no position; give 1 or more, or None'
            )
        return features, kv_heads, d

    def _scores(self, query: Array, key: Array, last: Array, n: int) -> Array:
        """query [..., T, kv_heads, group, d], key [..., S, kv_heads, d] → f32, times √d."""
        if self.positions != 'relative':
            return _einsum('...tkgd,...skd->...kgts', query, key)
        T, kv_heads, group, d = query.shape[-4:]
        S = key.shape[-3]
        u, v = (
            self.param(name, initializers.zeros, (self.heads, d), self.param_dtype)
            .astype(query.dtype)
            .reshape((1,) * (query.ndim - 3) + (kv_heads, group, d))
            for name in ('u', 'v')
        )
        R = self.param('R', input_init(), (n, kv_heads * d), self.param_dtype)
        # From the largest distance down to the least that a query sees.
        distances = last - jnp.arange(S if self.causal else T + S - 1)
        r = compute_sinusoids(distances, n, query.dtype).astype(query.dtype)
        r = linear(r, R.astype(query.dtype))
        r = r.reshape(len(distances), kv_heads, d)
        of_distances = _einsum('...tkgd,lkd->...kgtl', query + v, r)
        return _einsum('...tkgd,...skd->...kgts', query + u, key) + shift_relative(of_distances, S)

    def _cache(self, key: Array, value: Array) -> dict[str, nn.Variable]:
        """The cache, checked against the keys that it has to take."""
        if not (self.has_variable('cache', 'filled') or self.is_initializing()):
            raise ValueError(
                f'decode=True without a cache for keys {key.shape}; give the one that init makes '
                f'with decode=True and an x of the full length'
            )
        cache = {
            'keys': self.variable('cache', 'keys', jnp.zeros, key.shape, key.dtype),
            'values': self.variable('cache', 'values', jnp.zeros, value.shape, value.dtype),
            'filled': self.variable('cache', 'filled', jnp.zeros, (), jnp.int32),
        }
        given, held = key.shape, cache['keys'].value.shape
        if given[:-3] != held[:-3] or given[-3] > held[-3]:
            raise ValueError(
                f'the cache holds keys {held} and cannot take {given}; '
                f'initialise one with this batch and the full length'
            )
        return cache


def _append(cache: dict[str, nn.Variable], key: Array, value: Array) -> tuple[Array, Array]:
    """All keys and values of the cache, these written after the ones that it is filled with."""
    for name, new in (('keys', key), ('values', value)):
        held = cache[name]
        held.value = jax.lax.dynamic_update_slice_in_dim(
            held.value, new.astype(held.value.dtype), cache['filled'].value, axis=new.ndim - 3
        )
    cache['filled'].value += key.shape[-3]
    return cache['keys'].value.astype(key.dtype), cache['values'].value.astype(value.dtype)


def _checked(mask: Array, shape: tuple[int, ...]) -> Array:
    """The mask, if it is bool and broadcasts to this shape from as many axes."""
    fits = mask.ndim == len(shape) and all(
        size in (1, full) for size, full in zip(mask.shape, shape, strict=True)
    )
    if not fits or mask.dtype != bool:
        raise ValueError(
            f'mask must be bool {shape}, an axis of length 1 where it is shared; '
            f'got {mask.dtype} {mask.shape}'
        )
    return mask


def _einsum(equation: str, *operands: Array) -> Array:
    """The sum in f32 at least, and not rounded to the dtype of the operands."""
    return jnp.einsum(equation, *operands, preferred_element_type=accumulation_dtype(*operands))


class GatedCrossAttention(nn.Module):
    """Gated cross-attention (Alayrac et al., 2022, Flamingo): y = x + tanh(a) Attention(x, z).

    a is one number and 0 at the start, so that the module starts as the identity. The norm of x and
    the gated feed-forward layer of the paper's block are the caller's.

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
        """x [..., T, n], z [..., S, m] → [..., T, n]; mask and errors as in `Attention`."""
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
        x = x.astype(y.dtype).reshape((1,) * (y.ndim - x.ndim) + x.shape)
        return x + jnp.tanh(a).astype(y.dtype) * y


class LatentCrossAttention(nn.Module):
    """Learnt latents x [L, d] query an array z: y = x + Attention(x, z).

    The cross-attention of the Perceiver (Jaegle et al., 2021): its cost is linear in the length of
    z. The norms and the feed-forward layer of the paper's block are the caller's.

    Attributes:
      latents: L.
      features: d, of the latents and of the output.
      heads: 1, as in the paper.
      head_features, kv_heads, dropout, dtype, param_dtype: as in `Attention`.
      latents_init: a normal of standard deviation 0.02, truncated at twice that.
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
        """z [..., S, m] → [..., L, d]; mask and errors as in `Attention`."""
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


class ConvolutionalSelfAttention(nn.Module):
    """Self-attention on a grid whose scores are of the offset alone (Cordonnier et al., 2020).

        y_q = Σ_h Σ_p softmax_p(v_hᵀ r_δ) V_h x_p + b,   δ = p − q
        v_h = −α_h (1, −2Δ_h1, −2Δ_h2),   r_δ = (‖δ‖², δ_1, δ_2)

    Up to a constant v_hᵀ r_δ is −α_h ‖δ − Δ_h‖²: head h looks at the offset Δ_h, the sharper the
    larger α_h. V_h [n, k] is the product of the paper's value and output matrices of the head.

    The score is a sum over the two axes of the grid, so the softmax is the product of one over the
    rows and one over the columns, and the weights of all pairs of positions are never formed.

    Where that offset leaves the grid, the head looks at the nearest position inside: with a large α
    the module is a convolution that pads with the edge, see `convert_convolution`.

    Attributes:
      heads: H; K² for a K × K convolution.
      features: k.
      dtype, param_dtype: as in `Attention`.
      Delta_init: of Δ [H, 2]; N(0, 2) in every entry.
      alpha_init: of α [H]; ones.
    """

    heads: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    Delta_init: Initializer = initializers.normal(2**0.5)
    alpha_init: Initializer = initializers.ones

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., rows, columns, n] → [..., rows, columns, k]; ValueError below three axes."""
        if x.ndim < 3:
            raise ValueError(f'x must be [..., rows, columns, n]; got {x.shape}')
        *_, rows, columns, n = x.shape
        Delta = self.param('Delta', self.Delta_init, (self.heads, 2), self.param_dtype)
        alpha = self.param('alpha', self.alpha_init, (self.heads,), self.param_dtype)
        V_shape = self.heads, n, self.features
        V = self.param('V', interaction_init('dense'), V_shape, self.param_dtype)
        b = self.param('b', initializers.zeros, (self.features,), self.param_dtype)
        of_rows = _axis_weights(rows, Delta[:, 0], alpha)
        of_columns = _axis_weights(columns, Delta[:, 1], alpha)
        x, V, b = nn.dtypes.promote_dtype(x, V, b, dtype=self.dtype)
        seen = _einsum('hjc,...rcn->...hrjn', of_columns.astype(x.dtype), x).astype(x.dtype)
        seen = _einsum('hir,...hrjn->...ijhn', of_rows.astype(x.dtype), seen).astype(x.dtype)
        y = linear(seen.reshape(*x.shape[:-1], -1), V.reshape(-1, self.features))
        return y + b.reshape((1,) * (y.ndim - 1) + b.shape)


def _axis_weights(size: int, Delta: Array, alpha: Array) -> Array:
    """Δ and α [H] → [H, query, key], the softmax over keys of −α (δ² − 2Δδ), in f32 at least."""
    dtype = accumulation_dtype(Delta)
    Delta, alpha = (a.astype(dtype)[:, None, None] for a in (Delta, alpha))
    delta = (jnp.arange(size)[None] - jnp.arange(size)[:, None]).astype(dtype)[None]
    return jax.nn.softmax(-alpha * (delta**2 - 2 * Delta * delta))


def convert_convolution(
    kernel: Array, b: Array | None = None, alpha: float | Array = 100.0
) -> dict[str, Array]:
    """Parameters with which `ConvolutionalSelfAttention` is this convolution (their Theorem 1).

    Head h = K_2 i + j looks at (i − (K_1 − 1) // 2, j − (K_2 − 1) // 2), as the kernel does under
    'SAME' padding. The grid is padded with its edge, not with zeros: the two agree on positions
    where the kernel does not reach over it. The weights of a head's other positions are exp(−alpha)
    and less.

    Args:
      kernel: [K_1, K_2, n, k], as `flax.linen.Conv` has it.
      b: [k]; None for zeros.
      alpha: α of all heads.

    Returns:
      The collection 'params' for heads = K_1 K_2 and features = k.

    Raises:
      ValueError: if the kernel is not of four axes.
    """
    if kernel.ndim != 4:
        raise ValueError(f'kernel must be [K_1, K_2, n, k]; got {kernel.shape}')
    K_1, K_2, n, k = kernel.shape
    i, j = jnp.divmod(jnp.arange(K_1 * K_2), K_2)
    return {
        'Delta': jnp.stack([i - (K_1 - 1) // 2, j - (K_2 - 1) // 2], axis=-1).astype(
            accumulation_dtype(kernel)
        ),
        'alpha': jnp.full(K_1 * K_2, alpha),
        'V': kernel.reshape(K_1 * K_2, n, k),
        'b': jnp.zeros(k) if b is None else b,
    }
