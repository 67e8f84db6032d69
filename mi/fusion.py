"""The table FUSIONS of the modules that fuse an input x with a context z, by config name.

To add a fusion, write a Linen module with the fields `features` and `dtype`, and with `context`,
`rank` or `hidden` if it uses them. Its `__call__` takes x [..., n] and z [..., m] with
broadcastable leading axes and returns y [..., features]. Test the module with
`mi.testing.check_fusion`. A config refers to it as 'package.module:Class' and sets its other fields
in `fusion.options`.

The fusions from `none` to `swiglu` and those named `mi…` apply an affine map Vx + b to x, so they
differ only in how z enters. Fusions that preserve the number of features apply this map only if n ≠
features. Bilinear pooling has no such map, as published.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

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
from mi.options import check_options, get_field_defaults
from mi.registry import Registry

FUSIONS: Registry[Callable[..., nn.Module]] = Registry(
    {
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
)

ONE_HOT = {'multi_head'}
"""Names of fusions that need a one-hot context. A config file may add its own."""

OPTIONS = ('rank', 'hidden')
RESERVED = (*OPTIONS, 'features', 'context', 'contexts')  # the trainer sets them


def get(
    fusion_name: str, options: Mapping[str, object] | None = None, **sizes: int | None
) -> Callable[..., nn.Module]:
    """Return the constructor FUSIONS[fusion_name] with its sizes and options bound.

    Args:
      fusion_name: a key of FUSIONS, or 'package.module:Class'.
      options: values of other fields of the module.
      sizes: `rank` and `hidden`. A config sets both for every fusion, so a size that this fusion
        does not have is ignored.

    Returns:
      A constructor that accepts `context`, and ignores it if the module has no such field.

    Raises:
      ValueError: if the name or a size is unknown. The message suggests the nearest known one.
      ArgumentError: if an option is not a field of the module, or has a different type than the
        field.
    """
    if fusion_name not in FUSIONS:
        raise ValueError(f'unknown fusion {fusion_name!r}; {suggest(fusion_name, FUSIONS)}')
    for size in sizes:
        if size not in OPTIONS:
            raise ValueError(f'unknown fusion option {size!r}; {suggest(size, OPTIONS)}')
    constructor = FUSIONS[fusion_name]
    fields: dict[str, Any] = {
        size: sizes[size] for size in get_options(fusion_name) if size in sizes
    }
    if options:
        defaults = get_field_defaults(constructor)
        known_options = {field: defaults[field] for field in defaults if field not in RESERVED}
        check_options(fusion_name, options, known_options)
        fields |= options
    if has_parameter(constructor, 'context'):
        return functools.partial(constructor, **fields)
    return functools.partial(_construct_without_context, constructor, **fields)


def _construct_without_context(
    constructor: Callable[..., nn.Module], features: int, *, context: str = 'dense', **fields: Any
) -> nn.Module:
    """Construct a module that has no field `context`, ignoring this argument."""
    return constructor(features, **fields)


def get_options(fusion_name: str) -> tuple[str, ...]:
    """Return the names in OPTIONS that are fields of FUSIONS[fusion_name]."""
    return tuple(option for option in OPTIONS if has_parameter(FUSIONS[fusion_name], option))
