"""Random keys whose programs compile in a third of the time of those of threefry.

A program that draws spends most of its compilation on the generator. Where a test needs random
numbers and not those of a particular generator, it takes its keys here. Not for anything else: a
key has 32 bits.
"""

import math

import jax
import jax.numpy as jnp
from chex import Array, PRNGKey
from jax.extend.random import define_prng_impl

GOLDEN_RATIO = 0x9E3779B9  # 2³² / φ: it spreads successive integers over all words


def key(seed: int | Array) -> PRNGKey:
    """Return a typed key for `jax.random`, as `jax.random.key(seed)` does."""
    return jax.random.key(seed, impl=HASH)


def _mix(words: Array) -> Array:
    """Return words with every bit a function of all bits: the finalizer of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _hash_counters(words: Array, count: int) -> Array:
    counters = jax.lax.iota(jnp.uint32, count) * jnp.uint32(GOLDEN_RATIO)
    return _mix(_mix(counters + words[0]) + words[0])


def _seed(seed: Array) -> Array:
    return _mix(seed.astype(jnp.uint32).reshape(1) + jnp.uint32(GOLDEN_RATIO))


def _split(words: Array, shape: tuple[int, ...]) -> Array:
    return _hash_counters(words ^ jnp.uint32(0x5BD1E995), math.prod(shape)).reshape(*shape, 1)


def _draw_bits(words: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    drawn = _hash_counters(words, math.prod(shape)).reshape(shape)
    if bit_width == 64:
        low = _hash_counters(words + jnp.uint32(1), math.prod(shape)).reshape(shape)
        return (drawn.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return (drawn >> (32 - bit_width)).astype(jnp.dtype(f'uint{bit_width}'))


def _fold_in(words: Array, data: Array) -> Array:
    return _mix(words + _mix(data.astype(jnp.uint32) + jnp.uint32(GOLDEN_RATIO)))


HASH = define_prng_impl(
    key_shape=(1,), seed=_seed, split=_split, random_bits=_draw_bits, fold_in=_fold_in, name='hash'
)
