"""The adaptive softmax and the embedding that shares its tables.

Shapes: y [..., E], targets [...], logits [..., V] for a vocabulary of V words.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import linear
from mi.lm.loss import Losses, Objective, even_size, losses_from_logits


class AdaptiveWords(nn.Module):
    """An adaptive softmax and its embedding, with fewer features for rarer words.

    Word ids are sorted by descending frequency. The cutoffs (a, b, …) divide them into a head,
    0 … a − 1, and tails, a … b − 1, b … V − 1 (Grave et al., 2017). In tail i, the embedding e_w
    has D = E / divisor^i features, and a matrix P_i [D, E] projects it to E features.

        head:     x = √E e_w,      p(w) = p_head(w),                  logits y · o_w + b_w
        tail i:   x = √E e_w P_i,  p(w) = p_head(tail i) · p_i(w),    logits (y P_iᵀ) · o_w + b_w

    The head also has one logit y · t_i + c_i for each tail. If `tied` is True, o_w = e_w, and
    input and output share P_i (Baevski & Auli, 2019).

    The logits of a tail are computed only for tokens in that tail. These tokens are gathered into
    blocks of a fixed size, and empty blocks are skipped. No token is dropped. Under vmap every
    block is computed.

    Attributes:
      vocabulary: V.
      features: E.
      cutoffs: first id of each tail.
      divisor: ratio of the features of one cluster to those of the next.
      tied: whether input and output share their tables.
      chunk: maximum number of tokens in a block, both for the head and for the tails. 0 puts all
        tokens into one block for the head, and an eighth of them into each block of a tail.
      dtype: dtype of the products. Parameters and losses are f32.
    """

    vocabulary: int
    features: int
    cutoffs: tuple[int, ...]
    divisor: int = 4
    tied: bool = True
    chunk: int = 0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        # The clusters, and the features of each.
        E, cluster_edges = self.features, [0, *self.cutoffs, self.vocabulary]
        if sorted(set(cluster_edges)) != cluster_edges:
            raise ValueError(
                f'cutoffs = {self.cutoffs}: expected increasing integers between 1 and '
                f'{self.vocabulary - 1}, one less than the vocabulary size'
            )
        self.clusters = list(itertools.pairwise(cluster_edges))
        widths = [max(1, E // self.divisor**i) for i in range(len(self.clusters))]
        cluster_sizes = [end - start for start, end in self.clusters]

        def make_tables(prefix: str) -> list[Array]:
            return [
                self.param(f'{prefix}_{i}', initializers.normal(width**-0.5), (size, width))
                for i, (size, width) in enumerate(zip(cluster_sizes, widths, strict=True))
            ]

        def make_projections(prefix: str) -> list[Array]:
            # Rows of unit length: a projection keeps the variance.
            return [
                self.param(f'{prefix}_{i}', initializers.normal(E**-0.5), (width, E))
                for i, width in enumerate(widths)
                if i > 0
            ]

        # The input side, the output side, and the tails' entries in the head.
        self.embedding, self.P = make_tables('embedding'), make_projections('P')
        self.output = self.embedding if self.tied else make_tables('output')
        self.P_out = self.P if self.tied else make_projections('P_out')
        num_tails = len(self.cutoffs)
        self.T = self.param('T', initializers.normal(E**-0.5), (num_tails, E))
        self.bias = [
            self.param(f'bias_{i}', initializers.zeros, (size + (num_tails if i == 0 else 0),))
            for i, size in enumerate(cluster_sizes)
        ]

    def embed(self, tokens: Array) -> Array:
        """Return the embeddings x [..., E] of ids [...]."""
        x = jnp.zeros((*tokens.shape, self.features), self.dtype)
        for cluster, (first_id, end_id) in enumerate(self.clusters):
            is_inside = (tokens >= first_id) & (tokens < end_id)
            table_rows = jnp.where(is_inside, tokens - first_id, 0)
            embeddings = self.embedding[cluster][table_rows].astype(self.dtype)
            if cluster > 0:
                embeddings = linear(embeddings, self.P[cluster - 1].astype(self.dtype))
            x = jnp.where(is_inside[..., None], embeddings * self.features**0.5, x)
        return x

    def losses(self, y: Array, targets: Array) -> Losses:
        """Compute the losses of targets [...] from y [..., E]."""
        flat_features = jnp.asarray(y, self.dtype).reshape(-1, y.shape[-1])
        flat_targets = jnp.asarray(targets).reshape(-1)
        nats = self._compute_head_nats(flat_features, flat_targets)
        for tail, (first_id, end_id) in enumerate(self.clusters[1:], start=1):
            is_inside = (flat_targets >= first_id) & (flat_targets < end_id)
            tail_targets = jnp.where(is_inside, flat_targets - first_id, -1)
            nats = nats + self._compute_tail_nats(tail, flat_features, tail_targets)
        nats = nats.reshape(targets.shape)
        return Losses(nats, nats)

    def logits(self, y: Array) -> Array:
        """Compute the log-probabilities of all words, [..., V] in f32, from y [..., E]."""
        y = y.astype(self.dtype)
        head_log_probs = jax.nn.log_softmax(self._head_logits(y))
        head_size = self.clusters[0][1]
        log_probs = [head_log_probs[..., :head_size]]
        for tail in range(1, len(self.clusters)):
            tail_log_probs = jax.nn.log_softmax(self._tail_logits(tail, y))
            log_probs.append(head_log_probs[..., head_size + tail - 1, None] + tail_log_probs)
        return jnp.concatenate(log_probs, axis=-1)

    def _head_logits(self, y: Array) -> Array:
        head_table = jnp.concatenate([self.output[0], self.T]).astype(self.dtype)
        return _add_bias(linear(y, head_table.T, out_dtype=jnp.float32), self.bias[0])

    def _tail_logits(self, tail: int, y: Array) -> Array:
        y = linear(y, self.P_out[tail - 1].T.astype(self.dtype))
        tail_table = self.output[tail].astype(self.dtype)
        return _add_bias(linear(y, tail_table.T, out_dtype=jnp.float32), self.bias[tail])

    def _compute_head_nats(self, y: Array, targets: Array) -> Array:
        """Compute −ln p_head of each token's word or tail."""
        head_entries = targets
        head_size = self.clusters[0][1]
        for tail_entry, (first_id, end_id) in enumerate(self.clusters[1:], start=head_size):
            is_inside = (targets >= first_id) & (targets < end_id)
            head_entries = jnp.where(is_inside, tail_entry, head_entries)

        @jax.checkpoint
        def compute_block(block: tuple[Array, Array]) -> Array:
            y, head_entries = block
            return losses_from_logits(self._head_logits(y), head_entries, Objective()).nats

        num_tokens = len(targets)
        block_size = even_size(num_tokens, self.chunk or num_tokens)
        blocks = _split_blocks(y, block_size), _split_blocks(head_entries, block_size)
        return jax.lax.map(compute_block, blocks).reshape(-1)[:num_tokens]

    def _compute_tail_nats(self, tail: int, y: Array, tail_targets: Array) -> Array:
        """Compute −ln p_i of the tokens in tail i, and 0 for all other tokens.

        Args:
          tail: index of the tail, starting at 1.
          y: features [N, E].
          tail_targets: index of each target within the tail, [N], or −1 for tokens outside the
            tail.
        """
        num_tokens = len(tail_targets)
        block_size = even_size(num_tokens, self.chunk or -(-num_tokens // 8))
        is_inside = tail_targets >= 0

        # Sort the tail's tokens to the front, so that the blocks after them are skipped.
        token_order = jnp.argsort(~is_inside, stable=True)

        def compute_block(token_index: Array) -> Array:
            def compute() -> Array:
                logits = self._tail_logits(tail, y[token_index])
                block_targets = jnp.maximum(tail_targets[token_index], 0)
                nats = losses_from_logits(logits, block_targets, Objective()).nats
                return jnp.where(is_inside[token_index], nats, 0.0)

            has_token = is_inside[token_index].any()
            return jax.lax.cond(has_token, jax.checkpoint(compute), lambda: jnp.zeros(block_size))

        blocks = _split_blocks(token_order, block_size)
        nats = jax.lax.map(compute_block, blocks).reshape(-1)[:num_tokens]
        return jnp.zeros(num_tokens).at[token_order].set(nats)


def _split_blocks(array: Array, block_size: int) -> Array:
    """Split an array [N, …] into [blocks, size, …]. The last block is padded with row 0."""
    num_blocks = -(-len(array) // block_size)
    row_index = jnp.arange(num_blocks * block_size)
    row_index = jnp.where(row_index < len(array), row_index, 0)
    return array[row_index].reshape(num_blocks, block_size, *array.shape[1:])


def _add_bias(logits: Array, bias: Array) -> Array:
    return logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
