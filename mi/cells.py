"""Recurrent cells, run over a sequence.

Shapes: T steps, B sequences, n input features, H state features; sequences are [T, B, n]. Where
`reset` [T, B] is true, the state is zeroed before the step.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.contract import linear

Carry = tuple[Array, Array]  # (c, h), each [B, H], f32


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997; forget gate: Gers et al., 2000).

        i, f, o, j = x_t W + h_{t−1} U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    W [n, 4H] is applied to the whole sequence at once, U [H, 4H] in the loop; the four gates stand
    side by side in this order. The forget gate's bias starts at 1.

    Attributes:
      features: H.
      dtype: of the products with W and U; the gates and the state are f32.
      param_dtype: of the parameters.
    """

    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, x: Array, reset: Array | None = None) -> tuple[Carry, Array]:
        """(c, h), [T, B, n] → (c, h) after the last step, h of every step [T, B, H]."""
        n, H = x.shape[-1], self.features
        W = self.param('W', initializers.lecun_normal(), (n, 4 * H), self.param_dtype)
        U = self.param('U', _orthogonal_gates, (H, 4 * H), self.param_dtype)
        b = self.param('b', _forget_bias, (4 * H,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)
        gates = linear(x, W).astype(jnp.float32) + b.reshape(1, 1, 4 * H).astype(jnp.float32)
        carry, h = lstm(carry, gates, U, reset)
        return carry, h.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """The zero state."""
        return initial(batch, self.features)


def initial(batch: int, features: int) -> Carry:
    """The zero state of an LSTM: (c, h), each [B, H]."""
    return jnp.zeros((batch, features)), jnp.zeros((batch, features))


def lstm_reference(
    carry: Carry, gates: Array, U: Array, reset: Array | None = None
) -> tuple[Carry, Array]:
    """`lstm`, left to automatic differentiation: slower, for forward mode and for tests."""

    def step(carry: Carry, row: tuple[Array, Array | None]) -> tuple[Carry, Array]:
        gates_t, reset_t = row
        c, h, _ = _lstm_step(_masked(carry, reset_t), gates_t, U)
        return (c, h), h

    return jax.lax.scan(step, carry, (gates, reset))


@jax.custom_vjp
def lstm(carry: Carry, gates: Array, U: Array, reset: Array | None = None) -> tuple[Carry, Array]:
    """The recurrence of `LSTM`, with a backward pass of its own; reverse mode only.

    The backward loop holds nothing but what depends on the step after it: the factors of ∂gates are
    made for all steps at once, and ∂U is one product over all steps.

    Args:
      carry: (c, h), each [B, H], f32.
      gates: [T, B, 4H], f32, x_t W + b in the order i, f, o, j.
      U: [H, 4H]; its dtype is that of the product with h.
      reset: [T, B] bool, or None.

    Returns:
      (c, h) after the last step and h of every step [T, B, H], all f32.
    """
    return lstm_reference(carry, gates, U, reset)


def _lstm_step(carry: Carry, gates: Array, U: Array) -> tuple[Array, Array, Array]:
    c, h = carry
    H = c.shape[-1]
    # σ(a) = ½ tanh(½a) + ½, so that one tanh over the whole array makes all gates: XLA vectorises
    # that on CPU, but not activations of slices (2.0 against 9.6 ms for 64 steps of [32, 1024]).
    half = jnp.where(jnp.arange(4 * H) < 3 * H, 0.5, 1.0)[None]
    a = gates + linear(h.astype(U.dtype), U, out_dtype=jnp.float32)
    activated = jnp.tanh(a * half) * half + (1 - half)
    i, f, o, j = jnp.split(activated, 4, axis=-1)
    c = f * c + i * j
    return c, o * jnp.tanh(c), activated


def _masked(carry: Carry, reset: Array | None) -> Carry:
    if reset is None:
        return carry
    c, h = carry
    return jnp.where(reset[:, None], 0, c), jnp.where(reset[:, None], 0, h)


def _lstm_forward(
    carry: Carry, gates: Array, U: Array, reset: Array | None
) -> tuple[tuple[Carry, Array], tuple[Array | None, ...]]:
    def step(
        carry: Carry, row: tuple[Array, Array | None]
    ) -> tuple[Carry, tuple[Array, Array, Array]]:
        gates_t, reset_t = row
        c, h, activated = _lstm_step(_masked(carry, reset_t), gates_t, U)
        return (c, h), (c, h, activated)

    last, (cs, hs, activated) = jax.lax.scan(step, carry, (gates, reset))
    return (last, hs), (*carry, cs, hs, activated, U, reset)


def _lstm_backward(
    residuals: tuple[Array, ...], cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, Array, None]:
    c_0, h_0, cs, hs, activated, U, reset = residuals
    (dc, dh), dhs = cotangents
    T, B, H = hs.shape
    c_tm1 = jnp.concatenate([c_0[None], cs[:-1]])
    h_tm1 = jnp.concatenate([h_0[None], hs[:-1]])
    if reset is not None:
        c_tm1 = jnp.where(reset[:, :, None], 0, c_tm1)
        h_tm1 = jnp.where(reset[:, :, None], 0, h_tm1)
    i, f, o, j = jnp.split(activated, 4, axis=-1)
    tanh_c = jnp.tanh(cs)
    # dgates = (dc, dc, dh, dc) ⊙ factor, and dc += dh ⊙ o(1 − tanh²c)
    factor = jnp.concatenate(
        [j * i * (1 - i), c_tm1 * f * (1 - f), tanh_c * o * (1 - o), i * (1 - j * j)], axis=-1
    )
    through_h = o * (1 - tanh_c * tanh_c)
    factor, through_h, f = jax.lax.optimization_barrier((factor, through_h, f))
    U_T = U.T

    def step(d: Carry, row: tuple[Array, ...]) -> tuple[Carry, Array]:
        dc, dh = d
        dhs_t, factor_t, through_h_t, f_t, reset_t = row
        dh = dh + dhs_t
        dc = dc + dh * through_h_t
        dgates_t = jnp.concatenate([dc, dc, dh, dc], axis=-1) * factor_t
        dh_tm1 = linear(dgates_t.astype(U.dtype), U_T, out_dtype=jnp.float32)
        return _masked((dc * f_t, dh_tm1), reset_t), dgates_t

    d_0, dgates = jax.lax.scan(step, (dc, dh), (dhs, factor, through_h, f, reset), reverse=True)
    rows = (h_tm1.reshape(T * B, H), dgates.reshape(T * B, 4 * H))
    dU = linear(rows[0].T.astype(U.dtype), rows[1].astype(U.dtype), out_dtype=jnp.float32)
    return d_0, dgates, dU.astype(U.dtype), None


lstm.defvjp(_lstm_forward, _lstm_backward)


def _orthogonal_gates(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """[H, 4H]: an orthogonal matrix for each gate."""
    H = shape[0]
    one = initializers.orthogonal()
    return jnp.concatenate([one(k, (H, H), dtype) for k in jax.random.split(key, 4)], axis=1)


def _forget_bias(key: Array, shape: tuple[int], dtype: DTypeLike) -> Array:
    """[4H]: 1 for f, 0 for i, o, j."""
    del key
    H = shape[0] // 4
    return jnp.zeros(shape, dtype).at[H : 2 * H].set(1)
