"""The Mogrifier LSTM: x and h gate one another before the LSTM."""

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
    """Mogrifier LSTM (Melis et al., 2020): x and h gate one another before the LSTM reads them.

        for round i = 1 … r:   x ← 2σ(h Q_i + q_i) ⊙ x   for odd i
                               h ← 2σ(x R_i + r_i) ⊙ h   for even i
        i, f, o, j = x W + h U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    starting from x_t and h_{t−1}; Q_i [H, n], R_i [n, H], the LSTM's weights as in `LSTM`. With a
    rank, Q_i = Q_i_left Q_i_right, [H, rank] and [rank, n], and R_i likewise. The biases q_i [n]
    and r_i [H] are those of the released code; the paper's equations have none. They start at 0.

    Nothing can be computed before the loop, as the first round needs h_{t−1}.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      rounds: r; 0 for the LSTM.
      rank: rank of every Q_i and R_i; None for full matrices.
      capped: whether the input gate is min(1 − σ(f), σ(i)), which keeps c in [−1, 1].
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
        """Map (c, h) and x [T, B, n] to the last (c, h) and h of every step [T, B, H].

        Raises:
          ValueError: if rounds < 0 or rank < 1, or the shapes do not match.
        """
        H = self.features
        check_shapes(carry, x, reset, keep, (H, H))
        n = x.shape[-1]
        if self.rounds < 0 or (self.rank is not None and self.rank < 1):
            raise ValueError(
                f'rounds must be at least 0 and rank at least 1, or None for full matrices; '
                f'got rounds={self.rounds}, rank={self.rank}'
            )

        # The parameters of the LSTM.
        W = self.param('W', initializers.lecun_normal(), (n, 4 * H), self.param_dtype)
        U = self.param('U', orthogonal_gates, (H, 4 * H), self.param_dtype)
        b = self.param('b', forget_bias, (4 * H,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)

        # The factors and the bias of each round.
        maps = []
        for i in range(1, self.rounds + 1):
            letter, size_in, size_out = ('Q', H, n) if i % 2 else ('R', n, H)
            shapes = {f'{letter}_{i}': (size_in, size_out)}
            if self.rank is not None:
                shapes = {
                    f'{letter}_{i}_left': (size_in, self.rank),
                    f'{letter}_{i}_right': (self.rank, size_out),
                }
            lecun = initializers.lecun_normal()
            factors = [self.param(k, lecun, s, self.param_dtype) for k, s in shapes.items()]
            bias = self.param(
                f'{letter.lower()}_{i}', initializers.zeros, (size_out,), self.param_dtype
            )
            maps.append(([factor.astype(x.dtype) for factor in factors], bias))

        # The loop.
        dtype = x.dtype

        def step(carry: Carry, x_t: Array) -> tuple[Carry, Array]:
            (c, h), x = carry, x_t.astype(accumulation_dtype(dtype))
            for i, (factors, bias) in enumerate(maps, start=1):
                gate = 2 * nn.sigmoid(
                    functools.reduce(multiply, factors, h if i % 2 else x)
                    + broadcast_row(bias, 2, dtype)
                )
                x, h = (gate * x, h) if i % 2 else (x, gate * h)
            gates = multiply(x, W) + multiply(h, U) + broadcast_row(b, 2, dtype)
            c, h = update_carry(c, gates, capped=self.capped)
            return (c, h), h

        carry, h = scan_lstm(step, carry, x, reset, keep, dtype)
        return carry, h.astype(dtype)

    def initial(self, batch: int) -> Carry:
        """Return the zero state."""
        return initial_carry(batch, self.features, self.dtype or self.param_dtype)
