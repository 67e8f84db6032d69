"""Modules that fuse an input x with a context z: concatenation, FiLM, gates, feature attention.

Shapes: input x [..., n], context z [..., m], output y [..., k]. The leading axes of x and z
broadcast.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.config import has_parameter
from mi.kernels.linear import accumulation_dtype
from mi.layers import (
    Affine,
    Context,
    LowRankMultiplicativeInteraction,
    MultiplicativeInteraction,
    align_streams,
    context_init,
    input_init,
    one_hot,
)

# E[act(g)²] for a standard normal g; the gated map compensates for it.
SIGMOID_MOMENT, SILU_MOMENT = 0.2934, 0.3558


class ConcatMLP(nn.Module):
    """Concatenation and one hidden layer: y = A relu(zᵀU + Vx + b) + a.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      hidden: width of the hidden layer. Defaults to `features`.
    """

    features: int
    hidden: int | None = None
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        x, z = align_streams(x, z)
        hidden = MultiplicativeInteraction(
            self.hidden or self.features,
            context=self.context,
            use_W=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='hidden',
        )(x, z)
        he_normal = initializers.he_normal()  # preserves the variance through the relu
        out = Affine(self.features, self.dtype, self.param_dtype, V_init=he_normal, name='out')
        return out(nn.relu(hidden))


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al., 2018): y = (1 + γ(z)) ⊙ (Vx + b) + β(z).

    γ and β are affine in z. By default they start at zero, so y starts as Vx + b. With a
    `gamma_variance` of g, they start at random: γ has variance g, and the terms Vx, γ ⊙ Vx and β
    have variances 1, g and g, divided by 1 + 2g so that y has unit variance.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      gamma_variance: g, the initial variance of each entry in γ(z), where 0 gives γ(z) = 0.

    Raises:
      ValueError: if g is negative.
    """

    features: int
    context: Context = 'dense'
    gamma_variance: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        if self.gamma_variance < 0:
            raise ValueError(f'gamma_variance = {self.gamma_variance}: expected at least 0')
        x, z = align_streams(x, z)
        affine = functools.partial(Affine, self.features, self.dtype, self.param_dtype)
        g, x_variance = self.gamma_variance, 1 / (1 + 2 * self.gamma_variance)
        gamma_init = beta_init = initializers.zeros
        if g:
            gamma_init = context_init(self.context, g)
            beta_init = context_init(self.context, g * x_variance)
        gamma = affine(V_init=gamma_init, name='gamma')(z)
        beta = affine(V_init=beta_init, name='beta')(z)
        return (1 + gamma) * affine(V_init=input_init(x_variance), name='x')(x) + beta


class Gate(nn.Module):
    """A sigmoid gate: y = 2σ(zᵀG + g) ⊙ (Vx + b).

    The factor 2 is from the Mogrifier (Melis et al., 2020) and makes the gate 1 for a logit of
    zero. The initial variance of V compensates for the gate, so that y has unit variance.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        x, z = align_streams(x, z)
        affine = functools.partial(Affine, self.features, self.dtype, self.param_dtype)
        gate = affine(V_init=context_init(self.context), name='gate')(z)
        return (
            2 * nn.sigmoid(gate) * affine(V_init=input_init(1 / (4 * SIGMOID_MOMENT)), name='x')(x)
        )


class FeatureAttention(nn.Module):
    """Attention over features: y = k · softmax(m) ⊙ (Ax + a), m = zᵀWx + zᵀU + Vx + b.

    Jayakumar et al. (2020) define m = f(x, z) and y = softmax(m) ⊙ x. This module differs in three
    ways: an affine map first takes x to k features, W has low rank, and the factor k makes uniform
    attention the identity.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: rank of W.
    """

    features: int
    rank: int = 16
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        x, z = align_streams(x, z)
        scores = LowRankMultiplicativeInteraction(
            self.features,
            rank=self.rank,
            context=self.context,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='scores',
        )(x, z)
        attention = nn.softmax(scores.astype(accumulation_dtype(scores))).astype(scores.dtype)
        A_init = input_init(1 / _softmax_moment(self.features))
        value = Affine(self.features, self.dtype, self.param_dtype, V_init=A_init, name='value')(x)
        return self.features * attention * value


@functools.cache
def _softmax_moment(k: int) -> float:
    """Return E[(k softmax(m)_1)²] for k independent scores m ~ N(0, 1).

    It is 1 for k = 1 and approaches e for large k. Since 1/S² = ∫ t exp(−tS) dt, it equals
    k² ∫ t E[e^{2m} exp(−t e^m)] E[exp(−t e^m)]^{k−1} dt.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    log_t = np.linspace(-30, 12, 4001)
    t = np.exp(log_t)
    survival = np.exp(-t[:, None] * np.exp(nodes)[None])  # exp(−t e^m)
    integrand = t**2 * (survival @ (weights * np.exp(2 * nodes))) * (survival @ weights) ** (k - 1)
    return float(k**2 * integrand.sum() * (log_t[1] - log_t[0]))


class SameWidth(nn.Module):
    """A width-preserving module, applied after an affine map of x if n ≠ features.

    Attributes:
      module: class of the module.
      features, context, contexts, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    module: Callable[..., nn.Module]
    context: Context = 'dense'
    contexts: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        if x.shape[-1] != self.features:
            x = Affine(self.features, self.dtype, self.param_dtype, name='x')(x)
        accepts_ids = has_parameter(self.module, 'contexts')
        if self.contexts and not accepts_ids and jnp.issubdtype(z.dtype, jnp.integer):
            z = one_hot(z, self.contexts, x.dtype)
        fields: dict[str, Context | DTypeLike | int | None] = {
            field_name: option
            for field_name, option in (('context', self.context), ('contexts', self.contexts))
            if has_parameter(self.module, field_name)
        }
        fields |= {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        return self.module(**fields, name='form')(x, z)
