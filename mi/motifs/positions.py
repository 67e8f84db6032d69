"""Positions for attention: reach, rotary angles, the sinusoids of a distance, the shift.

Pure functions. Angles are computed in f32 at least, whatever the dtype of the tokens.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.bilinear import accumulation_dtype

BASE = 10_000.0


def is_visible(distance: Array, causal: bool, window: int | None) -> Array:
    """Which distances t − s a query sees: 0 and more if causal, closer than `window`; bool."""
    seen = jnp.ones(distance.shape, bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= jnp.abs(distance) < window
    return seen


def compute_angles(positions: Array, features: int, dtype: DTypeLike = jnp.float32) -> Array:
    """positions [...] → [..., features / 2], position · BASE^(−2j / features), j from 0.

    Args:
      positions: [...].
      features: of the tokens, even.
      dtype: of the tokens.
    """
    wide = accumulation_dtype(dtype)
    frequencies = BASE ** (-2 / features * jnp.arange(features // 2, dtype=wide))
    return jnp.multiply.outer(positions.astype(wide), frequencies)


def rotate(a: Array, positions: Array) -> Array:
    """Rotary position embedding (Su et al., 2021): pairs of entries, turned by their `angles`.

    The inner product of a turned query and a turned key has their positions in it only through the
    distance. Half-split: entry j turns with entry j + d/2, not with its neighbour as in the paper,
    which is the same up to a permutation of the d entries.

    Args:
      a: [..., T, heads, d], queries or keys; d is even.
      positions: [T].

    Returns:
      [..., T, heads, d] in the dtype of a.
    """
    angle = compute_angles(positions, a.shape[-1], a.dtype)[:, None]
    angle = angle.reshape((1,) * (a.ndim - 3) + angle.shape)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(a, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(a.dtype)


def compute_sinusoids(positions: Array, features: int, dtype: DTypeLike = jnp.float32) -> Array:
    """positions [...] → [..., features]: all sines, then all cosines (Dai et al., 2019)."""
    angle = compute_angles(positions, features, dtype)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def shift_relative(scores: Array, keys: int) -> Array:
    """Scores of each distance → scores of each key, without a copy per pair (Dai et al., 2019).

    Args:
      scores: [..., T, L], query t and the distance that is l less than the largest, that of the
        last query to the first key.
      keys: S, at most L.

    Returns:
      [..., T, S]: entry (t, s) is entry (t, T − 1 − t + s) of `scores`. Where that is L or more,
      which is so only for L < T + S − 1, it is the score of something else: mask it.
    """
    *leading, T, L = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
    rows = padded.reshape(*leading, L + 1, T)[..., 1:, :].reshape(*leading, T, L)
    return rows[..., :keys]
