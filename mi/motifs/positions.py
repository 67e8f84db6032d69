"""Pure functions for positions in attention: visibility, rotary and relative embeddings.

Angles are computed in f32 at least, whatever the dtype of the tokens.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype
from mi.layers import expand_rank

BASE = 10_000.0


def is_visible(distance: Array, causal: bool, window: int | None) -> Array:
    """Return whether a query sees a key at distance t − s, elementwise.

    Args:
      distance: [...], position of the query minus position of the key.
      causal: whether keys after the query are invisible.
      window: keys at this distance or farther are invisible; None for no limit.
    """
    visible = jnp.ones(distance.shape, bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    return visible


def compute_angles(positions: Array, features: int, dtype: DTypeLike = jnp.float32) -> Array:
    """Return the angles position · BASE^(−2j / features), j = 0, 1, …: [..., features / 2].

    Args:
      positions: [...].
      features: number of token features, even.
      dtype: dtype of the tokens.
    """
    angle_dtype = accumulation_dtype(dtype)
    frequencies = BASE ** (-2 / features * jnp.arange(features // 2, dtype=angle_dtype))
    return jnp.multiply.outer(positions.astype(angle_dtype), frequencies)


def rotate(tokens: Array, positions: Array) -> Array:
    """Apply the rotary position embedding (Su et al., 2021): rotate pairs of entries by angles.

    The inner product of a rotated query and a rotated key depends on their positions only through
    their distance. Entry j is paired with entry j + d/2, not with its neighbor as in the paper.
    The two pairings differ by a permutation of the d entries.

    Args:
      tokens: [..., T, heads, d], queries or keys; d is even.
      positions: [T].

    Returns:
      [..., T, heads, d] in the dtype of the tokens.
    """
    angles = compute_angles(positions, tokens.shape[-1], tokens.dtype)[:, None]
    angles = expand_rank(angles, tokens.ndim)
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(tokens, 2, axis=-1)
    rotated = first * cosines - second * sines, first * sines + second * cosines
    return jnp.concatenate(rotated, axis=-1).astype(tokens.dtype)


def compute_sinusoids(positions: Array, features: int, dtype: DTypeLike = jnp.float32) -> Array:
    """Return all sines, then all cosines of positions [...]: [..., features] (Dai et al., 2019)."""
    angles = compute_angles(positions, features, dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def shift_relative(scores: Array, num_keys: int) -> Array:
    """Convert scores per distance to scores per key without gathering pairs (Dai et al., 2019).

    Args:
      scores: [..., T, L]. Entry (t, l) belongs to query t and a distance that is l less than the
        largest, which is between the last query and the first key.
      num_keys: S, at most L.

    Returns:
      [..., T, S]: entry (t, s) is entry (t, T − 1 − t + s) of `scores`. If L < T + S − 1, this
      index can reach L; such entries hold unrelated scores, and the caller must mask them.
    """
    *leading, num_queries, num_distances = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
    shifted = padded.reshape(*leading, num_distances + 1, num_queries)[..., 1:, :]
    return shifted.reshape(scores.shape)[..., :num_keys]
