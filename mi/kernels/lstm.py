"""LSTM over time; its backward pass forms the weight gradients in one product."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear

Impl = Literal['xla', 'cudnn']


Carry = tuple[Array, Array]  # (c, h), each [B, H], f32 at least


def lstm_reference(
    carry: Carry,
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    reset: Array | None = None,
    keep: Array | None = None,
) -> tuple[Carry, Array]:
    """`lstm` as the equation says it, left to automatic differentiation: for forward mode."""

    def step(carry: Carry, Wx: Array) -> tuple[Carry, Array]:
        c, h = carry
        c, h = update_carry(c, Wx + multiply(h, U))
        return (c, h), h

    return scan_lstm(
        step, carry, multiply(x, W) + broadcast_row(b, 3, W.dtype), reset, keep, W.dtype
    )


def scan_lstm(
    step: Callable[[Any, Any], tuple[Any, Array]],
    carry: Any,
    rows: Any,
    reset: Array | None,
    keep: Array | None,
    dtype: DTypeLike,
) -> tuple[Any, Array]:
    """The step over the rows, [T, …] each, with products of this dtype.

    Before it, the carry is zeroed where reset [T, B], and its h multiplied by keep [B, H].
    """
    carry, keep = widen((carry, keep), dtype)

    def reset_and_step(carry: Any, row: tuple[Any, Array | None]) -> tuple[Any, Array]:
        row_t, reset_t = row
        if reset_t is not None:
            carry = jax.tree.map(lambda a: jnp.where(reset_t[:, None], 0, a), carry)
        if keep is not None:
            c, h, *rest = carry
            carry = (c, keep * h, *rest)
        return step(carry, row_t)

    return jax.lax.scan(reset_and_step, carry, (rows, reset))


def update_carry(
    c: Array,
    gates: Array,
    *,
    capped: bool = False,
    cell: Callable[[Array], Array] = lambda c: c,
) -> Carry:
    """(c, h) after the step, from c before it and i, f, o, j [B, 4H] before their activations."""
    i, f, o, j = jnp.split(gates, 4, axis=-1)
    i, f = nn.sigmoid(i), nn.sigmoid(f)
    c = f * c + (jnp.minimum(1 - f, i) if capped else i) * jnp.tanh(j)
    return c, nn.sigmoid(o) * jnp.tanh(cell(c))


def multiply(a: Array, W: Array) -> Array:
    """a W in f32 at least, a product of W's dtype."""
    return linear(a.astype(W.dtype), W, out_dtype=accumulation_dtype(W))


def broadcast_row(b: Array, ndim: int, dtype: DTypeLike) -> Array:
    """b [k] as it is added to products of this dtype, with as many axes as these have."""
    return b.reshape((1,) * (ndim - 1) + b.shape).astype(accumulation_dtype(dtype))


def widen(tree: Any, dtype: DTypeLike) -> Any:
    """The arrays in the dtype of a state beside products of this dtype: f32 at least."""
    return jax.tree.map(lambda a: a.astype(accumulation_dtype(dtype)), tree)


@jax.custom_vjp
def lstm(
    carry: Carry,
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    reset: Array | None = None,
    keep: Array | None = None,
) -> tuple[Carry, Array]:
    """`LSTM` as a function, with a backward pass of its own; reverse mode only.

    What makes it faster than `lstm_reference` on CPU (benchmarks/lm.py has the figures):
    - Features come first and the batch last, before the loop, in it and after it: the product of Uᵀ
      (large, on the left) with h (narrow) takes half the time of h U, for which U is packed anew at
      every step; and xᵀ, hᵀ and ∂gatesᵀ, which are in memory so, make ∂W, ∂U and ∂x at the rate of
      a plain product.
    - σ(a) = ½ tanh(½a) + ½, so that one tanh over the whole array makes all gates, which XLA
      vectorises, as it does not activations of slices.
    - i, f, o, j take the place of what they are made of, and ∂gates the place of i, f, o, j: two
      arrays [T, 4H, B] less to fill with zeros and to keep.
    - (dc, dc, dh, dc) is a choice by gate and not a concatenation, which XLA does not vectorise.
    - The backward loop holds only what depends on the step after it; the factors of ∂gates are
      made for all steps at once, and ∂W and ∂U are one product each over all steps.

    Args:
      carry: (c, h), each [B, H], f32; f64 where W is.
      x: [T, B, n], in the dtype of W.
      W: [n, 4H], for i, f, o, j in this order.
      U: [H, 4H]; the dtypes of W and U are those of the products with x and h.
      b: [4H], in the dtype of the carry, as all that follows.
      reset: [T, B] bool, or None.
      keep: [B, H], or None; it is not differentiated.

    Returns:
      (c, h) after the last step and h of every step [T, B, H].
    """
    return _lstm_forward(carry, x, W, U, b, reset, keep)[0]


def _lstm_forward(
    carry: Carry,
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    reset: Array | None,
    keep: Array | None,
) -> tuple[tuple[Carry, Array], tuple[Any, ...]]:
    (T, B, n), H = x.shape, U.shape[0]
    U_T = jax.lax.optimization_barrier(U.T)
    gates = _of_rows('ng,rn->gr', W, x.reshape(T * B, n)).reshape(4 * H, T, B)
    # Flat behind the barrier: what is only transposed XLA on CPU copies twice.
    gates = jax.lax.optimization_barrier(gates.swapaxes(0, 1).reshape(T * 4 * H, B))
    gates = gates.reshape(T, 4 * H, B)
    half = jnp.where(jnp.arange(4 * H) < 3 * H, 0.5, 1.0)[:, None]

    def step(
        state: tuple[Carry, Array], at: tuple[Array, Array | None]
    ) -> tuple[tuple[Carry, Array], Carry]:
        (carry, gates), (t, reset_t) = state, at
        c, h = zero_where_reset(carry, reset_t)
        h = h if keep is None else h * keep.T
        Wx = jax.lax.dynamic_index_in_dim(gates, t, 0, keepdims=False)
        Uh = linear(U_T, h.astype(U.dtype), out_dtype=accumulation_dtype(U))
        a = Wx + Uh + b[:, None]
        activated = jnp.tanh(a * half) * half + (1 - half)
        i, f, o, j = jnp.split(activated, 4)
        c = f * c + i * j
        h = o * jnp.tanh(c)
        gates = jax.lax.dynamic_update_index_in_dim(gates, activated, t, 0)
        return ((c, h), gates), (c, h)

    at = jnp.arange(T), _row_by_row(reset)
    ((c, h), gates), (cs, hs) = jax.lax.scan(step, ((carry[0].T, carry[1].T), gates), at)
    residuals = carry, x, W, U, gates, cs, hs, reset, keep
    return ((c.T, h.T), hs.swapaxes(1, 2)), residuals


def _lstm_backward(
    residuals: tuple[Any, ...], cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, Array, Array, Array, None, None]:
    carry, x, W, U, gates, cs, hs, reset, keep = residuals
    (dc, dh), dhs = cotangents
    (T, B, n), H = x.shape, U.shape[0]
    resets = _row_by_row(reset)
    c_tm1, h_tm1 = (
        jnp.concatenate([first.T[None], later[:-1]])
        for first, later in zip(carry, (cs, hs), strict=True)
    )
    if resets is not None:
        c_tm1, h_tm1 = jnp.where(resets, 0, c_tm1), jnp.where(resets, 0, h_tm1)
    if keep is not None:
        h_tm1 = h_tm1 * keep.T[None]
    # With dc and dh those of step t: dgates = (dc, dc, dh, dc) ⊙ factor, dc += dh ⊙ into_c.
    i, f, o, j = jnp.moveaxis(gates.reshape(T, 4, H, B), 1, 0)
    tanh_c = jnp.tanh(cs)
    factor = jnp.stack(
        [j * i * (1 - i), c_tm1 * f * (1 - f), tanh_c * o * (1 - o), i * (1 - j * j)], axis=1
    )
    into_c = o * (1 - tanh_c * tanh_c)
    rows = jax.lax.optimization_barrier((dhs.swapaxes(1, 2), factor, into_c, f))
    is_o = (jnp.arange(4) == 2)[:, None, None]

    def step(state: tuple[Carry, Array], at: tuple[Any, ...]) -> tuple[tuple[Carry, Array], None]:
        ((dc, dh), dgates), (t, (dh_t, factor_t, into_c_t, f_t), reset_t) = state, at
        dh = dh + dh_t
        dc = dc + dh * into_c_t
        dgates_t = (jnp.where(is_o, dh[None], dc[None]) * factor_t).reshape(4 * H, B)
        dgates = jax.lax.dynamic_update_index_in_dim(dgates, dgates_t, t, 0)
        dh = linear(U, dgates_t.astype(U.dtype), out_dtype=accumulation_dtype(U))
        dh = dh if keep is None else dh * keep.T
        return (zero_where_reset((dc * f_t, dh), reset_t), dgates), None

    ((dc, dh), dgates), _ = jax.lax.scan(
        step, ((dc.T, dh.T), gates), (jnp.arange(T), rows, resets), reverse=True
    )
    dgates, h_first, x_first = jax.lax.optimization_barrier(
        (
            dgates.swapaxes(0, 1).reshape(4 * H, T * B),
            h_tm1.swapaxes(0, 1).reshape(H, T * B).astype(U.dtype),
            x.reshape(T * B, n).T,
        )
    )
    dW = _of_rows('nr,gr->ng', x_first, dgates).astype(W.dtype)
    dU = _of_rows('hr,gr->hg', h_first, dgates).astype(U.dtype)
    dx = jax.lax.optimization_barrier(_of_rows('ng,gr->nr', W, dgates))
    dx = dx.reshape(n, T, B).transpose(1, 2, 0).astype(x.dtype)
    return (dc.T, dh.T), dx, dW, dU, dgates.sum(axis=1), None, None


lstm.defvjp(_lstm_forward, _lstm_backward)


def _of_rows(equation: str, a: Array, b: Array) -> Array:
    """A product of the dtype of a, in f32 at least; r stands for the T · B rows."""
    return jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=accumulation_dtype(a))


def _row_by_row(reset: Array | None) -> Array | None:
    """[T, B] → [T, 1, B], to go with the [H, B] of a step."""
    return None if reset is None else reset[:, None, :]


def zero_where_reset(carry: Carry, reset: Array | None) -> Carry:
    """The carry, zero where reset [1, B]."""
    if reset is None:
        return carry
    return jnp.where(reset, 0, carry[0]), jnp.where(reset, 0, carry[1])
