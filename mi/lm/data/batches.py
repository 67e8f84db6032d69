"""Batches of tokens for training, and the loader that places them on devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from mi.lm.data.corpus import Corpus
from mi.lm.data.streams import Stream
from mi.training import sharding


class Batch(NamedTuple):
    """The input of one update: T + 1 tokens from each of B streams.

    In a batch for all seeds, every array except `step` has a leading axis of seeds, [S, …].

    Attributes:
      tokens: ids [T + 1, B]. Rows 0 … T − 1 are the inputs, rows 1 … T the targets.
      domains: domain of each token, [T + 1, B], or None for a model that does not use domains.
      seed: seed of the run, int32.
      step: number of updates before this one, int32. Dropout depends on `seed` and `step`.
    """

    tokens: Array
    domains: Array | None
    seed: Array
    step: Array | np.int32


class BatchLoader:
    """A loader of batches for all seeds, [S, …]. Each device gets its own seeds and rows.

    Args:
      corpus: the corpus, whose training text is read.
      streams: token streams, one for each seed.
      seeds: the seeds, int32 [S].
      has_domains: whether batches include the domain of each token.
      mesh: mesh of devices.
    """

    def __init__(
        self,
        corpus: Corpus,
        streams: list[Stream],
        seeds: np.ndarray,
        has_domains: bool,
        mesh: jax.sharding.Mesh,
    ):
        self._corpus, self._streams, self._has_domains = corpus, streams, has_domains
        self._shape = len(streams), *streams[0].get_positions(0).shape
        self._seeds = sharding.shard_array(seeds, sharding.seed_sharding(mesh))
        self._sharding = sharding.batch_sharding(mesh, 2, has_seeds=True)

    def load(self, step: int) -> Batch:
        """Return the batch for the update that follows `step` updates."""
        train_tokens = self._corpus.tokens['train']
        tokens = self._place(step, lambda positions: train_tokens[positions].astype(np.int32))
        domains = None
        if self._has_domains:
            domains = self._place(step, functools.partial(self._corpus.get_domains, 'train'))
        return Batch(tokens, domains, self._seeds, np.int32(step))

    def _place(self, step: int, look_up: Callable[[np.ndarray], np.ndarray]) -> Array:
        """Place on each device the values that `look_up` returns for its positions in the text."""

        def load_shard(shard_index: tuple[slice, ...] | None) -> np.ndarray:
            assert shard_index is not None
            seed_slice, _, readers = shard_index
            streams = self._streams[seed_slice]
            positions = [stream.get_positions(step, readers) for stream in streams]
            return look_up(np.stack(positions))

        return jax.make_array_from_callback(self._shape, self._sharding, load_shard)
