"""The embedding of the tokens, and the softmax that predicts the next token."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import linear
from mi.lm.loss import Losses, Objective, softmax_losses


class Words(nn.Module):
    """An embedding e_w for every word, and a softmax over all words.

        x = √E e_w,   logits = y · o_w + b_w,   where o_w = e_w if tied

    Attributes:
      vocabulary: V.
      features: E.
      tied: whether the output embedding is the input embedding (Press & Wolf, 2017).
      objective: options of the loss.
      dtype: dtype of the products. Parameters, logits and losses are f32.
    """

    vocabulary: int
    features: int
    tied: bool = True
    objective: Objective = Objective()
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        V, E = self.vocabulary, self.features
        self.embedding = self.param('embedding', initializers.normal(E**-0.5), (V, E))
        if not self.tied:
            self.output = self.param('output', initializers.normal(E**-0.5), (V, E))
        self.bias = self.param('bias', initializers.zeros, (V,))

    def embed(self, tokens: Array) -> Array:
        """Return the embeddings x [..., E] of ids [...]."""
        return (self.embedding[tokens] * self.features**0.5).astype(self.dtype)

    def logits(self, y: Array) -> Array:
        """Compute the logits [..., V] of all words, in f32, from y [..., E]."""
        table = self.embedding if self.tied else self.output
        logits = linear(y, table.T.astype(self.dtype), out_dtype=jnp.float32)
        return logits + self.bias.reshape((1,) * (y.ndim - 1) + (-1,))

    def losses(self, y: Array, targets: Array) -> Losses:
        """Compute the losses of targets [...] from y [..., E]."""
        table = self.embedding if self.tied else self.output
        return softmax_losses(y, table, self.bias, targets, self.objective)
