"""Where the context z_t of a language model comes from: always from tokens before t.

    recurrent   the state of a small LSTM that reads the embedded tokens
    summary     a decaying mean of the embedded tokens, each feature with a memory of its own
    domain      one-hot, the number of the document's domain
    state       the state of the recurrent core itself; made there, see mi.lm.recurrent

Shapes: T steps, B sequences, E embedding, m context.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi import cells
from mi.layers import Affine

Source = Literal['recurrent', 'summary', 'domain', 'state']
SOURCES = get_args(Source)


class RecurrentContext(nn.Module):
    """z_t = h_{t−1} of an LSTM over the embedded tokens.

    Attributes:
      features: m.
      dtype: of the products.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: cells.Carry, x: Array) -> tuple[cells.Carry, Array]:
        """x [T, B, E] → z [T, B, m], and the carry after."""
        after, h = cells.LSTM(self.features, dtype=self.dtype, name='lstm')(carry, x)
        return after, previous(carry[1], h)

    def initial(self, batch: int) -> cells.Carry:
        return cells.initial_carry(batch, self.features)


class Summary(nn.Module):
    """z_t = s_{t−1},   s_t = λ ⊙ s_{t−1} + √(1 − λ²) ⊙ (A x_t + c).

    The factor keeps the variance of white inputs. λ = exp(−1/τ) is learnt; τ, the steps that a
    feature remembers, starts spread from 1 to `longest`, evenly in log τ.

    Attributes:
      features: m.
      longest: the largest τ at the start.
      dtype: of the product; the sums are f32.
    """

    features: int
    longest: float = 256.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: Array, x: Array) -> tuple[Array, Array]:
        """s [B, m], x [T, B, E] → s after, z [T, B, m]."""
        m = self.features
        log_tau = self.param(
            'log_tau', lambda _: jnp.linspace(0, jnp.log(self.longest), m, dtype=jnp.float32)
        )
        decay = jnp.exp(-jnp.exp(-log_tau)).reshape(1, 1, m)
        a = Affine(m, self.dtype, name='input')(x).astype(jnp.float32)
        a = jnp.sqrt(1 - decay**2) * a
        a = a.at[0].add(decay[0] * carry)

        def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, s = jax.lax.associative_scan(join, (jnp.broadcast_to(decay, a.shape), a))
        return s[-1], previous(carry, s).astype(self.dtype)

    def initial(self, batch: int) -> Array:
        return jnp.zeros((batch, self.features))


NETWORKS: dict[str, Any] = {'recurrent': RecurrentContext, 'summary': Summary}


def previous(first: Array, h: Array) -> Array:
    """[T, B, …] with row t what h has at t − 1, and `first` [B, …] in row 0."""
    return jnp.concatenate([first[None].astype(h.dtype), h[:-1]])
