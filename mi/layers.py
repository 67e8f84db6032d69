"""The multiplicative interaction layer and its cheaper forms.

    f(x, z) = zᵀWx + zᵀU + Vx + b

Shapes: x [..., n] the input, z [..., m] the context, y [..., k] the output; W [m, n, k], U [m, k],
V [n, k], b [k]. Leading axes of x and z broadcast. Source of the equation and of its forms:
Jayakumar et al., Multiplicative Interactions and Where to Find Them, ICLR 2020.

Initialisation is ours: for unit-variance x the *sum* of the terms has unit variance, as that of a
Dense layer with `lecun_normal` weights, an equal share of it from each term. The context has
unit-variance entries ('dense'), or one entry that is 1 and the rest 0 ('one_hot').
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from mi.contract import bilinear, linear

Context = Literal['dense', 'one_hot']


def context_init(context: Context, variance: float = 1.0) -> Initializer:
    """Initialiser of a matrix [m, k] for which each entry of zᵀU has this variance."""
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
    if context == 'one_hot':
        return initializers.variance_scaling(
            variance, 'fan_in', 'truncated_normal', in_axis=1, out_axis=2, batch_axis=0
        )
    return initializers.variance_scaling(
        variance, 'fan_in', 'truncated_normal', in_axis=(0, 1), out_axis=2
    )


def streams(x: Array, z: Array) -> tuple[Array, Array]:
    """x and z with the same number of axes, [..., n] and [..., m].

    Raises:
      ValueError: if one is a scalar or their leading axes do not broadcast.
    """
    if x.ndim < 1 or z.ndim < 1:
        raise ValueError(f'x must be [..., n] and z [..., m]; got x {x.shape}, z {z.shape}')
    try:
        jnp.broadcast_shapes(x.shape[:-1], z.shape[:-1])
    except ValueError as error:
        raise ValueError(
            f'the leading axes of x {x.shape} and z {z.shape} do not broadcast; '
            f'give z an axis of length 1 where it is shared'
        ) from error
    ndim = max(x.ndim, z.ndim)
    x = x.reshape((1,) * (ndim - x.ndim) + x.shape)
    z = z.reshape((1,) * (ndim - z.ndim) + z.shape)
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
    a multi-head read-out; read as (zᵀW + V) x + (zᵀU + b), a linear hypernetwork.

    Attributes:
      features: k.
      context: 'dense' or 'one_hot'; decides the scale at which W and U are initialised.
      use_W, use_U, use_V, use_b: which terms there are.
      dtype: of the computation; None for the promoted dtype of inputs and parameters.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      W_init, U_init, V_init: None for equal shares of a unit variance.
      b_init: zeros.
    """

    features: int
    context: Context = 'dense'
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
        """x [..., n], z [..., m] → [..., k]; ValueError if the leading axes do not broadcast."""
        x, z = streams(x, z)
        m, n, k = z.shape[-1], x.shape[-1], self.features
        share = 1 / max(1, self.use_W + self.use_U + self.use_V)
        W_init = self.W_init or interaction_init(self.context, share)
        U_init = self.U_init or context_init(self.context, share)
        V_init = self.V_init or input_init(share)

        W = self.param('W', W_init, (m, n, k), self.param_dtype) if self.use_W else None
        U = self.param('U', U_init, (m, k), self.param_dtype) if self.use_U else None
        V = self.param('V', V_init, (n, k), self.param_dtype) if self.use_V else None
        b = self.param('b', self.b_init, (k,), self.param_dtype) if self.use_b else None
        x, z, W, U, V, b = nn.dtypes.promote_dtype(x, z, W, U, V, b, dtype=self.dtype)

        y = jnp.zeros((), x.dtype) if b is None else b
        y = jnp.broadcast_to(y, (*jnp.broadcast_shapes(x.shape[:-1], z.shape[:-1]), k))
        if W is not None:
            y = y + bilinear(x, z, W, precision=self.precision)
        if U is not None:
            y = y + linear(z, U, precision=self.precision)
        if V is not None:
            y = y + linear(x, V, precision=self.precision)
        return y


class LowRankMultiplicativeInteraction(nn.Module):
    """The low-rank form: W = Σ_r p_r ⊗ q_r ⊗ o_r, a CP decomposition of the full form's W.

        f(x, z) = Oᵀ(zᵀP ⊙ xᵀQ) + zᵀU + Vx + b,   P [m, r], Q [n, r], O [r, k]

    Attributes:
      features: k.
      rank: r.
      context, dtype, param_dtype, precision: as in `MultiplicativeInteraction`.
    """

    features: int
    rank: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., k]; ValueError if the leading axes do not broadcast."""
        x, z = streams(x, z)
        m, n, k, r = z.shape[-1], x.shape[-1], self.features, self.rank
        P = self.param('P', context_init(self.context), (m, r), self.param_dtype)
        Q = self.param('Q', input_init(), (n, r), self.param_dtype)
        O = self.param('O', input_init(1 / 3), (r, k), self.param_dtype)  # noqa: E741
        U = self.param('U', context_init(self.context, 1 / 3), (m, k), self.param_dtype)
        V = self.param('V', input_init(1 / 3), (n, k), self.param_dtype)
        b = self.param('b', initializers.zeros, (k,), self.param_dtype)
        x, z, P, Q, O, U, V, b = nn.dtypes.promote_dtype(  # noqa: E741
            x, z, P, Q, O, U, V, b, dtype=self.dtype
        )
        p = self.precision
        zWx = linear(linear(z, P, precision=p) * linear(x, Q, precision=p), O, precision=p)
        b = b.reshape((1,) * (x.ndim - 1) + b.shape)
        return zWx + linear(z, U, precision=p) + linear(x, V, precision=p) + b


class DiagonalMultiplicativeInteraction(nn.Module):
    """The diagonal form: f(x, z) = a(z) ⊙ x + c(z), a = zᵀW + V, c = zᵀU + b.

    W [m, n] and V [n] are the diagonals over (n, k) of the full form's W and V, so k = n; U [m, n],
    b [n]. V starts at √(1/3) in every entry, the equal share of the other terms.

    Attributes:
      context, dtype, param_dtype, precision: as in `MultiplicativeInteraction`.
    """

    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """x [..., n], z [..., m] → [..., n]; ValueError if the leading axes do not broadcast."""
        x, z = streams(x, z)
        m, n = z.shape[-1], x.shape[-1]
        third = context_init(self.context, 1 / 3)
        W = self.param('W', third, (m, n), self.param_dtype)
        U = self.param('U', third, (m, n), self.param_dtype)
        V = self.param('V', initializers.constant(3**-0.5), (n,), self.param_dtype)
        b = self.param('b', initializers.zeros, (n,), self.param_dtype)
        x, z, W, U, V, b = nn.dtypes.promote_dtype(x, z, W, U, V, b, dtype=self.dtype)
        row = (1,) * (x.ndim - 1) + (n,)
        a = linear(z, W, precision=self.precision) + V.reshape(row)
        c = linear(z, U, precision=self.precision) + b.reshape(row)
        return a * x + c
