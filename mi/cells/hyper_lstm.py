"""The HyperLSTM: a small LSTM that scales the weights of a large one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.cells.initializers import forget_bias, orthogonal_gates
from mi.cells.state import check_shapes, initial_carry
from mi.kernels.linear import accumulation_dtype
from mi.kernels.lstm import (
    broadcast_row,
    multiply,
    scan_lstm,
    update_carry,
)

HyperCarry = tuple[Array, Array, Array, Array]  # (c, h) of the main cell, (c, h) of the small one


class HyperLSTM(nn.Module):
    """HyperLSTM (Ha et al., 2017): a small LSTM scales the weights of a large one.

        ĉ_t, ĥ_t = LSTM of G features, on [x_t; h_{t−1}]
        z_x = ĥ_t Z_x + z_x⁰,   z_h = ĥ_t Z_h + z_h⁰,   z_b = ĥ_t Z_b     E for each gate
        i, f, o, j = α_x(z_x) ⊙ x_t W + α_h(z_h) ⊙ h_{t−1} U + β(z_b) + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    α_x, α_h and β are linear maps, one for each gate, with weights D_x, D_h, D_b [4, E, H]. Z_x,
    Z_h and Z_b are [G, 4E]. The small LSTM has the weights hyper_W of x, hyper_U of h and hyper_V
    of ĥ. The paper computes z from ĥ_{t−1}; the authors' code and this module compute it from ĥ_t.

    The initialization is as published. W, U and the weights of the small LSTM are orthogonal. Z_x =
    Z_h = 0, z_x⁰ = z_h⁰ = 1 and D_x = D_h = 0.1/E, so that α_x = α_h = 0.1. Z_b is normal with
    standard deviation 0.01, and D_b = 0, so that β = 0. The bias of the forget gates is 1, as in
    the authors' code, and 0 in the paper.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      hyper_features: G, the number of features in the small LSTM. The paper uses 128 on Penn
        Treebank characters, and 256 on enwik8.
      embedding: E, the size of each z. The paper uses 4 on Penn Treebank, and 64 on enwik8.
      layer_norm: whether to normalize i, f, o, j and the c inside tanh(c) over their features in
        both LSTMs, each with a gain and a shift. The shift of the forget gates then starts at 1
        instead of their bias.

    The paper's recurrent dropout is not implemented.
    """

    features: int
    hyper_features: int = 128
    embedding: int = 4
    layer_norm: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: HyperCarry,
        x: Array,
        reset: Array | None = None,
        keep: Array | None = None,
    ) -> tuple[HyperCarry, Array]:
        """Return the last carry (c, h, ĉ, ĥ), and h of every step [T, B, H]."""
        H, G, E = self.features, self.hyper_features, self.embedding
        check_shapes(carry, x, reset, keep, (H, H, G, G))
        input_size = x.shape[-1]
        zeros, ones, scale = initializers.zeros, initializers.ones, initializers.constant(0.1 / E)
        bias_init = zeros if self.layer_norm else forget_bias

        def param(name: str, init: Callable[..., Array], *shape: int) -> Array:
            return self.param(name, init, shape, self.param_dtype)

        # The parameters.
        weights = (
            param('W', orthogonal_gates, input_size, 4 * H),
            param('U', orthogonal_gates, H, 4 * H),
            param('hyper_W', orthogonal_gates, input_size, 4 * G),
            param('hyper_U', orthogonal_gates, H, 4 * G),
            param('hyper_V', orthogonal_gates, G, 4 * G),
            param('Z_x', zeros, G, 4 * E),
            param('Z_h', zeros, G, 4 * E),
            param('Z_b', initializers.normal(0.01), G, 4 * E),
            param('D_x', scale, 4, E, H),
            param('D_h', scale, 4, E, H),
            param('D_b', zeros, 4, E, H),
        )
        promoted = nn.dtypes.promote_dtype(x, *weights, dtype=self.dtype)
        x, W, U, hyper_W, hyper_U, hyper_V, Z_x, Z_h, Z_b, D_x, D_h, D_b = promoted
        b, hyper_b = param('b', bias_init, 4 * H), param('hyper_b', bias_init, 4 * G)
        z_x, z_h = param('z_x', ones, 4 * E), param('z_h', ones, 4 * E)
        normalize_gates, normalize_cell = self._make_norm('gates', 4, H), self._make_norm('c', 1, H)
        normalize_hyper_gates = self._make_norm('hyper_gates', 4, G)
        normalize_hyper_cell = self._make_norm('hyper_c', 1, G)

        # The step: the small LSTM, the scales that it generates, and the large LSTM.
        def step(carry: HyperCarry, inputs: tuple[Array, Array]) -> tuple[HyperCarry, Array]:
            (cell, hidden, hyper_cell, hyper_hidden), (Wx, hyper_Wx) = carry, inputs
            hyper_gates = hyper_Wx + multiply(hidden, hyper_U) + multiply(hyper_hidden, hyper_V)
            hyper_cell, hyper_hidden = update_carry(
                hyper_cell, normalize_hyper_gates(hyper_gates), normalize=normalize_hyper_cell
            )
            alpha_x = _generate(multiply(hyper_hidden, Z_x) + broadcast_row(z_x, 2, x.dtype), D_x)
            alpha_h = _generate(multiply(hyper_hidden, Z_h) + broadcast_row(z_h, 2, x.dtype), D_h)
            beta = _generate(multiply(hyper_hidden, Z_b), D_b)
            Uh = multiply(hidden, U)
            gates = alpha_x * Wx + alpha_h * Uh + beta + broadcast_row(b, 2, x.dtype)
            cell, hidden = update_carry(cell, normalize_gates(gates), normalize=normalize_cell)
            return (cell, hidden, hyper_cell, hyper_hidden), hidden

        # What depends on x alone, for all steps; then the loop.
        inputs = multiply(x, W), multiply(x, hyper_W) + broadcast_row(hyper_b, 3, x.dtype)
        carry, hiddens = scan_lstm(step, carry, inputs, reset, keep, x.dtype)
        return carry, hiddens.astype(x.dtype)

    def _make_norm(self, name: str, groups: int, size: int) -> Callable[[Array], Array]:
        """Return a layer norm with its own parameters, or the identity if `layer_norm` is False."""
        if not self.layer_norm:
            return lambda array: array
        shape = (groups * size,)
        shift_init = forget_bias if groups == 4 else initializers.zeros
        gain = self.param(f'{name}_gain', initializers.ones, shape, self.param_dtype)
        shift = self.param(f'{name}_shift', shift_init, shape, self.param_dtype)
        return functools.partial(_normalize_groups, gain=gain, shift=shift, groups=groups)

    def initial(self, batch: int) -> HyperCarry:
        """Return zeros as the carry of both LSTMs before the first step."""
        dtype = self.dtype or self.param_dtype
        return *initial_carry(batch, self.features, dtype), *initial_carry(
            batch, self.hyper_features, dtype
        )


def _generate(embeddings: Array, D: Array) -> Array:
    """Compute scales of the gates [B, 4H] from embeddings [B, 4E], with one map D[g] per gate."""
    z = embeddings.reshape(-1, *D.shape[:2]).astype(D.dtype)
    accumulator = accumulation_dtype(D)
    scales = jnp.einsum('bge,geh->bgh', z, D, preferred_element_type=accumulator)
    return scales.reshape(-1, D.shape[0] * D.shape[2])


def _normalize_groups(array: Array, *, gain: Array, shift: Array, groups: int) -> Array:
    """Normalize each group of [B, groups · H] to mean 0 and variance 1, then scale and shift it."""
    dtype = array.dtype
    grouped = array.reshape(array.shape[0], groups, -1)
    grouped = jax.nn.standardize(grouped, axis=-1, epsilon=1e-3)  # the ε of the authors' code
    normalized = grouped.reshape(array.shape)
    return normalized * broadcast_row(gain, 2, dtype) + broadcast_row(shift, 2, dtype)
