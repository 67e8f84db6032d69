"""Recurrent cells, run over a sequence.

Shapes: T steps, B sequences, n input features, H state features; sequences are [T, B, n]. Where
`reset` [T, B] is true, the state is zeroed before the step.
"""

from typing import Any

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
    """`lstm` as the equation says it, left to automatic differentiation: for forward mode."""

    def step(carry: Carry, row: tuple[Array, Array | None]) -> tuple[Carry, Array]:
        gates_t, reset_t = row
        if reset_t is not None:
            carry = jax.tree.map(lambda a: jnp.where(reset_t[:, None], 0, a), carry)
        c, h = carry
        a = gates_t + linear(h.astype(U.dtype), U, out_dtype=jnp.float32)
        i, f, o, j = jnp.split(a, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(j)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return jax.lax.scan(step, carry, (gates, reset))


@jax.custom_vjp
def lstm(carry: Carry, gates: Array, U: Array, reset: Array | None = None) -> tuple[Carry, Array]:
    """The recurrence of `LSTM`, with a backward pass of its own; reverse mode only.

    What makes it faster than `lstm_reference` on CPU (benchmarks/lm.py has the figures):
    - In the loop, features come first and the batch last: the product of Uᵀ (large, on the left)
      with h (narrow) takes half the time of h U, for which U is packed anew at every step.
    - σ(a) = ½ tanh(½a) + ½, so that one tanh over the whole array makes all gates, which XLA
      vectorises, as it does not activations of slices.
    - The backward loop holds only what depends on the step after it; the factors of ∂gates are
      made for all steps at once, and ∂U is one product over all steps.

    Args:
      carry: (c, h), each [B, H], f32.
      gates: [T, B, 4H], f32: x_t W + b in the order i, f, o, j.
      U: [H, 4H]; its dtype is that of the products with h.
      reset: [T, B] bool, or None.

    Returns:
      (c, h) after the last step and h of every step [T, B, H], all f32.
    """
    (c, h), (hs, _, _) = _forward(carry, gates, U, reset)
    return (c.T, h.T), hs.swapaxes(1, 2)


def _forward(
    carry: Carry, gates: Array, U: Array, reset: Array | None
) -> tuple[Carry, tuple[Array, Array, Array]]:
    """(c, h), each [H, B]; h, c and the activated gates of every step, each [T, …, B]."""
    H = U.shape[0]
    half = jnp.where(jnp.arange(4 * H) < 3 * H, 0.5, 1.0)[:, None]
    U_T, gates, resets = jax.lax.optimization_barrier(
        (U.T, gates.swapaxes(1, 2), None if reset is None else reset[:, None, :])
    )

    def step(
        carry: Carry, row: tuple[Array, Array | None]
    ) -> tuple[Carry, tuple[Array, Array, Array]]:
        gates_t, reset_t = row
        c, h = _zeroed(carry, reset_t)
        a = gates_t + linear(U_T, h.astype(U.dtype), out_dtype=jnp.float32)
        activated = jnp.tanh(a * half) * half + (1 - half)
        i, f, o, j = jnp.split(activated, 4)
        c = f * c + i * j
        h = o * jnp.tanh(c)
        return (c, h), (h, c, activated)

    return jax.lax.scan(step, (carry[0].T, carry[1].T), (gates, resets))


def _zeroed(carry: Carry, reset: Array | None) -> Carry:
    """The carry, zero where reset [1, B]."""
    if reset is None:
        return carry
    return jnp.where(reset, 0, carry[0]), jnp.where(reset, 0, carry[1])


def _lstm_forward(
    carry: Carry, gates: Array, U: Array, reset: Array | None
) -> tuple[tuple[Carry, Array], tuple[Any, ...]]:
    (c, h), (hs, cs, activated) = _forward(carry, gates, U, reset)
    hs = hs.swapaxes(1, 2)
    return ((c.T, h.T), hs), (carry, hs, cs, activated, U, reset)


def _lstm_backward(
    residuals: tuple[Any, ...], cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, Array, None]:
    carry, hs, cs, activated, U, reset = residuals
    (dc, dh), dhs = cotangents
    T, B, H = hs.shape
    c_tm1 = jnp.concatenate([carry[0].T[None], cs[:-1]])  # [T, H, B]
    h_tm1 = jnp.concatenate([carry[1][None], hs[:-1]])  # [T, B, H]
    resets = None
    if reset is not None:
        c_tm1 = jnp.where(reset[:, None, :], 0, c_tm1)
        h_tm1 = jnp.where(reset[:, :, None], 0, h_tm1)
        resets = reset[:, None, :]
    # With dc and dh those of step t: dgates = (dc, dc, dh, dc) ⊙ factor, dc += dh ⊙ into_c.
    i, f, o, j = jnp.split(activated, 4, axis=1)
    tanh_c = jnp.tanh(cs)
    factor = jnp.concatenate(
        [j * i * (1 - i), c_tm1 * f * (1 - f), tanh_c * o * (1 - o), i * (1 - j * j)], axis=1
    )
    into_c = o * (1 - tanh_c * tanh_c)
    rows = jax.lax.optimization_barrier((dhs.swapaxes(1, 2), factor, into_c, f))

    def step(d: Carry, row: tuple[Any, ...]) -> tuple[Carry, Array]:
        dc, dh = d
        (dh_t, factor_t, into_c_t, f_t), reset_t = row
        dh = dh + dh_t
        dc = dc + dh * into_c_t
        dgates_t = jax.lax.optimization_barrier(jnp.concatenate([dc, dc, dh, dc])) * factor_t
        dh_tm1 = linear(U, dgates_t.astype(U.dtype), out_dtype=jnp.float32)
        return _zeroed((dc * f_t, dh_tm1), reset_t), dgates_t

    (dc, dh), dgates = jax.lax.scan(step, (dc.T, dh.T), (rows, resets), reverse=True)
    # Materialised transposes: XLA on CPU has no fast product that contracts both first axes.
    dgates, h_T = jax.lax.optimization_barrier(
        (dgates.swapaxes(1, 2), h_tm1.reshape(T * B, H).T.astype(U.dtype))
    )
    dU = linear(h_T, dgates.reshape(T * B, 4 * H).astype(U.dtype))
    return (dc.T, dh.T), dgates, dU, None


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
