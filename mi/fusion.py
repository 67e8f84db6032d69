"""FUSIONS: one config word → one module that fuses an input x with a context z, (x, z) → y.

To add a fusion, write a Linen module with the fields `features`, `context`, `dtype` and
`param_dtype` (and `rank` or `hidden`, if it has a use for them) whose call takes x [..., n] and
z [..., m] with broadcastable leading axes and returns y [..., features]; then add one line to
FUSIONS. Trainers, sweeps and tests find it there.

From `none` to `swiglu`, and in the forms `mi…`, x passes an affine map Vx + b of its own, so that
two of these words differ in nothing but how z comes in. Those that keep the number of features have
that map only where n differs; those of bilinear pooling have none, as published.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.config import has_parameter, suggest
from mi.kernels.bilinear import accumulation_dtype
from mi.layers import (
    Affine,
    BlockMultiplicativeInteraction,
    Context,
    DiagonalMultiplicativeInteraction,
    LowRankMultiplicativeInteraction,
    MultiHead,
    MultiplicativeInteraction,
    ScalarMultiplicativeInteraction,
    TuckerMultiplicativeInteraction,
    align_streams,
    context_init,
    input_init,
    one_hot,
)
from mi.motifs.experts import DenseMixture
from mi.motifs.gating import GatedLinearUnit
from mi.motifs.hypernetwork import MLPHypernetwork
from mi.motifs.normalization import ConditionalLayerNorm
from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear

# E[act(g)²] of a standard normal g, which the map that is gated makes up for
_SIGMOID, _SILU = 0.2934, 0.3558


class ConcatMLP(nn.Module):
    """Concatenation and a hidden layer: y = A relu(zᵀU + Vx + b) + a.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      hidden: width of the hidden layer; None for `features`.
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
        he_normal = initializers.he_normal()  # keeps the variance through the relu
        return Affine(self.features, self.dtype, self.param_dtype, V_init=he_normal, name='out')(
            nn.relu(hidden)
        )


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al., 2018): y = (1 + γ(z)) ⊙ (Vx + b) + β(z).

    γ and β are linear in z and start at zero, so that y starts as Vx + b.

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
        gamma = affine(V_init=initializers.zeros, name='gamma')(z)
        beta = affine(V_init=initializers.zeros, name='beta')(z)
        return (1 + gamma) * affine(name='x')(x) + beta


class Gate(nn.Module):
    """A sigmoid gate: y = 2σ(zᵀG + g) ⊙ (Vx + b).

    The factor 2 is the Mogrifier's (Melis et al., 2020): a gate at rest passes its input unchanged.
    V starts so much smaller that y has unit variance with gates that are not at rest.

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
        return 2 * nn.sigmoid(gate) * affine(V_init=input_init(1 / (4 * _SIGMOID)), name='x')(x)


class FeatureAttention(nn.Module):
    """Attention over features: y = k · softmax(m) ⊙ (Ax + a), m = zᵀWx + zᵀU + Vx + b.

    The form m = f(x, z), y = softmax(m) ⊙ x of Jayakumar et al. (2020), x after an affine map to k
    features; the factor k, so that even attention passes it unchanged, and the low rank of W are
    ours.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
      rank: of W.
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
    """E[(k softmax(m)_1)²] of k independent scores m ~ N(0, 1): 1 for k = 1, near e for many.

    As 1/S² = ∫ t exp(−tS) dt, it is k² ∫ t E[e^{2m} exp(−t e^m)] E[exp(−t e^m)]^{k−1} dt.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    log_t = np.linspace(-30, 12, 4001)
    t = np.exp(log_t)
    survival = np.exp(-t[:, None] * np.exp(nodes)[None])  # exp(−t e^m)
    integrand = t**2 * (survival @ (weights * np.exp(2 * nodes))) * (survival @ weights) ** (k - 1)
    return float(k**2 * integrand.sum() * (log_t[1] - log_t[0]))


class SameWidth(nn.Module):
    """A module whose output is as wide as x, after an affine map to `features` where n differs.

    Attributes:
      module: its class.
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
        dense = not has_parameter(self.module, 'contexts')
        if dense and self.contexts and jnp.issubdtype(z.dtype, jnp.integer):
            z = one_hot(z, self.contexts, x.dtype)
        fields = {'context': self.context, 'contexts': self.contexts}
        fields = {name: value for name, value in fields.items() if has_parameter(self.module, name)}
        return self.module(**fields, dtype=self.dtype, param_dtype=self.param_dtype, name='form')(
            x, z
        )


FUSIONS: dict[str, Callable[..., nn.Module]] = {
    'none': functools.partial(MultiplicativeInteraction, use_W=False, use_U=False),
    'concat': functools.partial(MultiplicativeInteraction, use_W=False),
    'concat_mlp': ConcatMLP,
    'film': FiLM,
    'layer_norm': functools.partial(SameWidth, module=ConditionalLayerNorm),
    'gate': Gate,
    'glu': functools.partial(GatedLinearUnit, B_init=input_init(1 / _SIGMOID)),
    'swiglu': functools.partial(GatedLinearUnit, activation='silu', B_init=input_init(1 / _SILU)),
    'attention': FeatureAttention,
    'experts': DenseMixture,
    'hypernetwork': MLPHypernetwork,
    'mlb': MLB,
    'mfb': MFB,
    'mutan': MUTAN,
    'block': functools.partial(BLOCK, blocks=4),
    'compact': CompactBilinear,
    'mi': MultiplicativeInteraction,
    'mi_low_rank': LowRankMultiplicativeInteraction,
    'mi_tucker': TuckerMultiplicativeInteraction,
    'mi_block': functools.partial(BlockMultiplicativeInteraction, blocks=4),
    'mi_diagonal': functools.partial(SameWidth, module=DiagonalMultiplicativeInteraction),
    'mi_scalar': functools.partial(SameWidth, module=ScalarMultiplicativeInteraction),
    'multi_head': MultiHead,
}

ONE_HOT = {'multi_head'}
"""The words whose context must be one-hot; a config file may add its own."""

OPTIONS = ('rank', 'hidden')


def get(name: str, **options: int | None) -> Callable[..., nn.Module]:
    """The constructor of FUSIONS[name], with those of the options that it has a field for.

    A config holds the options of all fusions at once (`rank`, `hidden`), so one that this fusion
    does not have is not an error; one that no fusion has is.

    Raises:
      ValueError: on an unknown word or option, naming the nearest known one.
    """
    if name not in FUSIONS:
        raise ValueError(f'unknown fusion {name!r}; {suggest(name, FUSIONS)}')
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f'unknown fusion option {option!r}; {suggest(option, OPTIONS)}')
    return functools.partial(
        FUSIONS[name], **{k: v for k, v in options.items() if k in get_options(name)}
    )


def get_options(name: str) -> tuple[str, ...]:
    """Those of OPTIONS that FUSIONS[name] has a field for."""
    return tuple(option for option in OPTIONS if has_parameter(FUSIONS[name], option))
