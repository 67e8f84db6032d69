"""An adaptive softmax, and the embedding that shares its tables.

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
    """Words in clusters by frequency, the rarer the smaller (Grave et al., 2017).

    Ids are sorted, the most frequent first; cutoffs (a, b, …) make the head 0 … a − 1 and the tails
    a … b − 1, b … V − 1. Tail i has e_w of D = E / divisor^i features and a matrix P_i [D, E].

        p(w) = p_head(w),   p_head(tail i) · p_i(w) in tail i
        logits of the head y · o_w + b_w, and y · t_i + c_i for each tail; of tail i (y P_iᵀ) · o_w
        x = √E e_w in the head,   √E e_w P_i in tail i

    Tied, o_w = e_w and the same P_i serve both (Baevski & Auli, 2019).

    A tail's logits are made for its own tokens alone: they are gathered in blocks of a fixed size,
    as many blocks as there are tokens for, so that none is ever dropped however they are
    distributed. Under vmap every block is computed, whether it holds a token or not.

    Attributes:
      vocabulary: V.
      features: E.
      cutoffs: first id of each tail.
      divisor: as above.
      tied: as above.
      chunk: tokens of a block, and of the head at once; 0 for an eighth of the tokens and all.
      dtype: of the products; parameters and losses are f32.
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
                f'cutoffs {self.cutoffs} must rise from above 0 to below the vocabulary of '
                f'{self.vocabulary}'
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
            # Rows of unit length: what is projected keeps its variance.
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
        """Ids [...] → x [..., E]."""
        x = jnp.zeros((*tokens.shape, self.features), self.dtype)
        for i, (start, end) in enumerate(self.clusters):
            inside = (tokens >= start) & (tokens < end)
            rows = self.embedding[i][jnp.where(inside, tokens - start, 0)].astype(self.dtype)
            if i > 0:
                rows = linear(rows, self.P[i - 1].astype(self.dtype))
            x = jnp.where(inside[..., None], rows * self.features**0.5, x)
        return x

    def losses(self, y: Array, targets: Array) -> Losses:
        """y [..., E], ids [...] → what each target costs."""
        flat = jnp.asarray(y, self.dtype).reshape(-1, y.shape[-1])
        ids = jnp.asarray(targets).reshape(-1)
        cost = self._of_head(flat, ids)
        for i, (start, end) in enumerate(self.clusters[1:], start=1):
            inside = (ids >= start) & (ids < end)
            cost = cost + self._of_tail(i, flat, jnp.where(inside, ids - start, -1))
        cost = cost.reshape(targets.shape)
        return Losses(cost, cost)

    def logits(self, y: Array) -> Array:
        """ln p of every word: y [..., E] → [..., V] in f32."""
        y = y.astype(self.dtype)
        head = jax.nn.log_softmax(self._head(y))
        first = self.clusters[0][1]
        parts = [head[..., :first]]
        for i in range(1, len(self.clusters)):
            tail = jax.nn.log_softmax(self._tail(i, y))
            parts.append(head[..., first + i - 1, None] + tail)
        return jnp.concatenate(parts, axis=-1)

    def _head(self, y: Array) -> Array:
        table = jnp.concatenate([self.output[0], self.T]).astype(self.dtype)
        return _biased(linear(y, table.T, out_dtype=jnp.float32), self.bias[0])

    def _tail(self, i: int, y: Array) -> Array:
        y = linear(y, self.P_out[i - 1].T.astype(self.dtype))
        table = self.output[i].astype(self.dtype)
        return _biased(linear(y, table.T, out_dtype=jnp.float32), self.bias[i])

    def _of_head(self, y: Array, ids: Array) -> Array:
        """−ln p_head of each token's word or tail."""
        entry = ids
        first = self.clusters[0][1]
        for i, (start, end) in enumerate(self.clusters[1:]):
            entry = jnp.where((ids >= start) & (ids < end), first + i, entry)

        @jax.checkpoint
        def one(row: tuple[Array, Array]) -> Array:
            return _nats(self._head(row[0]), row[1])

        tokens = len(ids)
        size = even_size(tokens, self.chunk or tokens)
        rows = _blocks(y, size), _blocks(entry, size)
        return jax.lax.map(one, rows).reshape(-1)[:tokens]

    def _of_tail(self, i: int, y: Array, ids: Array) -> Array:
        """−ln p_i of the tokens in tail i, 0 of the others; ids are −1 for those."""
        tokens = len(ids)
        size = even_size(tokens, self.chunk or -(-tokens // 8))
        there = ids >= 0
        # The tail's tokens first, in order; those beyond the last one are not looked at.
        order = jnp.argsort(~there, stable=True)
        places = _blocks(order, size)

        def block(place: Array) -> Array:
            def compute() -> Array:
                cost = _nats(self._tail(i, y[place]), jnp.maximum(ids[place], 0))
                return jnp.where(there[place], cost, 0.0)

            return jax.lax.cond(
                there[place].any(), jax.checkpoint(compute), lambda: jnp.zeros(size)
            )

        costs = jax.lax.map(block, places).reshape(-1)[:tokens]
        return jnp.zeros(tokens).at[order].set(costs)


def _blocks(a: Array, size: int) -> Array:
    """[N, …] → [blocks, size, …], the last one filled up with row 0."""
    count = -(-len(a) // size)
    index = jnp.arange(count * size)
    return a[jnp.where(index < len(a), index, 0)].reshape(count, size, *a.shape[1:])


def _nats(logits: Array, targets: Array) -> Array:
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own


def _biased(logits: Array, bias: Array) -> Array:
    return logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
