"""Words in and out: the embedding of a token, and what the next one costs."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.linear import linear
from mi.lm.loss import Losses, softmax_losses


class Objective(NamedTuple):
    """How the loss is made, see `mi.lm.loss.softmax_losses`.

    Attributes:
      label_smoothing, z_loss: weights of the terms beside −ln p(target).
      chunk: tokens whose logits are there at once; 0 for all.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0


class Words(nn.Module):
    """An embedding e_w of every word, and the softmax over all of them.

        x = √E e_w,   logits = y · o_w + b_w,   o_w = e_w where tied

    Attributes:
      vocabulary: V.
      features: E.
      tied: whether the output embedding is the input embedding (Press & Wolf, 2017).
      objective: see there.
      dtype: of the products; parameters, logits and losses are f32.
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
        """Ids [...] → x [..., E]."""
        return (self.embedding[tokens] * self.features**0.5).astype(self.dtype)

    def logits(self, y: Array) -> Array:
        """y [..., E] → [..., V] in f32."""
        table = self.embedding if self.tied else self.output
        logits = linear(y, table.T.astype(self.dtype), out_dtype=jnp.float32)
        return logits + self.bias.reshape((1,) * (y.ndim - 1) + (-1,))

    def losses(self, y: Array, targets: Array) -> Losses:
        """y [..., E], ids [...] → what each target costs."""
        table = self.embedding if self.tied else self.output
        return softmax_losses(y, table, self.bias, targets, **self.objective._asdict())
