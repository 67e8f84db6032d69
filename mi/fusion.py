"""FUSIONS: one config word → one module that fuses an input x with a context z, (x, z) → y.

To add a fusion, write a Linen module with the fields `features`, `context`, `dtype` and
`param_dtype` (and `rank` or `hidden`, if it has a use for them) whose call takes x [..., n] and
z [..., m] with broadcastable leading axes and returns y [..., features]; then add one line to
FUSIONS. Trainers, sweeps and tests find it there.

In every entry x passes the same affine map Vx + b, so that two words differ in nothing but how z
comes in. (`mi_diagonal` has no such map where n = features, as its equation has none.)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.config import nearest
from mi.layers import (
    Affine,
    Context,
    DiagonalMultiplicativeInteraction,
    LowRankMultiplicativeInteraction,
    MultiplicativeInteraction,
    context_init,
    streams,
)


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


class Diagonal(nn.Module):
    """`DiagonalMultiplicativeInteraction`, after an affine map to `features` where n differs.

    Attributes:
      features, context, dtype, param_dtype: as in `MultiplicativeInteraction`.
    """

    features: int
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        if x.shape[-1] != self.features:
            x = Affine(self.features, self.dtype, self.param_dtype, name='x')(x)
        return DiagonalMultiplicativeInteraction(
            self.context, dtype=self.dtype, param_dtype=self.param_dtype, name='diagonal'
        )(x, z)


FUSIONS: dict[str, Callable[..., nn.Module]] = {
    'none': functools.partial(MultiplicativeInteraction, use_W=False, use_U=False),
    'concat': functools.partial(MultiplicativeInteraction, use_W=False),
    'concat_mlp': ConcatMLP,
    'film': FiLM,
    'gate': Gate,
    'mi': MultiplicativeInteraction,
    'mi_low_rank': LowRankMultiplicativeInteraction,
    'mi_diagonal': Diagonal,
}

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
    constructor = FUSIONS[name]
    module: Any = constructor.func if isinstance(constructor, functools.partial) else constructor
    fields = {field.name for field in dataclasses.fields(module)}
    return functools.partial(constructor, **{k: v for k, v in options.items() if k in fields})
