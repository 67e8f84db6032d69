"""The LSTM over time, with a backward pass that forms the weight gradients in one product."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from mi.kernels.linear import accumulation_dtype, linear

Impl = Literal['xla', 'cudnn']
Carry = tuple[Array, Array]  # (c, h), each [B, H], at least f32

_Tree = TypeVar('_Tree')
_CellCarry = TypeVar('_CellCarry', bound=tuple[Array, ...])
_Inputs = TypeVar('_Inputs')


class LSTMWeights(NamedTuple):
    """The weights of an LSTM, with the gates in the order i, f, o, j.

    Attributes:
      W: [n, 4H], the weights of x.
      U: [H, 4H], the weights of h.
      b: [4H], the bias.
    """

    W: Array
    U: Array
    b: Array


def lstm_reference(
    carry: Carry,
    x: Array,
    weights: LSTMWeights,
    reset: Array | None = None,
    keep: Array | None = None,
) -> tuple[Carry, Array]:
    """Compute `lstm` directly from its equations; supports forward-mode differentiation."""
    W, U, b = weights

    def step(carry: Carry, Wx: Array) -> tuple[Carry, Array]:
        cell, hidden = carry
        cell, hidden = update_carry(cell, Wx + multiply(hidden, U))
        return (cell, hidden), hidden

    Wx = multiply(x, W) + broadcast_row(b, 3, W.dtype)
    return scan_lstm(step, carry, Wx, reset, keep, W.dtype)


def scan_lstm(
    step: Callable[[_CellCarry, _Inputs], tuple[_CellCarry, Array]],
    carry: _CellCarry,
    inputs: _Inputs,
    reset: Array | None,
    keep: Array | None,
    dtype: DTypeLike,
) -> tuple[_CellCarry, Array]:
    """Apply a step to the inputs of each time step, arrays [T, …].

    Args:
      step: (carry, inputs) → (carry, h).
      carry: tuple of arrays that starts with c and h, each [B, H].
      inputs: inputs of the steps.
      reset: [T, B] bool, where the carry is zeroed before the step; None for nowhere.
      keep: [B, H], which multiplies h before the step; None for no dropout.
      dtype: dtype of the products in the step.
    """
    carry, keep = widen((carry, keep), dtype)

    # Reset and drop before the step, so that cells need not handle either.
    def reset_and_step(
        carry: _CellCarry, inputs_and_reset: tuple[_Inputs, Array | None]
    ) -> tuple[_CellCarry, Array]:
        inputs_t, reset_t = inputs_and_reset
        if reset_t is not None:
            carry = jax.tree.map(lambda array: jnp.where(reset_t[:, None], 0, array), carry)
        if keep is not None:
            cell, hidden, *other_states = carry
            carry = (cell, keep * hidden, *other_states)  # type: ignore[assignment]
        return step(carry, inputs_t)

    return jax.lax.scan(reset_and_step, carry, (inputs, reset))


def update_carry(
    cell: Array,
    gates: Array,
    *,
    capped: bool = False,
    normalize: Callable[[Array], Array] = lambda cell: cell,
) -> Carry:
    """Return the next (c, h), given c and the gates i, f, o, j [B, 4H] before their activations.

    Args:
      cell: the state c [B, H].
      gates: pre-activations.
      capped: whether the input gate is at most 1 − f.
      normalize: function of c inside tanh(c).
    """
    i, f, o, j = jnp.split(gates, 4, axis=-1)
    i, f = nn.sigmoid(i), nn.sigmoid(f)
    cell = f * cell + (jnp.minimum(1 - f, i) if capped else i) * jnp.tanh(j)
    return cell, nn.sigmoid(o) * jnp.tanh(normalize(cell))


def multiply(vectors: Array, W: Array) -> Array:
    """Multiply vectors by W in the dtype of W; the result is in at least f32."""
    return linear(vectors.astype(W.dtype), W, out_dtype=accumulation_dtype(W))


def broadcast_row(b: Array, ndim: int, dtype: DTypeLike) -> Array:
    """Return b [k] with `ndim` axes, in the dtype of the sums of products of this dtype."""
    return b.reshape((1,) * (ndim - 1) + b.shape).astype(accumulation_dtype(dtype))


def widen(tree: _Tree, dtype: DTypeLike) -> _Tree:
    """Cast arrays to the accumulation dtype of products of this dtype, at least f32."""
    state_dtype = accumulation_dtype(dtype)
    return jax.tree.map(lambda array: array.astype(state_dtype), tree)


@jax.custom_vjp
def lstm(
    carry: Carry,
    x: Array,
    weights: LSTMWeights,
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
    - (∂c, ∂c, ∂h, ∂c) is a selection by gate, as XLA does not vectorize a concatenation.
    - The backward loop computes only what depends on the step after it. The factors of ∂gates are
      computed for all steps before it; ∂W and ∂U are one product each over all steps after it.

    Args:
      carry: (c, h), each [B, H], f32; f64 if W is f64.
      x: [T, B, n], in the dtype of W.
      weights: W and U in the dtypes of their products with x and h; b in the dtype of the carry.
      reset: [T, B] bool, or None.
      keep: [B, H], or None; it is not differentiated.

    Returns:
      (c, h) after the last step and h of every step [T, B, H].
    """
    return _lstm_forward(carry, x, weights, reset, keep)[0]


class _Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
      carry, x, weights, reset, keep: arguments of `lstm`.
      gates: i, f, o, j of every step after their activations, [T, 4H, B].
      cells: c of every step, [T, H, B].
      hiddens: h of every step, [T, H, B].
    """

    carry: Carry
    x: Array
    weights: LSTMWeights
    gates: Array
    cells: Array
    hiddens: Array
    reset: Array | None
    keep: Array | None


def _lstm_forward(
    carry: Carry, x: Array, weights: LSTMWeights, reset: Array | None, keep: Array | None
) -> tuple[tuple[Carry, Array], _Residuals]:
    # W x of all steps, in the array that later holds the gates.
    W, U, b = weights
    (T, B, n), H = x.shape, U.shape[0]
    U_T = jax.lax.optimization_barrier(U.T)
    gates = _multiply_rows('ng,rn->gr', W, x.reshape(T * B, n)).reshape(4 * H, T, B)
    # Flat behind the barrier: XLA on CPU copies an array twice that is only transposed.
    gates = jax.lax.optimization_barrier(gates.swapaxes(0, 1).reshape(T * 4 * H, B))
    gates = gates.reshape(T, 4 * H, B)

    # The loop over time.
    gate_scale = jnp.where(jnp.arange(4 * H) < 3 * H, 0.5, 1.0)[:, None]

    def step(
        carry_and_gates: tuple[Carry, Array], inputs: tuple[Array, Array | None]
    ) -> tuple[tuple[Carry, Array], Carry]:
        (carry, gates), (time, reset_t) = carry_and_gates, inputs
        cell, hidden = zero_where_reset(carry, reset_t)
        hidden = hidden if keep is None else hidden * keep.T
        Wx = jax.lax.dynamic_index_in_dim(gates, time, 0, keepdims=False)
        Uh = linear(U_T, hidden.astype(U.dtype), out_dtype=accumulation_dtype(U))
        preactivations = Wx + Uh + b[:, None]
        gates_t = jnp.tanh(preactivations * gate_scale) * gate_scale + (1 - gate_scale)
        i, f, o, j = jnp.split(gates_t, 4)
        cell = f * cell + i * j
        hidden = o * jnp.tanh(cell)
        gates = jax.lax.dynamic_update_index_in_dim(gates, gates_t, time, 0)
        return ((cell, hidden), gates), (cell, hidden)

    inputs = jnp.arange(T), _add_row_axis(reset)
    start = (carry[0].T, carry[1].T), gates
    ((cell, hidden), gates), (cells, hiddens) = jax.lax.scan(step, start, inputs)
    residuals = _Residuals(carry, x, weights, gates, cells, hiddens, reset, keep)
    return ((cell.T, hidden.T), hiddens.swapaxes(1, 2)), residuals


def _lstm_backward(
    residuals: _Residuals, cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, LSTMWeights, None, None]:
    U, keep = residuals.weights.U, residuals.keep
    (T, B, _), H = residuals.x.shape, U.shape[0]
    resets = _add_row_axis(residuals.reset)
    prev_cells, prev_hiddens = _get_previous_states(residuals, resets)

    # Factors that do not depend on later steps, for all steps. With ∂c and ∂h of a step,
    # ∂c += ∂h ⊙ cell_factors, ∂gates = (∂c, ∂c, ∂h, ∂c) ⊙ gate_factors.
    i, f, o, j = jnp.moveaxis(residuals.gates.reshape(T, 4, H, B), 1, 0)
    tanh_c = jnp.tanh(residuals.cells)
    gate_factors = jnp.stack(
        [j * i * (1 - i), prev_cells * f * (1 - f), tanh_c * o * (1 - o), i * (1 - j * j)], axis=1
    )
    cell_factors = o * (1 - tanh_c * tanh_c)
    (cell_cotangent, hidden_cotangent), output_cotangents = cotangents
    terms = jax.lax.optimization_barrier(
        (output_cotangents.swapaxes(1, 2), gate_factors, cell_factors, f)
    )
    is_output_gate = (jnp.arange(4) == 2)[:, None, None]

    # The loop over time, backwards.
    def step(
        cotangents: tuple[Carry, Array], inputs: tuple[Array, tuple[Array, ...], Array | None]
    ) -> tuple[tuple[Carry, Array], None]:
        (cell_cotangent, hidden_cotangent), gate_cotangents = cotangents
        time, terms_t, reset_t = inputs
        output_cotangent, gate_factor, cell_factor, f_t = terms_t
        hidden_cotangent = hidden_cotangent + output_cotangent
        cell_cotangent = cell_cotangent + hidden_cotangent * cell_factor
        selected = jnp.where(is_output_gate, hidden_cotangent[None], cell_cotangent[None])
        gate_cotangent = (selected * gate_factor).reshape(4 * H, B)
        gate_cotangents = jax.lax.dynamic_update_index_in_dim(
            gate_cotangents, gate_cotangent, time, 0
        )
        prev_hidden_cotangent = linear(
            U, gate_cotangent.astype(U.dtype), out_dtype=accumulation_dtype(U)
        )
        prev_hidden_cotangent = (
            prev_hidden_cotangent if keep is None else prev_hidden_cotangent * keep.T
        )
        carry_cotangent = zero_where_reset((cell_cotangent * f_t, prev_hidden_cotangent), reset_t)
        return (carry_cotangent, gate_cotangents), None

    start = (cell_cotangent.T, hidden_cotangent.T), residuals.gates
    inputs = jnp.arange(T), terms, resets
    (carry_cotangent, gate_cotangents), _ = jax.lax.scan(step, start, inputs, reverse=True)
    cell_cotangent, hidden_cotangent = carry_cotangent
    x_cotangent, weight_cotangents = _multiply_steps(residuals, prev_hiddens, gate_cotangents)
    return (cell_cotangent.T, hidden_cotangent.T), x_cotangent, weight_cotangents, None, None


lstm.defvjp(_lstm_forward, _lstm_backward)


def _multiply_steps(
    residuals: _Residuals, prev_hiddens: Array, gate_cotangents: Array
) -> tuple[Array, LSTMWeights]:
    """Return the gradients of x and of the weights, one product each over all steps."""
    x, (W, U, _) = residuals.x, residuals.weights
    (T, B, n), H = x.shape, U.shape[0]
    gate_columns, hidden_columns, x_columns = jax.lax.optimization_barrier(
        (
            gate_cotangents.swapaxes(0, 1).reshape(4 * H, T * B),
            prev_hiddens.swapaxes(0, 1).reshape(H, T * B).astype(U.dtype),
            x.reshape(T * B, n).T,
        )
    )
    W_cotangent = _multiply_rows('nr,gr->ng', x_columns, gate_columns).astype(W.dtype)
    U_cotangent = _multiply_rows('hr,gr->hg', hidden_columns, gate_columns).astype(U.dtype)
    x_cotangent = jax.lax.optimization_barrier(_multiply_rows('ng,gr->nr', W, gate_columns))
    x_cotangent = x_cotangent.reshape(n, T, B).transpose(1, 2, 0).astype(x.dtype)
    return x_cotangent, LSTMWeights(W_cotangent, U_cotangent, gate_columns.sum(axis=1))


def _get_previous_states(residuals: _Residuals, resets: Array | None) -> tuple[Array, Array]:
    """Return c and h as each step reads them, after resets and dropout, [T, H, B]."""
    prev_cells, prev_hiddens = (
        jnp.concatenate([first.T[None], later[:-1]])
        for first, later in zip(residuals.carry, (residuals.cells, residuals.hiddens), strict=True)
    )
    if resets is not None:
        prev_cells = jnp.where(resets, 0, prev_cells)
        prev_hiddens = jnp.where(resets, 0, prev_hiddens)
    if residuals.keep is not None:
        prev_hiddens = prev_hiddens * residuals.keep.T[None]
    return prev_cells, prev_hiddens


def _multiply_rows(equation: str, left: Array, right: Array) -> Array:
    """Compute a product of left's dtype in at least f32; r is the axis of the T · B rows."""
    return jnp.einsum(
        equation, left, right.astype(left.dtype), preferred_element_type=accumulation_dtype(left)
    )


def _add_row_axis(reset: Array | None) -> Array | None:
    """Reshape [T, B] to [T, 1, B], which broadcasts to the [H, B] of a step."""
    return None if reset is None else reset[:, None, :]


def zero_where_reset(carry: Carry, reset: Array | None) -> Carry:
    """Return the carry, zero where reset [1, B]."""
    if reset is None:
        return carry
    return jnp.where(reset, 0, carry[0]), jnp.where(reset, 0, carry[1])
