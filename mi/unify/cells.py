"""One step of every cell of `mi.cells`, written with the one equation.

Each function takes what the cell's call takes, with T = 1: in a longer sequence every step is the
same composition, of another carry. f, i, o stand for the gates after their sigmoid.
"""

from collections.abc import Sequence
from typing import Any

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
from mi.unify.composition import Composition, Product, as_mi, make_pointwise

_GATES = 'sigmoid of the gates, tanh of the candidate and of c; sums'


@as_mi.register
def lstm(
    module: LSTM, variables: Any, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """The three gates."""
    p = variables['params']
    (c, h), x_t = _first(carry, x, reset)
    (c, h), gates = _gated(c, x_t @ p['W'] + h @ p['U'] + p['b'][None])
    return Composition(gates, ((c, h), h[None]), _GATES)


@as_mi.register
def mlstm(
    module: MultiplicativeLSTM, variables: Any, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """m, a low-rank form of x and h, and the three gates."""
    p = variables['params']
    (c, h), x_t = _first(carry, x, reset)
    m = Product(
        name='intermediate state m',
        x_is='the input x_t',
        z_is='the state h before the step',
        x=x_t,
        z=h,
        W=jnp.einsum('ik,jk->ijk', p['U_m'], p['W_m']),
    )
    (c, h), gates = _gated(c, x_t @ p['W'] + m() @ p['U'] + p['b'][None])
    return Composition((m, *gates), ((c, h), h[None]), _GATES)


@as_mi.register
def mi_lstm(
    module: MILSTM, variables: Any, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """All four terms of the equation, W of low rank, make the gates before their activation."""
    p = variables['params']
    (c, h), x_t = _first(carry, x, reset)
    a = Product(
        name='gates before their activation',
        x_is='the input x_t',
        z_is='the state h before the step',
        x=x_t,
        z=h,
        W=jnp.einsum('k,ik,jk->ijk', p['alpha'], p['U'], p['W']),
        U=p['beta_1'][None] * p['U'],
        V=p['beta_2'][None] * p['W'],
        b=p['b'],
    )
    (c, h), gates = _gated(c, a())
    return Composition((a, *gates), ((c, h), h[None]), _GATES)


@as_mi.register
def mogrifier(
    module: MogrifierLSTM, variables: Any, carry: Carry, x: Array, reset: Array | None = None
) -> Composition:
    """One pointwise product for each round, and the three gates."""
    p = variables['params']
    (c, h), x_t = _first(carry, x, reset)
    products = []
    for i in range(1, module.rounds + 1):
        letter = 'Q' if i % 2 else 'R'
        if module.rank is None:
            matrix = p[f'{letter}_{i}']
        else:
            matrix = p[f'{letter}_{i}_left'] @ p[f'{letter}_{i}_right']
        gated, by = (x_t, h) if i % 2 else (h, x_t)
        product = Product(
            name=f'round {i}',
            x_is='the input' if i % 2 else 'the state h',
            z_is=f'a gate, 2σ of an affine map of {"the state h" if i % 2 else "the input"}',
            x=gated,
            z=2 * jax.nn.sigmoid(by @ matrix + p[f'{letter.lower()}_{i}'][None]),
            W=make_pointwise(gated.shape[-1]),
        )
        products.append(product)
        x_t, h = (product(), h) if i % 2 else (x_t, product())
    a = x_t @ p['W'] + h @ p['U'] + p['b'][None]
    (c, h), gates = _gated(c, a, capped=module.capped)
    return Composition((*products, *gates), ((c, h), h[None]), _GATES)


@as_mi.register
def hyper_lstm(
    module: HyperLSTM, variables: Any, carry: HyperCarry, x: Array, reset: Array | None = None
) -> Composition:
    """α(z) ⊙ x W and α(z) ⊙ h U as linear hypernetworks of z, and the gates of both LSTMs."""
    p = variables['params']
    (c, h, hyper_c, hyper_h), x_t = _first(carry, x, reset)
    E, H = module.embedding, module.features

    a = x_t @ p['hyper_W'] + h @ p['hyper_U'] + hyper_h @ p['hyper_V'] + p['hyper_b'][None]
    (hyper_c, hyper_h), hyper_gates = _gated(hyper_c, a, norms=p, of='hyper_', name='small LSTM: ')

    each_gate = jnp.eye(4)

    def scaled(name: str, x_is: str, x: Array, letter: str, weights: Array) -> Product:
        W = jnp.einsum('gf,geh,nfh->genfh', each_gate, p[f'D_{letter}'], weights.reshape(-1, 4, H))
        return Product(
            name=name,
            x_is=x_is,
            z_is='the embedding of the small LSTM for these weights',
            x=x,
            z=hyper_h @ p[f'Z_{letter}'] + p[f'z_{letter}'][None],
            W=W.reshape(4 * E, -1, 4 * H),
        )

    of_x = scaled('α(z) ⊙ x W', 'the input x_t', x_t, 'x', p['W'])
    of_h = scaled('α(z) ⊙ h U', 'the state h before the step', h, 'h', p['U'])
    z_b = (hyper_h @ p['Z_b']).reshape(-1, 4, E)
    beta = jnp.einsum('bge,geh->bgh', z_b, p['D_b']).reshape(-1, 4 * H)
    (c, h), gates = _gated(c, of_x() + of_h() + beta + p['b'][None], norms=p)
    around = _GATES + ('; layer norm of the gates and of c' if module.layer_norm else '')
    return Composition(
        (*hyper_gates, of_x, of_h, *gates), ((c, h, hyper_c, hyper_h), h[None]), around
    )


def _first(carry: Sequence[Array], x: Array, reset: Array | None) -> tuple[list[Array], Array]:
    """The carry, zeroed where reset, and x_t [B, n] of a sequence of one step."""
    if x.shape[0] != 1:
        raise ValueError(f'as_mi of a cell is that of one step, x [1, B, n]; got {x.shape}')
    if reset is not None:
        carry = [jnp.where(reset[0][:, None], 0, a) for a in carry]
    return list(carry), x[0]


def _gated(
    c: Array,
    a: Array,
    *,
    capped: bool = False,
    norms: Any = (),
    of: str = '',
    name: str = '',
) -> tuple[Carry, tuple[Product, ...]]:
    """(c, h) after the step and its three products, from i, f, o, j [B, 4H] before activation.

    Where `norms`, the parameters, has a gain and shift for the gates and for c, they are used.
    """
    H = c.shape[-1]
    if f'{of}gates_gain' in norms:
        each = _standardized(a.reshape(-1, 4, H)).reshape(a.shape)
        a = each * norms[f'{of}gates_gain'][None] + norms[f'{of}gates_shift'][None]
    i, f, o = (jax.nn.sigmoid(a[:, k * H : (k + 1) * H]) for k in range(3))

    def product(what: str, x_is: str, z_is: str, x: Array, z: Array) -> Product:
        return Product(name=name + what, x_is=x_is, z_is=z_is, x=x, z=z, W=make_pointwise(H))

    new = product(
        'input gate',
        'the candidate tanh(j)',
        'the gate min(1 − f, i)' if capped else 'the gate i',
        jnp.tanh(a[:, 3 * H :]),
        jnp.minimum(1 - f, i) if capped else i,
    )
    kept = product('forget gate', 'c before the step', 'the gate f', c, f)
    c = new() + kept()
    seen = c
    if f'{of}c_gain' in norms:
        seen = _standardized(c) * norms[f'{of}c_gain'][None] + norms[f'{of}c_shift'][None]
    out = product('output gate', 'tanh of c after the step', 'the gate o', jnp.tanh(seen), o)
    return (c, out()), (new, kept, out)


def _standardized(a: Array) -> Array:
    centred = a - a.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
