"""CELLS: one config word → one recurrent cell, run over a sequence.

Shapes: T steps, B sequences, n input features, H state features; sequences are [T, B, n].

Every cell is a Linen module with the fields `features` (H), `dtype` and `param_dtype`, called

    carry, h = cell(carry, x, reset, keep)
    x [T, B, n], reset [T, B] bool or None, keep [B, H] or None → h [T, B, H]

Where `reset` is true, the state is zeroed before the step. `keep` is what h_{t−1} is multiplied by,
at every step, before anything reads it: a mask of state dropout, the same for all steps (Gal &
Ghahramani, 2016), or None. The carry is a tuple of arrays that starts with c and h, each [B, H];
`cell.initial(batch)` is the carry before the first step, and the one that is returned continues the
sequence in the next call. `dtype` is that of the products with the weights; gates and state are f32
(f64 where `dtype` is), as is what the products add up in. What depends on x alone is
made for the whole sequence before the loop. The four gates stand side by side in the order
i, f, o, j; W are weights of x, U of h, and the forget gate's bias starts at 1.

    word           class                 options
    'lstm'         LSTM                  impl
    'mlstm'        MultiplicativeLSTM
    'mi_lstm'      MILSTM                alpha, beta
    'mogrifier'    MogrifierLSTM         rounds, rank, capped
    'hyper_lstm'   HyperLSTM             hyper_features, embedding, layer_norm

A config file adds a cell of its own, for both trainers: `CELLS['mine'] = MyCell`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi import cudnn
from mi.config import has_parameter, suggest
from mi.contract import accumulation_dtype, linear

Impl = Literal['xla', 'cudnn']
Carry = tuple[Array, Array]  # (c, h), each [B, H], f32 at least
HyperCarry = tuple[Array, Array, Array, Array]  # (c, h) of the main cell, (c, h) of the small one


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997; forget gate: Gers et al., 2000).

        i, f, o, j = x_t W + h_{t−1} U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    W [n, 4H] is applied to the whole sequence at once, U [H, 4H] in the loop; the four gates stand
    side by side in this order. The forget gate's bias starts at 1.

    Attributes:
      features: H.
      impl: 'xla', or 'cudnn' for NVIDIA's own, which is f32 and has neither reset nor keep; on its
        GPUs alone.
      dtype: of the products with W and U; the gates and the state are f32 at least.
      param_dtype: of the parameters.
    """

    features: int
    impl: Impl = 'xla'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """(c, h), [T, B, n] → (c, h) after the last step, h of every step [T, B, H].

        Raises:
          ValueError: if the shapes of carry, x, reset and keep do not fit, as with all cells, or
            cuDNN has not what is asked for.
        """
        H = self.features
        _check(carry, x, reset, keep, (H, H))
        n = x.shape[-1]
        W = self.param('W', initializers.lecun_normal(), (n, 4 * H), self.param_dtype)
        U = self.param('U', _orthogonal_gates, (H, 4 * H), self.param_dtype)
        b = self.param('b', _forget_bias, (4 * H,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)
        if self.impl == 'cudnn':
            if x.dtype != jnp.float32 or reset is not None or keep is not None:
                raise ValueError(
                    f"impl='cudnn' is for f32 without reset and keep; got {x.dtype}, reset "
                    f"{reset is not None}, keep {keep is not None}; use impl='xla'"
                )
            return cudnn.lstm(carry, x, (W, U, b))
        carry, keep = _widened((carry, keep), x.dtype)
        run = lstm if len(x) else lstm_reference  # whose loop may have no step
        carry, h = run(carry, x, W, U, b.astype(accumulation_dtype(x)), reset, keep)
        return carry, h.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """The zero state."""
        return initial(batch, self.features, self.dtype or self.param_dtype)


class MultiplicativeLSTM(nn.Module):
    """Multiplicative LSTM, mLSTM (Krause et al., 2016).

        m_t = (x_t W_m) ⊙ (h_{t−1} U_m)
        i, f, o, j = x_t W + m_t U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    W_m [n, H], U_m [H, H], W [n, 4H], U [H, 4H]. It is the LSTM whose recurrent weights depend on
    the input: h_{t−1} U becomes h_{t−1} U_m diag(x_t W_m) U.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
    """

    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """(c, h), [T, B, n] → (c, h) after the last step, h of every step [T, B, H]."""
        H = self.features
        _check(carry, x, reset, keep, (H, H))
        n = x.shape[-1]
        W_m = self.param('W_m', initializers.lecun_normal(), (n, H), self.param_dtype)
        U_m = self.param('U_m', _orthogonal, (H, H), self.param_dtype)
        W = self.param('W', initializers.lecun_normal(), (n, 4 * H), self.param_dtype)
        U = self.param('U', _orthogonal_gates, (H, 4 * H), self.param_dtype)
        b = self.param('b', _forget_bias, (4 * H,), self.param_dtype)
        x, W_m, U_m, W, U = nn.dtypes.promote_dtype(x, W_m, U_m, W, U, dtype=self.dtype)

        def step(carry: Carry, row: tuple[Array, Array]) -> tuple[Carry, Array]:
            (c, h), (Wx_m, Wx) = carry, row
            m = Wx_m * _times(h, U_m)
            c, h = _update(c, Wx + _times(m, U))
            return (c, h), h

        rows = _times(x, W_m), _times(x, W) + _row(b, 3, x.dtype)
        carry, h = _scan(step, carry, rows, reset, keep, x.dtype)
        return carry, h.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """The zero state."""
        return initial(batch, self.features, self.dtype or self.param_dtype)


class MILSTM(nn.Module):
    """LSTM with multiplicative integration, MI-LSTM (Wu et al., 2016).

        i, f, o, j = α ⊙ Wx ⊙ Uh + β₁ ⊙ Uh + β₂ ⊙ Wx + b,   Wx = x_t W, Uh = h_{t−1} U
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    W [n, 4H], U [H, 4H]; α, β₁, β₂, b [4H]. With α = 0 and β₁ = β₂ = 1 it is the LSTM.

    α starts at 1 and β₁, β₂ at ½: recalled from the paper, where they differ between experiments,
    and not checked against it; public code has 1, 1, 1 too. The paper's b starts at 0; the forget
    gate's 1 is ours.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      alpha, beta: where α, and where β₁ and β₂ start.
    """

    features: int
    alpha: float = 1.0
    beta: float = 0.5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """(c, h), [T, B, n] → (c, h) after the last step, h of every step [T, B, H]."""
        H = self.features
        _check(carry, x, reset, keep, (H, H))
        n = x.shape[-1]
        alpha_init, beta_init = map(initializers.constant, (self.alpha, self.beta))
        W = self.param('W', initializers.lecun_normal(), (n, 4 * H), self.param_dtype)
        U = self.param('U', _orthogonal_gates, (H, 4 * H), self.param_dtype)
        alpha = self.param('alpha', alpha_init, (4 * H,), self.param_dtype)
        beta_1 = self.param('beta_1', beta_init, (4 * H,), self.param_dtype)
        beta_2 = self.param('beta_2', beta_init, (4 * H,), self.param_dtype)
        b = self.param('b', _forget_bias, (4 * H,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)

        def step(carry: Carry, row: tuple[Array, Array]) -> tuple[Carry, Array]:
            (c, h), (of_Uh, rest) = carry, row
            c, h = _update(c, of_Uh * _times(h, U) + rest)
            return (c, h), h

        Wx = _times(x, W)
        alpha, beta_1, beta_2, b = (_row(a, 3, x.dtype) for a in (alpha, beta_1, beta_2, b))
        rows = alpha * Wx + beta_1, beta_2 * Wx + b
        carry, h = _scan(step, carry, rows, reset, keep, x.dtype)
        return carry, h.astype(x.dtype)

    def initial(self, batch: int) -> Carry:
        """The zero state."""
        return initial(batch, self.features, self.dtype or self.param_dtype)


class MogrifierLSTM(nn.Module):
    """Mogrifier LSTM (Melis et al., 2020): x and h gate one another before the LSTM sees them.

        for round i = 1 … r:   x ← 2σ(h Q_i + q_i) ⊙ x   for odd i
                               h ← 2σ(x R_i + r_i) ⊙ h   for even i
        i, f, o, j = x W + h U + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    starting from x_t and h_{t−1}; Q_i [H, n], R_i [n, H], the LSTM's weights as in `LSTM`. With a
    rank, Q_i = Q_i_left Q_i_right, [H, rank] and [rank, n], and R_i likewise. The biases q_i [n]
    and r_i [H] are those of the released code; the paper's equations have none. They start at 0.

    Nothing is made before the loop: already the first round needs h_{t−1}.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      rounds: r; 0 for the LSTM.
      rank: of every Q_i and R_i; None for full matrices.
      capped: whether the input gate is min(1 − σ(f), σ(i)), which keeps c in [−1, 1].
    """

    features: int
    rounds: int = 5
    rank: int | None = None
    capped: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, x: Array, reset: Array | None = None, keep: Array | None = None
    ) -> tuple[Carry, Array]:
        """(c, h), [T, B, n] → (c, h) after the last step, h of every step [T, B, H].

        Raises:
          ValueError: also if rounds < 0 or rank < 1.
        """
        H = self.features
        _check(carry, x, reset, keep, (H, H))
        n = x.shape[-1]
        if self.rounds < 0 or (self.rank is not None and self.rank < 1):
            raise ValueError(
                f'rounds must be at least 0 and rank at least 1, or None for full matrices; '
                f'got rounds={self.rounds}, rank={self.rank}'
            )
        W = self.param('W', initializers.lecun_normal(), (n, 4 * H), self.param_dtype)
        U = self.param('U', _orthogonal_gates, (H, 4 * H), self.param_dtype)
        b = self.param('b', _forget_bias, (4 * H,), self.param_dtype)
        x, W, U = nn.dtypes.promote_dtype(x, W, U, dtype=self.dtype)
        maps = []
        for i in range(1, self.rounds + 1):
            letter, size_in, size_out = ('Q', H, n) if i % 2 else ('R', n, H)
            shapes = {f'{letter}_{i}': (size_in, size_out)}
            if self.rank is not None:
                shapes = {
                    f'{letter}_{i}_left': (size_in, self.rank),
                    f'{letter}_{i}_right': (self.rank, size_out),
                }
            lecun = initializers.lecun_normal()
            factors = [self.param(k, lecun, s, self.param_dtype) for k, s in shapes.items()]
            bias = self.param(
                f'{letter.lower()}_{i}', initializers.zeros, (size_out,), self.param_dtype
            )
            maps.append(([factor.astype(x.dtype) for factor in factors], bias))
        dtype = x.dtype

        def step(carry: Carry, x_t: Array) -> tuple[Carry, Array]:
            (c, h), x = carry, x_t.astype(accumulation_dtype(dtype))
            for i, (factors, bias) in enumerate(maps, start=1):
                gate = 2 * nn.sigmoid(
                    functools.reduce(_times, factors, h if i % 2 else x) + _row(bias, 2, dtype)
                )
                x, h = (gate * x, h) if i % 2 else (x, gate * h)
            gates = _times(x, W) + _times(h, U) + _row(b, 2, dtype)
            c, h = _update(c, gates, capped=self.capped)
            return (c, h), h

        carry, h = _scan(step, carry, x, reset, keep, dtype)
        return carry, h.astype(dtype)

    def initial(self, batch: int) -> Carry:
        """The zero state."""
        return initial(batch, self.features, self.dtype or self.param_dtype)


class HyperLSTM(nn.Module):
    """HyperLSTM (Ha et al., 2017): a small LSTM scales the weights of a large one.

        ĉ_t, ĥ_t = LSTM of G features, on [x_t; h_{t−1}]
        z_x = ĥ_t Z_x + z_x⁰,   z_h = ĥ_t Z_h + z_h⁰,   z_b = ĥ_t Z_b     E for each gate
        i, f, o, j = α_x(z_x) ⊙ x_t W + α_h(z_h) ⊙ h_{t−1} U + β(z_b) + b
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(j),   h_t = σ(o) ⊙ tanh(c_t)

    α_x, α_h and β are linear for each gate on its own: D_x, D_h, D_b [4, E, H]; Z_x, Z_h, Z_b
    [G, 4E]. The small LSTM has the weights hyper_W of x, hyper_U of h and hyper_V of ĥ. The paper
    writes ĥ_{t−1} where the z are made; ĥ_t, here, is what the authors' code has.

    Initialisation as published: W, U and the small LSTM's weights orthogonal; Z_x = Z_h = 0,
    z_x⁰ = z_h⁰ = 1 and D_x = D_h = 0.1/E, so that α_x = α_h = 0.1; Z_b normal of deviation 0.01,
    D_b = 0, so that β = 0. The forget gates' bias of 1 is the code's, the paper's is 0.

    Attributes:
      features, dtype, param_dtype: as in `LSTM`.
      hyper_features: G; 128 on characters of Penn Treebank, 256 on enwik8.
      embedding: E; 4 and 64 there.
      layer_norm: whether every i, f, o, j, and the c inside tanh(c), are normalised over its
        features, with a gain and a shift, in both LSTMs; the forget gates' 1 is in the shift then.
        The paper's recurrent dropout is left out.
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
        """(c, h, ĉ, ĥ), [T, B, n] → the carry after the last step, h of every step [T, B, H]."""
        H, G, E = self.features, self.hyper_features, self.embedding
        _check(carry, x, reset, keep, (H, H, G, G))
        n = x.shape[-1]
        zeros, ones, scale = initializers.zeros, initializers.ones, initializers.constant(0.1 / E)
        bias = zeros if self.layer_norm else _forget_bias

        def param(name: str, init: Callable[..., Array], *shape: int) -> Array:
            return self.param(name, init, shape, self.param_dtype)

        def norm(name: str, groups: int, size: int) -> Callable[[Array], Array]:
            if not self.layer_norm:
                return lambda a: a
            gain = param(f'{name}_gain', ones, groups * size)
            shift = param(f'{name}_shift', _forget_bias if groups == 4 else zeros, groups * size)
            return functools.partial(_normalised, gain=gain, shift=shift, groups=groups)

        weights = (
            param('W', _orthogonal_gates, n, 4 * H),
            param('U', _orthogonal_gates, H, 4 * H),
            param('hyper_W', _orthogonal_gates, n, 4 * G),
            param('hyper_U', _orthogonal_gates, H, 4 * G),
            param('hyper_V', _orthogonal_gates, G, 4 * G),
            param('Z_x', zeros, G, 4 * E),
            param('Z_h', zeros, G, 4 * E),
            param('Z_b', initializers.normal(0.01), G, 4 * E),
            param('D_x', scale, 4, E, H),
            param('D_h', scale, 4, E, H),
            param('D_b', zeros, 4, E, H),
        )
        promoted = nn.dtypes.promote_dtype(x, *weights, dtype=self.dtype)
        x, W, U, hyper_W, hyper_U, hyper_V, Z_x, Z_h, Z_b, D_x, D_h, D_b = promoted
        b, hyper_b = param('b', bias, 4 * H), param('hyper_b', bias, 4 * G)
        z_x, z_h = param('z_x', ones, 4 * E), param('z_h', ones, 4 * E)
        gates, cell = norm('gates', 4, H), norm('c', 1, H)
        hyper_gates, hyper_cell = norm('hyper_gates', 4, G), norm('hyper_c', 1, G)

        def generated(z: Array, D: Array) -> Array:
            z = z.reshape(-1, 4, E).astype(D.dtype)
            y = jnp.einsum('bge,geh->bgh', z, D, preferred_element_type=accumulation_dtype(D))
            return y.reshape(-1, 4 * H)

        def step(carry: HyperCarry, row: tuple[Array, Array]) -> tuple[HyperCarry, Array]:
            (c, h, hyper_c, hyper_h), (Wx, hyper_Wx) = carry, row
            a = hyper_Wx + _times(h, hyper_U) + _times(hyper_h, hyper_V)
            hyper_c, hyper_h = _update(hyper_c, hyper_gates(a), cell=hyper_cell)
            alpha_x = generated(_times(hyper_h, Z_x) + _row(z_x, 2, x.dtype), D_x)
            alpha_h = generated(_times(hyper_h, Z_h) + _row(z_h, 2, x.dtype), D_h)
            beta = generated(_times(hyper_h, Z_b), D_b)
            a = alpha_x * Wx + alpha_h * _times(h, U) + beta + _row(b, 2, x.dtype)
            c, h = _update(c, gates(a), cell=cell)
            return (c, h, hyper_c, hyper_h), h

        rows = _times(x, W), _times(x, hyper_W) + _row(hyper_b, 3, x.dtype)
        carry, h = _scan(step, carry, rows, reset, keep, x.dtype)
        return carry, h.astype(x.dtype)

    def initial(self, batch: int) -> HyperCarry:
        """The zero state of both LSTMs."""
        dtype = self.dtype or self.param_dtype
        return *initial(batch, self.features, dtype), *initial(batch, self.hyper_features, dtype)


CELLS: dict[str, Callable[..., nn.Module]] = {
    'lstm': LSTM,
    'mlstm': MultiplicativeLSTM,
    'mi_lstm': MILSTM,
    'mogrifier': MogrifierLSTM,
    'hyper_lstm': HyperLSTM,
}


def get(name: str, **options: Any) -> Callable[..., nn.Module]:
    """Return the constructor of CELLS[name], with those options that it has a field for.

    Raises:
      ValueError: on an unknown word, naming the nearest known one.
    """
    if name not in CELLS:
        raise ValueError(f'unknown cell {name!r}; {suggest(name, CELLS)}')
    cell = CELLS[name]
    return functools.partial(cell, **{k: v for k, v in options.items() if has_parameter(cell, k)})


def initial(batch: int, features: int, dtype: DTypeLike = jnp.float32) -> Carry:
    """The zero state of an LSTM with products of this dtype: (c, h), each [B, H]."""
    wide = accumulation_dtype(dtype)
    return jnp.zeros((batch, features), wide), jnp.zeros((batch, features), wide)


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
        c, h = _update(c, Wx + _times(h, U))
        return (c, h), h

    return _scan(step, carry, _times(x, W) + _row(b, 3, W.dtype), reset, keep, W.dtype)


def _scan(
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
    carry, keep = _widened((carry, keep), dtype)

    def reset_and_step(carry: Any, row: tuple[Any, Array | None]) -> tuple[Any, Array]:
        row_t, reset_t = row
        if reset_t is not None:
            carry = jax.tree.map(lambda a: jnp.where(reset_t[:, None], 0, a), carry)
        if keep is not None:
            c, h, *rest = carry
            carry = (c, keep * h, *rest)
        return step(carry, row_t)

    return jax.lax.scan(reset_and_step, carry, (rows, reset))


def _update(
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


def _times(a: Array, W: Array) -> Array:
    """a W in f32 at least, a product of W's dtype."""
    return linear(a.astype(W.dtype), W, out_dtype=accumulation_dtype(W))


def _row(b: Array, ndim: int, dtype: DTypeLike) -> Array:
    """b [k] as it is added to products of this dtype, with as many axes as these have."""
    return b.reshape((1,) * (ndim - 1) + b.shape).astype(accumulation_dtype(dtype))


def _widened(tree: Any, dtype: DTypeLike) -> Any:
    """The arrays in the dtype of a state beside products of this dtype: f32 at least."""
    return jax.tree.map(lambda a: a.astype(accumulation_dtype(dtype)), tree)


def _normalised(a: Array, *, gain: Array, shift: Array, groups: int) -> Array:
    """a [B, groups · H], each group with mean 0 and variance 1, times gain, plus shift."""
    each = a.reshape(a.shape[0], groups, -1)
    each = jax.nn.standardize(each, axis=-1, epsilon=1e-3)  # the ε of the authors' code
    return each.reshape(a.shape) * _row(gain, 2, a.dtype) + _row(shift, 2, a.dtype)


def _check(
    carry: Sequence[Array],
    x: Array,
    reset: Array | None,
    keep: Array | None,
    features: Sequence[int],
) -> None:
    """Raises ValueError where the shapes do not fit; features are those of the carry."""
    if x.ndim != 3:
        raise ValueError(f'x must be [T, B, n]; got {x.shape}; one step is x[None]')
    T, B, _ = x.shape
    expected, got = [(B, H) for H in features], [a.shape for a in carry]
    if got != expected:
        raise ValueError(
            f'for x {x.shape} the carry must be {expected}; got {got}; initial({B}) makes one'
        )
    if reset is not None and reset.shape != (T, B):
        raise ValueError(f'for x {x.shape} reset must be {(T, B)}; got {reset.shape}')
    if keep is not None and keep.shape != expected[1]:
        raise ValueError(f'for x {x.shape} keep must be {expected[1]}; got {keep.shape}')


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
        c, h = _zeroed(carry, reset_t)
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
        return (_zeroed((dc * f_t, dh), reset_t), dgates), None

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


def _zeroed(carry: Carry, reset: Array | None) -> Carry:
    """The carry, zero where reset [1, B]."""
    if reset is None:
        return carry
    return jnp.where(reset, 0, carry[0]), jnp.where(reset, 0, carry[1])


def _orthogonal_gates(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """[n, 4H]: an orthogonal matrix [n, H] for each gate."""
    n, H = shape[0], shape[1] // 4
    each = jax.vmap(lambda k: _orthogonal(k, (n, H), dtype))(jax.random.split(key, 4))
    return each.swapaxes(0, 1).reshape(shape)


def _orthogonal(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """An orthogonal matrix of any dtype; its decomposition is one of f32.

    Of many keys, one after another: on CPU, jaxlib's decomposition of a batch waits in one of XLA's
    threads for others of them, and two at once, as on two devices, can wait for ever.
    """

    @jax.custom_batching.sequential_vmap
    def draw(key: Array) -> Array:
        return initializers.orthogonal()(key, shape, jnp.float32)

    return draw(key).astype(dtype)


def _forget_bias(key: Array, shape: tuple[int], dtype: DTypeLike) -> Array:
    """[4H]: 1 for f, 0 for i, o, j."""
    del key
    H = shape[0] // 4
    return jnp.zeros(shape, dtype).at[H : 2 * H].set(1)
