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
import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.config import nearest, takes
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
    context_init,
    input_init,
    streams,
)
from mi.motifs.experts import DenseMixture
from mi.motifs.gating import GatedLinearUnit
from mi.motifs.hypernetwork import MLPHypernetwork
from mi.motifs.normalization import ConditionalLayerNorm
from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear


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
        x, z = streams(x, z)
        affine = functools.partial(Affine, self.features, self.dtype, self.param_dtype)
        gamma = affine(V_init=initializers.zeros, name='gamma')(z)
        beta = affine(V_init=initializers.zeros, name='beta')(z)
        return (1 + gamma) * affine(name='x')(x) + beta


class Gate(nn.Module):
    """A sigmoid gate: y = 2σ(zᵀG + g) ⊙ (Vx + b).

    The factor 2 is the Mogrifier's (Melis et al., 2020): a gate at rest passes its input unchanged.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        x, z = streams(x, z)
        affine = functools.partial(Affine, self.features, self.dtype, self.param_dtype)
        gate = affine(V_init=context_init(self.context), name='gate')(z)
        return 2 * nn.sigmoid(gate) * affine(name='x')(x)


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
        scores = LowRankMultiplicativeInteraction(
            self.features,
            rank=self.rank,
            context=self.context,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='scores',
        )(x, z)
        attention = nn.softmax(scores.astype(jnp.float32)).astype(scores.dtype)
        # E[(k softmax(m))²] is about e for many scores of unit variance
        A_init = input_init(math.exp(-1))
        value = Affine(self.features, self.dtype, self.param_dtype, V_init=A_init, name='value')(x)
        return self.features * attention * value


class SameWidth(nn.Module):
    """A module whose output is as wide as x, after an affine map to `features` where n differs.

    Attributes:
      module: its class.
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    module: Callable[..., nn.Module]
    context: Context | None = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        if x.shape[-1] != self.features:
            x = Affine(self.features, self.dtype, self.param_dtype, name='x')(x)
        kind = {} if self.module is ConditionalLayerNorm else {'context': self.context}
        return self.module(**kind, dtype=self.dtype, param_dtype=self.param_dtype, name='form')(
            x, z
        )


# E[act(g)²] of a standard normal g, which the map that is gated makes up for
_SIGMOID, _SILU = 0.2934, 0.3558

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
        raise ValueError(f'unknown fusion {name!r}; {nearest(name, FUSIONS)}')
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f'unknown fusion option {option!r}; {nearest(option, OPTIONS)}')
    return functools.partial(
        FUSIONS[name], **{k: v for k, v in options.items() if k in has_options(name)}
    )


def has_options(name: str) -> tuple[str, ...]:
    """Those of OPTIONS that FUSIONS[name] has a field for."""
    return tuple(option for option in OPTIONS if takes(FUSIONS[name], option))
