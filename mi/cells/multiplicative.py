"""LSTMs with products of x and h: the multiplicative LSTM and multiplicative integration."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.cells.initializers import forget_bias, orthogonal, orthogonal_gates
from mi.cells.state import check_shapes, initial_carry
from mi.kernels.lstm import (
    Carry,
    broadcast_row,
    multiply,
    scan_lstm,
    update_carry,
)


class MultiplicativeLSTM(nn.Module):
    """Multiplicative LSTM, mLSTM (Krause et al., 2016).

        m_t = (x_t W_m) ⊙ (h_{t−1} U_m)
        i, f, o, j = x_t W + m_t U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    The parameters are W_m [n, H], U_m [H, H], W [n, 4H], U [H, 4H] and b [4H]. This is an LSTM
    whose recurrent weights depend on the input: h_{t−1} U becomes h_{t−1} U_m diag(x_t W_m) U.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
    """

    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """Return the last carry (c, h), and h of every step [T, B, H]."""
        hidden_size, input_size = self.features, x.shape[-1]
        check_shapes(carry, x, reset, keep, (hidden_size, hidden_size))

        # The parameters.
        gates_size, lecun_normal = 4 * hidden_size, initializers.lecun_normal()
        W_m = self.param('W_m', lecun_normal, (input_size, hidden_size), self.param_dtype)
        U_m = self.param('U_m', orthogonal, (hidden_size, hidden_size), self.param_dtype)
        W = self.param('W', lecun_normal, (input_size, gates_size), self.param_dtype)
        U = self.param('U', orthogonal_gates, (hidden_size, gates_size), self.param_dtype)
        b = self.param('b', forget_bias, (gates_size,), self.param_dtype)
        x, W_m, U_m, W, U = nn.dtypes.promote_dtype(x, W_m, U_m, W, U, dtype=self.dtype)

        # The loop; the products of x are computed before it, for all steps.
        def step(carry: Carry, inputs: tuple[Array, Array]) -> tuple[Carry, Array]:
            (cell, hidden), (Wx_m, Wx) = carry, inputs
            m_t = Wx_m * multiply(hidden, U_m)
            cell, hidden = update_carry(cell, Wx + multiply(m_t, U))
            return (cell, hidden), hidden

        inputs = multiply(x, W_m), multiply(x, W) + broadcast_row(b, 3, x.dtype)
        carry, hiddens = scan_lstm(step, carry, inputs, reset, keep, x.dtype)
        return carry, hiddens.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """Return zeros as the carry before the first step."""
        return initial_carry(batch, self.features, self.dtype or self.param_dtype)


class MILSTM(nn.Module):
    """LSTM with multiplicative integration, MI-LSTM (Wu et al., 2016).

        i, f, o, j = α ⊙ Wx ⊙ Uh + β₁ ⊙ Uh + β₂ ⊙ Wx + b,   Wx = x_t W, Uh = h_{t−1} U
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    The parameters are W [n, 4H], U [H, 4H], and α, β₁, β₂, b [4H]. With α = 0 and β₁ = β₂ = 1, this
    is the LSTM.

    By default, α starts at 1, and β₁ and β₂ at ½. These values have not been checked against the
    paper, where they differ between experiments; other public code uses 1 for all. b starts at 1
    for the forget gate and at 0 otherwise; in the paper it starts at 0.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      alpha: initial value of α.
      beta: initial value of β₁ and β₂.
    """

    features: int
    alpha: float = 1.0
    beta: float = 0.5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """Return the last carry (c, h), and h of every step [T, B, H]."""
        hidden_size, input_size = self.features, x.shape[-1]
        check_shapes(carry, x, reset, keep, (hidden_size, hidden_size))

        # The parameters.
        gates_size, lecun_normal = 4 * hidden_size, initializers.lecun_normal()
        alpha_init, beta_init = map(initializers.constant, (self.alpha, self.beta))
        W = self.param('W', lecun_normal, (input_size, gates_size), self.param_dtype)
        U = self.param('U', orthogonal_gates, (hidden_size, gates_size), self.param_dtype)
        alpha = self.param('alpha', alpha_init, (gates_size,), self.param_dtype)
        beta_1 = self.param('beta_1', beta_init, (gates_size,), self.param_dtype)
        beta_2 = self.param('beta_2', beta_init, (gates_size,), self.param_dtype)
        b = self.param('b', forget_bias, (gates_size,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)

        # In the loop, the pre-activations are affine in Uh: scale ⊙ Uh + offset.
        def step(carry: Carry, inputs: tuple[Array, Array]) -> tuple[Carry, Array]:
            (cell, hidden), (scale, offset) = carry, inputs
            cell, hidden = update_carry(cell, scale * multiply(hidden, U) + offset)
            return (cell, hidden), hidden

        Wx = multiply(x, W)
        alpha, beta_1, beta_2, b = (
            broadcast_row(vector, 3, x.dtype) for vector in (alpha, beta_1, beta_2, b)
        )
        inputs = alpha * Wx + beta_1, beta_2 * Wx + b
        carry, hiddens = scan_lstm(step, carry, inputs, reset, keep, x.dtype)
        return carry, hiddens.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """Return zeros as the carry before the first step."""
        return initial_carry(batch, self.features, self.dtype or self.param_dtype)
