"""The adaptive softmax, and the embedding that shares its tables.

Shapes: y [..., E], targets [...]; V words in clusters of c_0, c_1, …
"""

import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import linear
from mi.lm.loss import Losses, even_size


class AdaptiveWords(nn.Module):
    """Words in clusters by frequency, with fewer features for rarer words (Grave et al., 2017).

    Ids are sorted by frequency, descending. Cutoffs (a, b, …) make the head 0 … a − 1 and the tails
    a … b − 1, b … V − 1. Tail i has e_w of D = E / divisor^i features and a matrix P_i [D, E].

        p(w) = p_head(w),   p_head(tail i) · p_i(w) in tail i
        logits of the head y · o_w + b_w, and y · t_i + c_i for each tail; of tail i (y P_iᵀ) · o_w
        x = √E e_w in the head,   √E e_w P_i in tail i

    If tied, o_w = e_w and the same P_i serve both (Baevski & Auli, 2019).

    A tail's logits are computed for its tokens alone. These are gathered into blocks of a fixed
    size; blocks without a token are skipped, and no token is ever dropped. Under vmap every block
    is computed.

    Attributes:
      vocabulary: V.
      features: E.
      cutoffs: first id of each tail.
      divisor: ratio of the features of one cluster to those of the next.
      tied: whether input and output share their tables.
      chunk: tokens of a block, and tokens whose logits of the head are in memory simultaneously; 0
        for an eighth of the tokens and for all tokens.
      dtype: dtype of the products; parameters and losses are f32.
    """

    vocabulary: int
    features: int
    cutoffs: tuple[int, ...]
    divisor: int = 4
    tied: bool = True
    chunk: int = 0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        E, ends = self.features, [0, *self.cutoffs, self.vocabulary]
        if sorted(set(ends)) != ends:
            raise ValueError(
                f'cutoffs = {self.cutoffs}: expected increasing integers above 0 and below the '
                f'vocabulary of {self.vocabulary}'
            )
        self.clusters = list(itertools.pairwise(ends))
        widths = [max(1, E // self.divisor**i) for i in range(len(self.clusters))]
        sizes = [end - start for start, end in self.clusters]

        def tables(name: str) -> list[Array]:
            return [
                self.param(f'{name}_{i}', initializers.normal(width**-0.5), (size, width))
                for i, (size, width) in enumerate(zip(sizes, widths, strict=True))
            ]

        def projections(name: str) -> list[Array]:
            # Rows of unit length: a projection keeps the variance.
            return [
                self.param(f'{name}_{i}', initializers.normal(E**-0.5), (width, E))
                for i, width in enumerate(widths)
                if i > 0
            ]

        self.embedding, self.P = tables('embedding'), projections('P')
        self.output = self.embedding if self.tied else tables('output')
        self.P_out = self.P if self.tied else projections('P_out')
        tails = len(self.cutoffs)
        self.T = self.param('T', initializers.normal(E**-0.5), (tails, E))
        self.bias = [
            self.param(f'bias_{i}', initializers.zeros, (size + (tails if i == 0 else 0),))
            for i, size in enumerate(sizes)
        ]

    def embed(self, tokens: Array) -> Array:
        """Return x [..., E] of ids [...]."""
        x = jnp.zeros((*tokens.shape, self.features), self.dtype)
        for i, (start, end) in enumerate(self.clusters):
            is_inside = (tokens >= start) & (tokens < end)
            rows = self.embedding[i][jnp.where(is_inside, tokens - start, 0)].astype(self.dtype)
            if i > 0:
                rows = linear(rows, self.P[i - 1].astype(self.dtype))
            x = jnp.where(is_inside[..., None], rows * self.features**0.5, x)
        return x

    def losses(self, y: Array, targets: Array) -> Losses:
        """Return the losses of targets [...], given y [..., E]."""
        flat = jnp.asarray(y, self.dtype).reshape(-1, y.shape[-1])
        ids = jnp.asarray(targets).reshape(-1)
        nats = self._compute_head_nats(flat, ids)
        for i, (start, end) in enumerate(self.clusters[1:], start=1):
            is_inside = (ids >= start) & (ids < end)
            nats = nats + self._compute_tail_nats(i, flat, jnp.where(is_inside, ids - start, -1))
        nats = nats.reshape(targets.shape)
        return Losses(nats, nats)

    def logits(self, y: Array) -> Array:
        """Return ln p of every word, [..., V] in f32, given y [..., E]."""
        y = y.astype(self.dtype)
        head = jax.nn.log_softmax(self._head_logits(y))
        head_size = self.clusters[0][1]
        parts = [head[..., :head_size]]
        for i in range(1, len(self.clusters)):
            tail = jax.nn.log_softmax(self._tail_logits(i, y))
            parts.append(head[..., head_size + i - 1, None] + tail)
        return jnp.concatenate(parts, axis=-1)

    def _head_logits(self, y: Array) -> Array:
        table = jnp.concatenate([self.output[0], self.T]).astype(self.dtype)
        return _add_bias(linear(y, table.T, out_dtype=jnp.float32), self.bias[0])

    def _tail_logits(self, i: int, y: Array) -> Array:
        y = linear(y, self.P_out[i - 1].T.astype(self.dtype))
        table = self.output[i].astype(self.dtype)
        return _add_bias(linear(y, table.T, out_dtype=jnp.float32), self.bias[i])

    def _compute_head_nats(self, y: Array, ids: Array) -> Array:
        """Compute −ln p_head of each token's word or tail."""
        entries = ids
        head_size = self.clusters[0][1]
        for i, (start, end) in enumerate(self.clusters[1:]):
            entries = jnp.where((ids >= start) & (ids < end), head_size + i, entries)

        @jax.checkpoint
        def compute_block(block: tuple[Array, Array]) -> Array:
            y, entries = block
            return _compute_nats(self._head_logits(y), entries)

        num_tokens = len(ids)
        size = even_size(num_tokens, self.chunk or num_tokens)
        blocks = _split_blocks(y, size), _split_blocks(entries, size)
        return jax.lax.map(compute_block, blocks).reshape(-1)[:num_tokens]

    def _compute_tail_nats(self, i: int, y: Array, ids: Array) -> Array:
        """Compute −ln p_i of the tokens in tail i, with 0 for the other tokens.

        Args:
          i: number of the tail, from 1.
          y: [N, E].
          ids: positions of the words in the tail, [N]; −1 for tokens outside the tail.
        """
        num_tokens = len(ids)
        size = even_size(num_tokens, self.chunk or -(-num_tokens // 8))
        is_inside = ids >= 0
        # Sort the tail's tokens to the front, so that the blocks after them are skipped.
        order = jnp.argsort(~is_inside, stable=True)

        def compute_block(index: Array) -> Array:
            def compute() -> Array:
                nats = _compute_nats(self._tail_logits(i, y[index]), jnp.maximum(ids[index], 0))
                return jnp.where(is_inside[index], nats, 0.0)

            has_token = is_inside[index].any()
            return jax.lax.cond(has_token, jax.checkpoint(compute), lambda: jnp.zeros(size))

        nats = jax.lax.map(compute_block, _split_blocks(order, size)).reshape(-1)[:num_tokens]
        return jnp.zeros(num_tokens).at[order].set(nats)


def _split_blocks(array: Array, size: int) -> Array:
    """Split [N, …] into [blocks, size, …]; row 0 pads the last block."""
    count = -(-len(array) // size)
    index = jnp.arange(count * size)
    index = jnp.where(index < len(array), index, 0)
    return array[index].reshape(count, size, *array.shape[1:])


def _compute_nats(logits: Array, targets: Array) -> Array:
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def _add_bias(logits: Array, bias: Array) -> Array:
    return logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
