"""The LSTM over time, with a backward pass that computes each weight gradient in one product."""

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
      W: the weights of x, [n, 4H].
      U: the weights of h, [H, 4H].
      b: the bias, [4H].
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
    """Compute `lstm` directly from its equations. Supports forward and reverse mode."""
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
    """Scan a cell's step over the inputs of all time steps, arrays [T, …].

    Args:
      step: function (carry, inputs) → (carry, h).
      carry: tuple of arrays that starts with c and h, each [B, H].
      inputs: inputs of all steps.
      reset: bool [T, B], True where the carry is zeroed before the step, or None for no resets.
      keep: dropout mask [B, H] that multiplies h before every step, or None for no dropout.
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
    """Return the next (c, h) for the state c and the pre-activations of the gates.

    Args:
      cell: the state c, [B, H].
      gates: the pre-activations of i, f, o and j, [B, 4H].
      capped: whether to limit the input gate to 1 − f.
      normalize: function that is applied to c inside tanh(c).
    """
    i, f, o, j = jnp.split(gates, 4, axis=-1)
    i, f = nn.sigmoid(i), nn.sigmoid(f)
    cell = f * cell + (jnp.minimum(1 - f, i) if capped else i) * jnp.tanh(j)
    return cell, nn.sigmoid(o) * jnp.tanh(normalize(cell))


def multiply(vectors: Array, W: Array) -> Array:
    """Multiply vectors by W in the dtype of W, and return the result in at least f32."""
    return linear(vectors.astype(W.dtype), W, out_dtype=accumulation_dtype(W))


def broadcast_row(b: Array, ndim: int, dtype: DTypeLike) -> Array:
    """Return b [k] with `ndim` axes, in the accumulation dtype of `dtype`."""
    return b.reshape((1,) * (ndim - 1) + b.shape).astype(accumulation_dtype(dtype))


def widen(tree: _Tree, dtype: DTypeLike) -> _Tree:
    """Cast arrays to the accumulation dtype of `dtype`, at least f32."""
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
    """Compute `mi.cells.LSTM` with a custom backward pass. Only supports reverse mode.

    Five choices make this faster than `lstm_reference` on CPU, as measured by benchmarks/lm.py:

    - Arrays have the features first and the batch last. Then Uᵀ h does not repack U at every step,
      and xᵀ, hᵀ and ∂gatesᵀ already have the layout of the products for ∂W, ∂U and ∂x.
    - Since σ(a) = ½ tanh(½a) + ½, a single tanh computes all gates. XLA vectorizes this tanh, but
      not separate activations of slices.
    - i, f, o, j overwrite their pre-activations, and ∂gates overwrites i, f, o, j. This saves two
      arrays [T, 4H, B].
    - (∂c, ∂c, ∂h, ∂c) is computed by a selection, because XLA does not vectorize a concatenation.
    - The backward loop only computes values that depend on later steps. The factors of ∂gates are
      computed for all steps before the loop, and ∂W and ∂U by one product each after the loop.

    Args:
      carry: the initial (c, h), each [B, H], in f32, or in f64 if W is f64.
      x: the inputs, [T, B, n], in the dtype of W.
      weights: W and U in the dtypes of their products with x and h, and b in the dtype of the
        carry.
      reset: bool [T, B], True where the carry is zeroed before the step, or None for no resets.
      keep: dropout mask [B, H] of h, which is not differentiated, or None for no dropout.

    Returns:
      (c, h) after the last step, and h of every step [T, B, H].
    """
    return _lstm_forward(carry, x, weights, reset, keep)[0]


class _Residuals(NamedTuple):
    """The arrays that the backward pass reads.

    Attributes:
      carry, x, weights, reset, keep: the arguments of `lstm`.
      gates: the activated i, f, o, j of every step, [T, 4H, B].
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
    """Return the gradients of x and of the weights, by one product each over all steps."""
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
    """Return the c and h [T, H, B] that each step reads, i.e. after resets and dropout."""
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
    """Multiply in the dtype of `left`, accumulating in at least f32, with r for the T · B rows."""
    return jnp.einsum(
        equation, left, right.astype(left.dtype), preferred_element_type=accumulation_dtype(left)
    )


def _add_row_axis(reset: Array | None) -> Array | None:
    """Reshape [T, B] to [T, 1, B], which broadcasts to the shape [H, B] of a step."""
    return None if reset is None else reset[:, None, :]


def zero_where_reset(carry: Carry, reset: Array | None) -> Carry:
    """Return the carry with zeros where `reset` [1, B] is True."""
    if reset is None:
        return carry
    return jnp.where(reset, 0, carry[0]), jnp.where(reset, 0, carry[1])
