"""FUSIONS: a config name → a module that fuses an input x with a context z, (x, z) → y.

To add a fusion, write a Linen module with the fields `features`, `context`, `dtype` and
`param_dtype`, and `rank` or `hidden` if it uses them. Its call takes x [..., n] and z [..., m] with
broadcastable leading axes and returns y [..., features]. Then add one line to FUSIONS, where
trainers, sweeps and tests find it.

From `none` to `swiglu`, and for the forms `mi…`, x passes its own affine map Vx + b, so two of
these fusions differ only in how z enters. Fusions that preserve the number of features have that
map only if n differs. Bilinear pooling has no such map, as published.
"""

import functools
from collections.abc import Callable

from flax import linen as nn

from mi.config import has_parameter, suggest
from mi.layers import (
    BlockMultiplicativeInteraction,
    DiagonalMultiplicativeInteraction,
    LowRankMultiplicativeInteraction,
    MultiHead,
    MultiplicativeInteraction,
    ScalarMultiplicativeInteraction,
    TuckerMultiplicativeInteraction,
    input_init,
)
from mi.motifs.conditioning import (
    SIGMOID_MOMENT,
    SILU_MOMENT,
    ConcatMLP,
    FeatureAttention,
    FiLM,
    Gate,
    SameWidth,
)
from mi.motifs.experts import DenseMixture
from mi.motifs.gating import GatedLinearUnit
from mi.motifs.hypernetwork import MLPHypernetwork
from mi.motifs.normalization import ConditionalLayerNorm
from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear

FUSIONS: dict[str, Callable[..., nn.Module]] = {
    'none': functools.partial(MultiplicativeInteraction, use_W=False, use_U=False),
    'concat': functools.partial(MultiplicativeInteraction, use_W=False),
    'concat_mlp': ConcatMLP,
    'film': FiLM,
    'layer_norm': functools.partial(SameWidth, module=ConditionalLayerNorm),
    'gate': Gate,
    'glu': functools.partial(GatedLinearUnit, B_init=input_init(1 / SIGMOID_MOMENT)),
    'swiglu': functools.partial(
        GatedLinearUnit, activation='silu', B_init=input_init(1 / SILU_MOMENT)
    ),
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
"""Names of fusions that need a one-hot context; a config file may add its own."""

OPTIONS = ('rank', 'hidden')


def get(fusion_name: str, **options: int | None) -> Callable[..., nn.Module]:
    """Return the constructor FUSIONS[fusion_name] with the options for which it has a field.

    A config holds the options of all fusions (`rank`, `hidden`), so an option that this fusion
    lacks is ignored. An option that no fusion has is an error.

    Raises:
      ValueError: if the name or an option is unknown; the message names the nearest known one.
    """
    if fusion_name not in FUSIONS:
        raise ValueError(f'unknown fusion {fusion_name!r}; {suggest(fusion_name, FUSIONS)}')
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f'unknown fusion option {option!r}; {suggest(option, OPTIONS)}')
    fields = {option: options[option] for option in get_options(fusion_name) if option in options}
    return functools.partial(FUSIONS[fusion_name], **fields)


def get_options(fusion_name: str) -> tuple[str, ...]:
    """Return the names in OPTIONS for which FUSIONS[fusion_name] has a field."""
    return tuple(option for option in OPTIONS if has_parameter(FUSIONS[fusion_name], option))
