"""The LSTM, with a custom backward pass or cuDNN's kernel."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.cells.initializers import forget_bias, orthogonal_gates
from mi.cells.state import check_shapes, initial_carry
from mi.kernels import cudnn
from mi.kernels.linear import accumulation_dtype
from mi.kernels.lstm import Carry, Impl, LSTMWeights, lstm, lstm_reference, widen


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997; forget gate: Gers et al., 2000).

        i, f, o, j = x_t W + h_{t−1} U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    W [n, 4H] is applied to all steps in one product, and U [H, 4H] in the loop. The four gates are
    concatenated in this order. The bias of the forget gate starts at 1.

    Attributes:
      features: H, the number of state features.
      impl: 'xla', or 'cudnn' for NVIDIA's kernel, which requires an NVIDIA GPU and f32, and
        supports neither `reset` nor `keep`.
      dtype: dtype of the products with W and U. The gates and the state are in at least f32.
      param_dtype: dtype of the parameters.
    """

    features: int
    impl: Impl = 'xla'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """Return the last carry (c, h), and h of every step [T, B, H].

        Raises:
          ValueError: if the shapes of carry, x, reset and keep do not match, or cuDNN does not
            support the dtype, reset or keep.
        """
        hidden_size = self.features
        check_shapes(carry, x, reset, keep, (hidden_size, hidden_size))

        # The weights, with the four gates side by side.
        input_size, gates_size = x.shape[-1], 4 * hidden_size
        lecun_normal = initializers.lecun_normal()
        W = self.param('W', lecun_normal, (input_size, gates_size), self.param_dtype)
        U = self.param('U', orthogonal_gates, (hidden_size, gates_size), self.param_dtype)
        b = self.param('b', forget_bias, (gates_size,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)

        # NVIDIA's kernel.
        if self.impl == 'cudnn':
            if x.dtype != jnp.float32 or reset is not None or keep is not None:
                raise ValueError(
                    f"impl = 'cudnn': expected f32, and neither reset nor keep (got {x.dtype}, "
                    f"reset: {reset is not None}, keep: {keep is not None}). Try impl='xla'"
                )
            return cudnn.lstm(carry, x, LSTMWeights(W, U, b))

        # Ours, whose loop needs a step.
        carry, keep = widen((carry, keep), x.dtype)
        run_lstm = lstm if len(x) else lstm_reference
        weights = LSTMWeights(W, U, b.astype(accumulation_dtype(x)))
        carry, hiddens = run_lstm(carry, x, weights, reset, keep)
        return carry, hiddens.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """Return zeros as the carry before the first step."""
        return initial_carry(batch, self.features, self.dtype or self.param_dtype)
