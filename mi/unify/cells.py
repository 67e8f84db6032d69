"""Converters for one step of every cell in `mi.cells`.

Each function takes the arguments of the cell's call, with T = 1. In a longer sequence, every step
is the same composition with a different carry. f, i and o are the gates after the sigmoid.
"""

from collections.abc import Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array

from mi.cells import (
    LSTM,
    MILSTM,
    Carry,
    HyperLSTM,
    MogrifierLSTM,
    MultiplicativeLSTM,
)
from mi.cells.hyper_lstm import HyperCarry
from mi.unify.composition import Composition, Params, Product, Variables, make_pointwise

_GATES = 'sigmoid of the gates, tanh of the candidate and of c; sums'
_NO_NORMS: Params = MappingProxyType({})


def convert_lstm(
    module: LSTM, variables: Variables, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """Convert an LSTM step to the products of its three gates."""
    params = variables['params']
    (c, h), x_t = _take_step(carry, x, reset)
    gate_inputs = x_t @ params['W'] + h @ params['U'] + params['b'][None]
    (c, h), gates = _apply_gates(c, gate_inputs)
    return Composition(gates, ((c, h), h[None]), _GATES)


def convert_mlstm(
    module: MultiplicativeLSTM,
    variables: Variables,
    carry: Carry,
    x: Array,
    reset: Array | None = None,
) -> Composition:
    """Convert an mLSTM step to m, a low-rank form of x and h, and the products of its gates."""
    params = variables['params']
    (c, h), x_t = _take_step(carry, x, reset)
    intermediate = Product(
        name='intermediate state m',
        x_is='the input x_t',
        z_is='the state h before the step',
        x=x_t,
        z=h,
        W=jnp.einsum('ik,jk->ijk', params['U_m'], params['W_m']),
    )
    gate_inputs = x_t @ params['W'] + intermediate() @ params['U'] + params['b'][None]
    (c, h), gates = _apply_gates(c, gate_inputs)
    return Composition((intermediate, *gates), ((c, h), h[None]), _GATES)


def convert_mi_lstm(
    module: MILSTM, variables: Variables, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """Convert an MI-LSTM step to its pre-activations, with all four terms, and gate products."""
    params = variables['params']
    (c, h), x_t = _take_step(carry, x, reset)
    gate_inputs = Product(
        name='gates before their activation',
        x_is='the input x_t',
        z_is='the state h before the step',
        x=x_t,
        z=h,
        W=jnp.einsum('k,ik,jk->ijk', params['alpha'], params['U'], params['W']),
        U=params['beta_1'][None] * params['U'],
        V=params['beta_2'][None] * params['W'],
        b=params['b'],
    )
    (c, h), gates = _apply_gates(c, gate_inputs())
    return Composition((gate_inputs, *gates), ((c, h), h[None]), _GATES)


def convert_mogrifier(
    module: MogrifierLSTM, variables: Variables, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """Convert a Mogrifier step to one pointwise product per round, and its gates' products."""
    params = variables['params']
    (c, h), x_t = _take_step(carry, x, reset)
    # Rounds alternate: h gates x in odd rounds, x gates h in even ones.
    products = []
    for round_index in range(1, module.rounds + 1):
        is_odd = round_index % 2 == 1
        letter = 'Q' if is_odd else 'R'
        if module.rank is None:
            matrix = params[f'{letter}_{round_index}']
        else:
            left, right = (params[f'{letter}_{round_index}_{side}'] for side in ('left', 'right'))
            matrix = left @ right
        bias = params[f'{letter.lower()}_{round_index}'][None]
        stream, context = (x_t, h) if is_odd else (h, x_t)
        product = Product(
            name=f'round {round_index}',
            x_is='the input' if is_odd else 'the state h',
            z_is=f'a gate, 2σ of an affine map of {"the state h" if is_odd else "the input"}',
            x=stream,
            z=2 * jax.nn.sigmoid(context @ matrix + bias),
            W=make_pointwise(stream.shape[-1]),
        )
        products.append(product)
        x_t, h = (product(), h) if is_odd else (x_t, product())
    gate_inputs = x_t @ params['W'] + h @ params['U'] + params['b'][None]
    (c, h), gates = _apply_gates(c, gate_inputs, capped=module.capped)
    return Composition((*products, *gates), ((c, h), h[None]), _GATES)


def convert_hyper_lstm(
    module: HyperLSTM, variables: Variables, carry: HyperCarry, x: Array, reset: Array | None = None
) -> Composition:
    """Convert a HyperLSTM step to α(z) ⊙ x W, α(z) ⊙ h U, and the products of all its gates."""
    params = variables['params']
    (c, h, hyper_c, hyper_h), x_t = _take_step(carry, x, reset)
    embedding_size, features = module.embedding, module.features

    # The small LSTM.
    hyper_inputs = (
        x_t @ params['hyper_W']
        + h @ params['hyper_U']
        + hyper_h @ params['hyper_V']
        + params['hyper_b'][None]
    )
    (hyper_c, hyper_h), hyper_gates = _apply_gates(
        hyper_c, hyper_inputs, norms=params, prefix='hyper_', name='small LSTM: '
    )

    # The weights of the main LSTM, scaled by its embeddings.
    gate_identity = jnp.eye(4)

    def make_scaled_product(name: str, x_is: str, x: Array, letter: str, weights: Array) -> Product:
        D, gate_weights = params[f'D_{letter}'], weights.reshape(-1, 4, features)
        W = jnp.einsum('gf,geh,nfh->genfh', gate_identity, D, gate_weights)
        return Product(
            name=name,
            x_is=x_is,
            z_is='the embedding of the small LSTM for these weights',
            x=x,
            z=hyper_h @ params[f'Z_{letter}'] + params[f'z_{letter}'][None],
            W=W.reshape(4 * embedding_size, -1, 4 * features),
        )

    x_product = make_scaled_product('α(z) ⊙ x W', 'the input x_t', x_t, 'x', params['W'])
    h_product = make_scaled_product(
        'α(z) ⊙ h U', 'the state h before the step', h, 'h', params['U']
    )
    z_b = (hyper_h @ params['Z_b']).reshape(-1, 4, embedding_size)
    beta = jnp.einsum('bge,geh->bgh', z_b, params['D_b']).reshape(-1, 4 * features)

    # The gates of the main LSTM.
    gate_inputs = x_product() + h_product() + beta + params['b'][None]
    (c, h), gates = _apply_gates(c, gate_inputs, norms=params)
    around = _GATES + ('; layer norm of the gates and of c' if module.layer_norm else '')
    return Composition(
        (*hyper_gates, x_product, h_product, *gates), ((c, h, hyper_c, hyper_h), h[None]), around
    )


def _take_step(carry: Sequence[Array], x: Array, reset: Array | None) -> tuple[list[Array], Array]:
    """Return the carry, with zeros where `reset` is True, and x_t [B, n] of the only step."""
    if x.shape[0] != 1:
        raise ValueError(f'as_mi converts one step of a cell: expected x [1, B, n], got {x.shape}')
    if reset is not None:
        carry = [jnp.where(reset[0][:, None], 0, state) for state in carry]
    return list(carry), x[0]


def _apply_gates(
    c: Array,
    gate_inputs: Array,
    *,
    capped: bool = False,
    norms: Params = _NO_NORMS,
    prefix: str = '',
    name: str = '',
) -> tuple[Carry, tuple[Product, ...]]:
    """Return (c, h) after the step, and the products of its three gates.

    Args:
      c: the cell state before the step, [B, H].
      gate_inputs: the pre-activations of the gates i, f, o and the candidate j, [B, 4H].
      capped: whether to limit the input gate to 1 − f.
      norms: parameters, which can include a gain and a shift for the gates and for c.
      prefix: prefix of the names of these parameters.
      name: prefix of the names of the products.
    """
    # The gates, optionally normalized.
    features = c.shape[-1]
    if f'{prefix}gates_gain' in norms:
        gain, shift = norms[f'{prefix}gates_gain'][None], norms[f'{prefix}gates_shift'][None]
        standardized = _standardize(gate_inputs.reshape(-1, 4, features))
        gate_inputs = standardized.reshape(gate_inputs.shape) * gain + shift
    *logits, candidate = jnp.split(gate_inputs, 4, axis=-1)
    i, f, o = (jax.nn.sigmoid(logit) for logit in logits)

    def make_product(gate: str, x_is: str, z_is: str, x: Array, z: Array) -> Product:
        W = make_pointwise(features)
        return Product(name=name + gate, x_is=x_is, z_is=z_is, x=x, z=z, W=W)

    # The new cell state, and the output.
    update = make_product(
        'input gate',
        'the candidate tanh(j)',
        'the gate min(1 − f, i)' if capped else 'the gate i',
        jnp.tanh(candidate),
        jnp.minimum(1 - f, i) if capped else i,
    )
    memory = make_product('forget gate', 'c before the step', 'the gate f', c, f)
    c = update() + memory()
    squashed_c = jnp.tanh(c)
    if f'{prefix}c_gain' in norms:
        gain, shift = norms[f'{prefix}c_gain'][None], norms[f'{prefix}c_shift'][None]
        squashed_c = jnp.tanh(_standardize(c) * gain + shift)
    output = make_product('output gate', 'tanh of c after the step', 'the gate o', squashed_c, o)
    return (c, output()), (update, memory, output)


def _standardize(x: Array) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
