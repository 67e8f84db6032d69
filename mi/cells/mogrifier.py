"""The Mogrifier LSTM, in which x and h gate each other before the LSTM."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.cells.initializers import forget_bias, orthogonal_gates
from mi.cells.state import check_shapes, initial_carry
from mi.kernels.linear import accumulation_dtype
from mi.kernels.lstm import (
    Carry,
    broadcast_row,
    multiply,
    scan_lstm,
    update_carry,
)


class MogrifierLSTM(nn.Module):
    """Mogrifier LSTM (Melis et al., 2020): x and h gate each other before the LSTM reads them.

        for round i = 1 … r:   x ← 2σ(h Q_i + q_i) ⊙ x   for odd i
                               h ← 2σ(x R_i + r_i) ⊙ h   for even i
        i, f, o, j = x W + h U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    The rounds start from x_t and h_{t−1}. Q_i is [H, n], R_i is [n, H], and the weights of the LSTM
    are as in `LSTM`. With a `rank`, Q_i is the product of Q_i_left [H, rank] and Q_i_right [rank,
    n], and likewise for R_i. The biases q_i [n] and r_i [H] start at 0. They are from the authors'
    code; the paper's equations have no biases.

    No product can be computed before the loop, because the first round needs h_{t−1}.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      rounds: r, the number of rounds. With 0 rounds, this is the LSTM.
      rank: rank of every Q_i and R_i, or None for full matrices.
      capped: whether to limit the input gate to min(1 − σ(f), σ(i)), which keeps c in [−1, 1].
    """

    features: int
    rounds: int = 5
    rank: int | None = None
    capped: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """Return the last carry (c, h), and h of every step [T, B, H].

        Raises:
          ValueError: if rounds < 0 or rank < 1, or the shapes do not match.
        """
        hidden_size, input_size = self.features, x.shape[-1]
        check_shapes(carry, x, reset, keep, (hidden_size, hidden_size))
        if self.rounds < 0 or (self.rank is not None and self.rank < 1):
            raise ValueError(
                f'rounds = {self.rounds}, rank = {self.rank}: expected rounds of at least 0, '
                'and a rank of at least 1 or None for full matrices'
            )

        # The parameters of the LSTM.
        gates_size, lecun_normal = 4 * hidden_size, initializers.lecun_normal()
        W = self.param('W', lecun_normal, (input_size, gates_size), self.param_dtype)
        U = self.param('U', orthogonal_gates, (hidden_size, gates_size), self.param_dtype)
        b = self.param('b', forget_bias, (gates_size,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)

        # The factors and the bias of each round.
        dtype = x.dtype
        rounds = []
        for round_index in range(1, self.rounds + 1):
            shape = (hidden_size, input_size) if round_index % 2 else (input_size, hidden_size)
            letter = 'Q' if round_index % 2 else 'R'
            factors = self._make_factors(f'{letter}_{round_index}', *shape)
            bias_name = f'{letter.lower()}_{round_index}'
            bias = self.param(bias_name, initializers.zeros, shape[1:], self.param_dtype)
            rounds.append(([factor.astype(dtype) for factor in factors], bias))

        # The loop.
        def step(carry: Carry, x_t: Array) -> tuple[Carry, Array]:
            (cell, hidden), x_t = carry, x_t.astype(accumulation_dtype(dtype))
            for round_index, (factors, bias) in enumerate(rounds, start=1):
                is_odd = round_index % 2 == 1
                product = functools.reduce(multiply, factors, hidden if is_odd else x_t)
                gate = 2 * nn.sigmoid(product + broadcast_row(bias, 2, dtype))
                x_t, hidden = (gate * x_t, hidden) if is_odd else (x_t, gate * hidden)
            gates = multiply(x_t, W) + multiply(hidden, U) + broadcast_row(b, 2, dtype)
            cell, hidden = update_carry(cell, gates, capped=self.capped)
            return (cell, hidden), hidden

        carry, hiddens = scan_lstm(step, carry, x, reset, keep, dtype)
        return carry, hiddens.astype(dtype)

    def _make_factors(self, name: str, num_rows: int, num_columns: int) -> list[Array]:
        """Return the one or two parameters whose product is a round's matrix."""
        lecun_normal = initializers.lecun_normal()
        if self.rank is None:
            return [self.param(name, lecun_normal, (num_rows, num_columns), self.param_dtype)]
        return [
            self.param(f'{name}_left', lecun_normal, (num_rows, self.rank), self.param_dtype),
            self.param(f'{name}_right', lecun_normal, (self.rank, num_columns), self.param_dtype),
        ]

    def initial(self, batch: int) -> Carry:
        """Return zeros as the carry before the first step."""
        return initial_carry(batch, self.features, self.dtype or self.param_dtype)
