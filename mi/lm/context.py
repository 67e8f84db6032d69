"""Sources of a language model's context z_t, which depends only on tokens before t.

    recurrent   the state of a small LSTM over the embedded tokens
    summary     a decaying mean of the embedded tokens, with one decay for each feature
    domain      the domain of the document, as a one-hot vector
    state       the state of the recurrent core (see mi.lm.recurrent)

Shapes: T steps, B sequences, E embedding, m context.
"""

from typing import Literal, get_args

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
    """The state of an LSTM over the embedded tokens: z_t = h_{t−1}.

    Attributes:
      features: m.
      dtype: dtype of the products.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: cells.Carry, x: Array) -> tuple[cells.Carry, Array]:
        """Map the carry and x [T, B, E] to the new carry and z [T, B, m]."""
        next_carry, hidden = cells.LSTM(self.features, dtype=self.dtype, name='lstm')(carry, x)
        return next_carry, previous(carry[1], hidden)

    def initial(self, batch: int) -> cells.Carry:
        """Return the all-zero initial state."""
        return cells.initial_carry(batch, self.features)


class Summary(nn.Module):
    """A decaying mean of the embedded tokens.

        z_t = s_{t−1},   s_t = λ ⊙ s_{t−1} + √(1 − λ²) ⊙ (A x_t + c)

    The factor √(1 − λ²) preserves the variance of white inputs. The decay λ = exp(−1/τ) is learned.
    The time constants τ are initialized evenly in log τ, from 1 to `longest` steps.

    Attributes:
      features: m.
      longest: largest initial time constant τ, in steps.
      dtype: dtype of the product. The sums are f32.
    """

    features: int
    longest: float = 256.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: Array, x: Array) -> tuple[Array, Array]:
        """Map s [B, m] and x [T, B, E] to the new s and z [T, B, m]."""
        m = self.features
        log_tau = self.param(
            'log_tau', lambda _: jnp.linspace(0, jnp.log(self.longest), m, dtype=jnp.float32)
        )
        decay = jnp.exp(-jnp.exp(-log_tau)).reshape(1, 1, m)
        inputs = Affine(m, self.dtype, name='input')(x).astype(jnp.float32)
        inputs = jnp.sqrt(1 - decay**2) * inputs
        inputs = inputs.at[0].add(decay[0] * carry)

        # s_t = λ s_{t−1} + inputs_t for all t in parallel.
        def compose(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
            return left[0] * right[0], left[1] * right[0] + right[1]

        decays = jnp.broadcast_to(decay, inputs.shape)
        _, states = jax.lax.associative_scan(compose, (decays, inputs))
        return states[-1], previous(carry, states).astype(self.dtype)

    def initial(self, batch: int) -> Array:
        """Return the all-zero initial state."""
        return jnp.zeros((batch, self.features))


NETWORKS: dict[str, type[RecurrentContext] | type[Summary]] = {
    'recurrent': RecurrentContext,
    'summary': Summary,
}


def previous(first: Array, h: Array) -> Array:
    """Shift h [T, B, …] by one step: row t becomes h[t − 1], and row 0 becomes `first` [B, …]."""
    return jnp.concatenate([first[None].astype(h.dtype), h[:-1]])
