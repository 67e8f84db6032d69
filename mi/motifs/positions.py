"""Pure functions for positions in attention: visibility, and rotary and relative embeddings.

Angles are computed in at least f32, whatever the dtype of the tokens.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype
from mi.layers import expand_rank

BASE = 10_000.0
MAX_CONSTANT = 2**20  # entries of constant cosines and sines together


def is_visible(distance: Array, causal: bool, window: int | None) -> Array:
    """Return whether a query at position t sees a key at position s, elementwise.

    Args:
      distance: t − s, [...].
      causal: whether to hide keys after the query.
      window: keys at this distance or farther are hidden. None means no limit.
    """
    visible = jnp.ones(distance.shape, bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    return visible


def compute_angles(positions: Array, features: int, dtype: DTypeLike = jnp.float32) -> Array:
    """Return the angles position · BASE^(−2j / features) for j = 0, 1, …, [..., features / 2].

    Args:
      positions: the positions, [...].
      features: number of token features, which must be even.
      dtype: dtype of the tokens.
    """
    angle_dtype = accumulation_dtype(dtype)
    frequencies = BASE ** (-2 / features * jnp.arange(features // 2, dtype=angle_dtype))
    return jnp.multiply.outer(positions.astype(angle_dtype), frequencies)


def rotate(tokens: Array, first_position: int | Array) -> Array:
    """Apply rotary position embeddings (Su et al., 2021), which rotate pairs of entries.

    The inner product of a rotated query and a rotated key only depends on their distance, not on
    their absolute positions. Entry j is paired with entry j + d/2, whereas the paper pairs
    neighbors. The two pairings differ by a permutation of the d entries.

    Args:
      tokens: queries or keys, [..., T, d], with an even d.
      first_position: position of the first token. The others follow. An int makes the cosines and
        sines constants of the program.

    Returns:
      The rotated tokens, [..., T, d], in their dtype.
    """
    num_tokens, features = tokens.shape[-2:]
    cosines: Array | np.ndarray
    sines: Array | np.ndarray
    is_static = isinstance(first_position, int) and isinstance(num_tokens, int)
    if is_static and num_tokens * features <= MAX_CONSTANT:
        dtype = accumulation_dtype(tokens.dtype)
        cosines, sines = _compute_tables(first_position, num_tokens, features, dtype, tokens.ndim)
    else:
        positions = first_position + jnp.arange(num_tokens)
        angles = expand_rank(compute_angles(positions, features, tokens.dtype), tokens.ndim)
        cosines, sines = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(tokens, 2, axis=-1)
    rotated = first * cosines - second * sines, first * sines + second * cosines
    return jnp.concatenate(rotated, axis=-1).astype(tokens.dtype)


@functools.lru_cache(maxsize=64)
def _compute_tables(
    first_position: int, num_tokens: int, features: int, dtype: np.dtype, ndim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines and sines of angles, [..., T, features / 2] with `ndim` axes.

    XLA on CPU fuses a cosine with the product that reads it, and so computes it again for every
    batch entry and head. It reads a constant instead. The cache returns the same arrays for all
    layers, so that a program has them once.
    """
    positions = np.arange(first_position, first_position + num_tokens, dtype=np.float64)
    frequencies = BASE ** (-2 / features * np.arange(features // 2))
    angles = np.multiply.outer(positions, frequencies)
    shape = (1,) * (ndim - 2) + (num_tokens, features // 2)
    return (
        np.cos(angles).astype(dtype).reshape(shape),
        np.sin(angles).astype(dtype).reshape(shape),
    )


def compute_sinusoids(positions: Array, features: int, dtype: DTypeLike = jnp.float32) -> Array:
    """Return sines, then cosines of positions [...], as [..., features] (Dai et al., 2019)."""
    angles = compute_angles(positions, features, dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def shift_relative(scores: Array, num_keys: int) -> Array:
    """Convert scores per distance to scores per key, without gathering pairs (Dai et al., 2019).

    Args:
      scores: [..., T, L]. Entry (t, l) is the score of query t for the distance D − l, where D is
        the largest distance, between the last query and the first key.
      num_keys: S, the number of keys, at most L.

    Returns:
      [..., T, S], where entry (t, s) is entry (t, T − 1 − t + s) of `scores`. If L < T + S − 1,
      this index can reach L. Such entries hold unrelated scores, and the caller must mask them.
    """
    *leading, num_queries, num_distances = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
    shifted = padded.reshape(*leading, num_distances + 1, num_queries)[..., 1:, :]
    return shifted.reshape(scores.shape)[..., :num_keys]
