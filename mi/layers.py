"""The multiplicative interaction layer and its cheaper forms.

    f(x, z) = zᵀWx + zᵀU + Vx + b

Shapes: x [..., n] the input, z [..., m] the context, y [..., k] the output; W [m, n, k], U [m, k],
V [n, k], b [k]. Leading axes of x and z broadcast. Source of the equation and of its forms:
Jayakumar et al., Multiplicative Interactions and Where to Find Them, ICLR 2020.

Initialisation is ours: for unit-variance x the *sum* of the terms has unit variance, as that of a
Dense layer with `lecun_normal` weights, an equal share of it from each term. The context has
unit-variance entries ('dense'), or one entry that is 1 and the rest 0 ('one_hot').
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.config import suggest
from mi.kernels.bilinear import bilinear, linear

Context = Literal['dense', 'one_hot']


def check_context(context: str) -> None:
    """Raise ValueError unless the word is one that initializers and scales depend on."""
    if context not in get_args(Context):
        raise ValueError(f'unknown context {context!r}; {suggest(context, get_args(Context))}')


def context_init(context: Context, variance: float = 1.0) -> Initializer:
    """Initialiser of a matrix [m, k] for which each entry of zᵀU has this variance."""
    check_context(context)
    if context == 'one_hot':  # zᵀU is a row of U: the fan-in is 1
        return initializers.variance_scaling(
            variance, 'fan_in', 'truncated_normal', in_axis=(), batch_axis=0
        )
    return initializers.variance_scaling(variance, 'fan_in', 'truncated_normal')


def input_init(variance: float = 1.0) -> Initializer:
    """Initialiser of a matrix [n, k] for which each entry of Vx has this variance."""
    return initializers.variance_scaling(variance, 'fan_in', 'truncated_normal')


def interaction_init(context: Context, variance: float = 1.0) -> Initializer:
    """Initialiser of a tensor [m, n, k] for which each entry of zᵀWx has this variance."""
    check_context(context)
    if context == 'one_hot':
        return initializers.variance_scaling(
            variance, 'fan_in', 'truncated_normal', in_axis=1, out_axis=2, batch_axis=0
        )
    return initializers.variance_scaling(
        variance, 'fan_in', 'truncated_normal', in_axis=(0, 1), out_axis=2
    )


def check_dense(z: Array) -> None:
    """Raise ValueError if the context comes as integers, for a module that takes vectors alone."""
    if jnp.issubdtype(z.dtype, jnp.integer):
        raise ValueError(
            f'z is {z.dtype} {z.shape}: expected a context [..., m] in a float dtype, for integers '
            f'are ids of contexts and not their entries. Try jax.nn.one_hot(z, m)'
        )


def one_hot(ids: Array, contexts: int, dtype: DTypeLike) -> Array:
    """Return the contexts [..., m] that integers [...] stand for; out of range they are clipped."""
    return jax.nn.one_hot(jnp.clip(ids, 0, contexts - 1), contexts, dtype=dtype)


def align_streams(x: Array, z: Array, *, ids: bool = False) -> tuple[Array, Array]:
    """x and z with the same leading axes in number: [..., n] and [..., m], or integers [...].

    Args:
      x: [..., n].
      z: [..., m], or integers [...], each the id of a one-hot context.
      ids: whether integers are taken.

    Raises:
      ValueError: if one is a scalar, their leading axes do not broadcast, or z are integers that
        are not taken.
    """
    if not ids and z is not x:
        check_dense(z)
    ids = jnp.issubdtype(z.dtype, jnp.integer) and z is not x
    if x.ndim < 1 or (z.ndim < 1 and not ids):
        raise ValueError(f'x must be [..., n] and z [..., m]; got x {x.shape}, z {z.shape}')
    z_axes = z.shape if ids else z.shape[:-1]
    try:
        jnp.broadcast_shapes(x.shape[:-1], z_axes)
    except ValueError as error:
        raise ValueError(
            f'the leading axes of x {x.shape} and z {z.shape} do not broadcast; '
            f'give z an axis of length 1 where it is shared'
        ) from error
    axes = max(x.ndim - 1, len(z_axes))
    x = x.reshape((1,) * (axes + 1 - x.ndim) + x.shape)
    z = z.reshape((1,) * (axes - len(z_axes)) + z.shape)
    return x, z


class Affine(nn.Module):
    """Vx + b, x [..., n] → [..., k]: `nn.Dense`, but accumulated in f32 for bf16 inputs too.

    Attributes:
      features: k.
      dtype, param_dtype, precision: as in `MultiplicativeInteraction`.
      V_init: `lecun_normal`.
      b_init: zeros.
    """

    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    V_init: Initializer = input_init()
    b_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        V = self.param('V', self.V_init, (x.shape[-1], self.features), self.param_dtype)
        b = self.param('b', self.b_init, (self.features,), self.param_dtype)
        x, V, b = nn.dtypes.promote_dtype(x, V, b, dtype=self.dtype)
        return linear(x, V, precision=self.precision) + b.reshape((1,) * (x.ndim - 1) + b.shape)


class MultiplicativeInteraction(nn.Module):
    """The full form: f(x, z) = zᵀWx + zᵀU + Vx + b (Jayakumar et al., 2020).

    With `use_W=False` it is a Dense layer on the concatenation of x and z; with a one-hot context,
    a multi-head read-out; read as (zᵀW + V) x + (zᵀU + b), a linear hypernetwork. The forms that
    inherit from it differ in nothing but W, for which they have fewer parameters.

    Attributes:
      features: k.
      context: 'dense' or 'one_hot'; decides the scale at which W and U are initialised.
      contexts: m, where the contexts come as integers.
      use_W, use_U, use_V, use_b: which terms there are.
      dtype: of the computation; None for the promoted dtype of inputs and parameters.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      W_init, U_init, V_init: None for equal shares of a unit variance.
      b_init: zeros.
    """

    features: int
    context: Context = 'dense'
    contexts: int | None = None
    use_W: bool = True
    use_U: bool = True
    use_V: bool = True
    use_b: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    W_init: Initializer | None = None
    U_init: Initializer | None = None
    V_init: Initializer | None = None
    b_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., k].

        z may also be integers [...] in [0, m), one-hot contexts without their zeros: of W and U
        only those rows are read and multiplied. The field `contexts` says m then.

        Raises:
          ValueError: if the leading axes do not broadcast, or integers come without `contexts`.
        """
        return self._sum(*_inputs(self, x, z))

    def _sum(self, x: Array, z: Array, m: int) -> Array:
        n, k, dtype = x.shape[-1], self.features, x.dtype
        share = 1 / max(1, self.use_W + self.use_U + self.use_V)
        U_init = self.U_init or context_init(self.context, share)
        V_init = self.V_init or input_init(share)

        y = jnp.zeros((1,) * x.ndim, dtype)
        if self.use_W:
            y = y + self._interaction(x, z, m, share)
        if self.use_U:
            U = self.param('U', U_init, (m, k), self.param_dtype)
            y = y + linear(z, U.astype(dtype), precision=self.precision)
        if self.use_V:
            V = self.param('V', V_init, (n, k), self.param_dtype)
            y = y + linear(x, V.astype(dtype), precision=self.precision)
        if self.use_b:
            b = self.param('b', self.b_init, (k,), self.param_dtype)
            y = y + b.astype(dtype).reshape((1,) * (x.ndim - 1) + (k,))
        z_axes = z.shape if jnp.issubdtype(z.dtype, jnp.integer) else z.shape[:-1]
        return jnp.broadcast_to(y, (*jnp.broadcast_shapes(x.shape[:-1], z_axes), k))

    def _interaction(self, x: Array, z: Array, m: int, variance: float) -> Array:
        """zᵀWx, each entry of this variance at initialisation."""
        init = self.W_init or interaction_init(self.context, variance)
        W = self.param('W', init, (m, x.shape[-1], self.features), self.param_dtype)
        return bilinear(x, z, W.astype(x.dtype), precision=self.precision)


class LowRankMultiplicativeInteraction(MultiplicativeInteraction, kw_only=True):
    """The low-rank form: W = Σ_r p_r ⊗ q_r ⊗ o_r, a CP decomposition.

        zᵀWx = Oᵀ(zᵀP ⊙ xᵀQ),   P [m, r], Q [n, r], O [r, k]

    Attributes:
      rank: r.
      features, …: as in `MultiplicativeInteraction`.
    """

    rank: int

    def _interaction(self, x: Array, z: Array, m: int, variance: float) -> Array:
        n, k, r = x.shape[-1], self.features, self.rank
        P = self.param('P', context_init(self.context), (m, r), self.param_dtype)
        Q = self.param('Q', input_init(), (n, r), self.param_dtype)
        O = self.param('O', input_init(variance), (r, k), self.param_dtype)  # noqa: E741
        P, Q, O = (a.astype(x.dtype) for a in (P, Q, O))  # noqa: E741
        p = self.precision
        return linear(linear(z, P, precision=p) * linear(x, Q, precision=p), O, precision=p)


class TuckerMultiplicativeInteraction(MultiplicativeInteraction, kw_only=True):
    """The Tucker form: W = Σ_abc G_abc p_a ⊗ q_b ⊗ o_c, a small full form between three maps.

        zᵀWx = Oᵀ((zᵀP) G (xᵀQ)),   P [m, r], Q [n, r], G [r, r, r], O [r, k]

    Attributes:
      rank: r.
      features, …: as in `MultiplicativeInteraction`.
    """

    rank: int

    def _interaction(self, x: Array, z: Array, m: int, variance: float) -> Array:
        n, k, r = x.shape[-1], self.features, self.rank
        P = self.param('P', context_init(self.context), (m, r), self.param_dtype)
        Q = self.param('Q', input_init(), (n, r), self.param_dtype)
        G = self.param('G', interaction_init('dense'), (r, r, r), self.param_dtype)
        O = self.param('O', input_init(variance), (r, k), self.param_dtype)  # noqa: E741
        P, Q, G, O = (a.astype(x.dtype) for a in (P, Q, G, O))  # noqa: E741
        p = self.precision
        core = bilinear(linear(x, Q, precision=p), linear(z, P, precision=p), G, precision=p)
        return linear(core, O, precision=p)


class BlockMultiplicativeInteraction(MultiplicativeInteraction, kw_only=True):
    """The block-diagonal form: x and y in g blocks, and W only from a block to its own.

        y_i = zᵀW_i x_i,   i = 1…g,   W [g, m, ⌈n/g⌉, ⌈k/g⌉]

    Where g does not divide n or k, the last block is cut.

    Attributes:
      blocks: g.
      features, …: as in `MultiplicativeInteraction`.
    """

    blocks: int

    def _interaction(self, x: Array, z: Array, m: int, variance: float) -> Array:
        g, n, k = self.blocks, -(-x.shape[-1] // self.blocks), -(-self.features // self.blocks)
        one_hot = self.context == 'one_hot'
        within = initializers.variance_scaling(
            variance,
            'fan_in',
            'truncated_normal',
            in_axis=2 if one_hot else (1, 2),
            out_axis=3,
            batch_axis=(0, 1) if one_hot else 0,
        )
        W = self.param('W', self.W_init or within, (g, m, n, k), self.param_dtype)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, g * n - x.shape[-1])])
        each = functools.partial(bilinear, precision=self.precision)
        y = jax.vmap(each, in_axes=(-2, None, 0), out_axes=-2)(
            x.reshape(*x.shape[:-1], g, n), z, W.astype(x.dtype)
        )
        return y.reshape(*y.shape[:-2], g * k)[..., : self.features]


class MultiHead(MultiplicativeInteraction):
    """A read-out for each of m one-hot contexts: f(x, e_i) = W_i x + U_i, that row alone computed.

    The full form with V = b = 0, which would add nothing where z is one-hot.

    Attributes:
      features, …: as in `MultiplicativeInteraction`; `context` must be 'one_hot'.
    """

    context: Context = 'one_hot'
    use_V: bool = False
    use_b: bool = False

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n] and z one-hot [..., m], or integers [...] with `contexts` → [..., k].

        Of a z in a float dtype the largest entry is what counts: zᵀWx + zᵀU where it is the only
        one, so that the context of zeros gives zeros.

        Raises:
          ValueError: if `context` is not 'one_hot', or as the full form.
        """
        if self.context != 'one_hot':
            raise ValueError(
                f'MultiHead takes one-hot contexts alone, context is {self.context!r}; for others '
                f'use MultiplicativeInteraction'
            )
        x, z, m = _inputs(self, x, z)
        if jnp.issubdtype(z.dtype, jnp.integer):
            return self._sum(x, z, m)
        return self._sum(x, jnp.argmax(z, -1), m) * z.max(-1, keepdims=True)


class DiagonalMultiplicativeInteraction(nn.Module):
    """The diagonal form: f(x, z) = a(z) ⊙ x + c(z), a = zᵀW + V, c = zᵀU + b.

    W [m, n] and V [n] are the diagonals over (n, k) of the full form's W and V, so k = n; U [m, n],
    b [n]. V starts at √(1/3) in every entry, the equal share of the other terms.

    Attributes:
      context, contexts, dtype, param_dtype, precision: as in `MultiplicativeInteraction`.
    """

    context: Context = 'dense'
    contexts: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] or integers [...] → [..., n]; ValueError as the full form."""
        x, z, m = _inputs(self, x, z)
        n, scales = x.shape[-1], self._scales(x.shape[-1])
        third = context_init(self.context, 1 / 3)
        W = self.param('W', third, (m, scales), self.param_dtype)
        U = self.param('U', third, (m, n), self.param_dtype)
        V = self.param('V', initializers.constant(3**-0.5), (scales,), self.param_dtype)
        b = self.param('b', initializers.zeros, (n,), self.param_dtype)
        W, U, V, b = (a.astype(x.dtype) for a in (W, U, V, b))
        lead = (1,) * (x.ndim - 1)
        a = linear(z, W, precision=self.precision) + V.reshape(*lead, scales)
        c = linear(z, U, precision=self.precision) + b.reshape(*lead, n)
        return a * x + c

    def _scales(self, n: int) -> int:
        return n


class ScalarMultiplicativeInteraction(DiagonalMultiplicativeInteraction):
    """The scalar form: f(x, z) = s(z) x + c(z), s = zᵀW + V, c = zᵀU + b.

    The diagonal form with one scale for all features: W [m, 1], V [1], U [m, n], b [n].
    """

    def _scales(self, n: int) -> int:
        return 1


def _inputs(module: Any, x: Array, z: Array) -> tuple[Array, Array, int]:
    """x and z with as many leading axes and in the dtype of the computation; m."""
    ids = jnp.issubdtype(z.dtype, jnp.integer)
    if ids and module.contexts is None:
        raise ValueError(
            f'z is {z.dtype}, ids of one-hot contexts: say by contexts=m how many there are, or '
            f'give z in a float dtype'
        )
    x, z = align_streams(x, z, ids=True)
    floats = [x] if ids else [x, z]
    dtype = module.dtype or jnp.result_type(*floats, module.param_dtype)
    if ids:
        return x.astype(dtype), z, module.contexts
    return x.astype(dtype), z.astype(dtype), z.shape[-1]
