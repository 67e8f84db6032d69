"""The LSTM over time, with a backward pass that forms the weight gradients in one product."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear

Impl = Literal['xla', 'cudnn']
Carry = tuple[Array, Array]  # (c, h), each [B, H], at least f32


def lstm_reference(  # noqa: PLR0913 - the arguments of `lstm`
    carry: Carry,
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    reset: Array | None = None,
    keep: Array | None = None,
) -> tuple[Carry, Array]:
    """Compute `lstm` as its equation is written; supports forward-mode differentiation."""

    def step(carry: Carry, Wx: Array) -> tuple[Carry, Array]:
        c, h = carry
        c, h = update_carry(c, Wx + multiply(h, U))
        return (c, h), h

    Wx = multiply(x, W) + broadcast_row(b, 3, W.dtype)
    return scan_lstm(step, carry, Wx, reset, keep, W.dtype)


def scan_lstm(
    step: Callable[[Any, Any], tuple[Any, Array]],
    carry: Any,
    rows: Any,
    reset: Array | None,
    keep: Array | None,
    dtype: DTypeLike,
) -> tuple[Any, Array]:
    """Apply a step to each of the rows, arrays [T, …].

    Args:
      step: (carry, row) → (carry, h).
      carry: tuple of arrays that starts with c and h, each [B, H].
      rows: inputs of the steps.
      reset: [T, B] bool, where the carry is zeroed before the step; None for nowhere.
      keep: [B, H], which multiplies h before the step; None for no dropout.
      dtype: dtype of the products in the step.
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
    """Return the next (c, h), given c and the gates i, f, o, j [B, 4H] before their activations.

    Args:
      c: cell state [B, H].
      gates: pre-activations.
      capped: whether the input gate is at most 1 − f.
      cell: function of c inside tanh(c).
    """
    i, f, o, j = jnp.split(gates, 4, axis=-1)
    i, f = nn.sigmoid(i), nn.sigmoid(f)
    c = f * c + (jnp.minimum(1 - f, i) if capped else i) * jnp.tanh(j)
    return c, nn.sigmoid(o) * jnp.tanh(cell(c))


def multiply(a: Array, W: Array) -> Array:
    """Return a W in at least f32, with a product of W's dtype."""
    return linear(a.astype(W.dtype), W, out_dtype=accumulation_dtype(W))


def broadcast_row(b: Array, ndim: int, dtype: DTypeLike) -> Array:
    """Return b [k] with `ndim` axes, in the dtype of the sums of products of this dtype."""
    return b.reshape((1,) * (ndim - 1) + b.shape).astype(accumulation_dtype(dtype))


def widen(tree: Any, dtype: DTypeLike) -> Any:
    """Cast arrays to the dtype of a state next to products of this dtype: at least f32."""
    return jax.tree.map(lambda a: a.astype(accumulation_dtype(dtype)), tree)


@jax.custom_vjp
def lstm(  # noqa: PLR0913 - separate arrays, so that each has its cotangent
    carry: Carry,
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    reset: Array | None = None,
    keep: Array | None = None,
) -> tuple[Carry, Array]:
    """Compute `mi.cells.LSTM` as a function with its own backward pass; reverse mode only.

    Five choices make it faster than `lstm_reference` on CPU, as measured by benchmarks/lm.py:

    - Arrays have the features first and the batch last. Uᵀ h needs no repacking of U at every step,
      and xᵀ, hᵀ and ∂gatesᵀ are in the layout of the products for ∂W, ∂U and ∂x.
    - σ(a) = ½ tanh(½a) + ½, so that one tanh over the array makes all gates. XLA vectorizes it, but
      not activations of slices.
    - i, f, o, j overwrite their pre-activations, and ∂gates overwrites i, f, o, j. This saves two
      arrays [T, 4H, B].
    - (dc, dc, dh, dc) is a selection by gate, as XLA does not vectorize a concatenation.
    - The backward loop computes only what depends on the step after it. The factors of ∂gates are
      computed for all steps before it; ∂W and ∂U are one product each over all steps after it.

    Args:
      carry: (c, h), each [B, H], f32; f64 if W is f64.
      x: [T, B, n], in the dtype of W.
      W: [n, 4H], for i, f, o, j in this order.
      U: [H, 4H]; the products with x and h have the dtypes of W and U.
      b: [4H], in the dtype of the carry.
      reset: [T, B] bool, or None.
      keep: [B, H], or None; it is not differentiated.

    Returns:
      (c, h) after the last step and h of every step [T, B, H].
    """
    return _lstm_forward(carry, x, W, U, b, reset, keep)[0]


def _lstm_forward(  # noqa: PLR0913 - the arguments of `lstm`
    carry: Carry,
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    reset: Array | None,
    keep: Array | None,
) -> tuple[tuple[Carry, Array], tuple[Any, ...]]:
    # W x of all steps, in the array that later holds the gates.
    (T, B, n), H = x.shape, U.shape[0]
    U_T = jax.lax.optimization_barrier(U.T)
    gates = _multiply_rows('ng,rn->gr', W, x.reshape(T * B, n)).reshape(4 * H, T, B)
    # Flat behind the barrier: XLA on CPU copies an array twice that is only transposed.
    gates = jax.lax.optimization_barrier(gates.swapaxes(0, 1).reshape(T * 4 * H, B))
    gates = gates.reshape(T, 4 * H, B)

    # The loop over time.
    half = jnp.where(jnp.arange(4 * H) < 3 * H, 0.5, 1.0)[:, None]

    def step(
        state: tuple[Carry, Array], inputs: tuple[Array, Array | None]
    ) -> tuple[tuple[Carry, Array], Carry]:
        (carry, gates), (t, reset_t) = state, inputs
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

    inputs = jnp.arange(T), _add_row_axis(reset)
    ((c, h), gates), (cs, hs) = jax.lax.scan(step, ((carry[0].T, carry[1].T), gates), inputs)
    residuals = carry, x, W, U, gates, cs, hs, reset, keep
    return ((c.T, h.T), hs.swapaxes(1, 2)), residuals


def _lstm_backward(
    residuals: tuple[Any, ...], cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, Array, Array, Array, None, None]:
    carry, x, W, U, gates, cs, hs, reset, keep = residuals
    (dc, dh), dhs = cotangents
    (T, B, n), H = x.shape, U.shape[0]
    resets = _add_row_axis(reset)

    # The state that each step has read.
    c_tm1, h_tm1 = (
        jnp.concatenate([first.T[None], later[:-1]])
        for first, later in zip(carry, (cs, hs), strict=True)
    )
    if resets is not None:
        c_tm1, h_tm1 = jnp.where(resets, 0, c_tm1), jnp.where(resets, 0, h_tm1)
    if keep is not None:
        h_tm1 = h_tm1 * keep.T[None]

    # Factors that do not depend on later steps, for all steps. With dc and dh of step t,
    # dc += dh ⊙ dc_factor, dgates = (dc, dc, dh, dc) ⊙ factor.
    i, f, o, j = jnp.moveaxis(gates.reshape(T, 4, H, B), 1, 0)
    tanh_c = jnp.tanh(cs)
    factor = jnp.stack(
        [j * i * (1 - i), c_tm1 * f * (1 - f), tanh_c * o * (1 - o), i * (1 - j * j)], axis=1
    )
    dc_factor = o * (1 - tanh_c * tanh_c)
    rows = jax.lax.optimization_barrier((dhs.swapaxes(1, 2), factor, dc_factor, f))
    is_o = (jnp.arange(4) == 2)[:, None, None]

    # The loop over time, backwards.
    def step(
        state: tuple[Carry, Array], inputs: tuple[Any, ...]
    ) -> tuple[tuple[Carry, Array], None]:
        ((dc, dh), dgates), (t, (dh_t, factor_t, dc_factor_t, f_t), reset_t) = state, inputs
        dh = dh + dh_t
        dc = dc + dh * dc_factor_t
        dgates_t = (jnp.where(is_o, dh[None], dc[None]) * factor_t).reshape(4 * H, B)
        dgates = jax.lax.dynamic_update_index_in_dim(dgates, dgates_t, t, 0)
        dh = linear(U, dgates_t.astype(U.dtype), out_dtype=accumulation_dtype(U))
        dh = dh if keep is None else dh * keep.T
        return (zero_where_reset((dc * f_t, dh), reset_t), dgates), None

    ((dc, dh), dgates), _ = jax.lax.scan(
        step, ((dc.T, dh.T), gates), (jnp.arange(T), rows, resets), reverse=True
    )

    # The gradients of the weights and of x, one product each over all steps.
    dgates, h_first, x_first = jax.lax.optimization_barrier(
        (
            dgates.swapaxes(0, 1).reshape(4 * H, T * B),
            h_tm1.swapaxes(0, 1).reshape(H, T * B).astype(U.dtype),
            x.reshape(T * B, n).T,
        )
    )
    dW = _multiply_rows('nr,gr->ng', x_first, dgates).astype(W.dtype)
    dU = _multiply_rows('hr,gr->hg', h_first, dgates).astype(U.dtype)
    dx = jax.lax.optimization_barrier(_multiply_rows('ng,gr->nr', W, dgates))
    dx = dx.reshape(n, T, B).transpose(1, 2, 0).astype(x.dtype)
    return (dc.T, dh.T), dx, dW, dU, dgates.sum(axis=1), None, None


lstm.defvjp(_lstm_forward, _lstm_backward)


def _multiply_rows(equation: str, a: Array, b: Array) -> Array:
    """Compute a product of a's dtype in at least f32; r is the axis of the T · B rows."""
    return jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=accumulation_dtype(a))


def _add_row_axis(reset: Array | None) -> Array | None:
    """Reshape [T, B] to [T, 1, B], which broadcasts to the [H, B] of a step."""
    return None if reset is None else reset[:, None, :]


def zero_where_reset(carry: Carry, reset: Array | None) -> Carry:
    """Return the carry, zero where reset [1, B]."""
    if reset is None:
        return carry
    return jnp.where(reset, 0, carry[0]), jnp.where(reset, 0, carry[1])
