"""The table CONVERTERS of functions that write a module as products, and `as_mi`, which uses it."""

from collections.abc import Callable

from flax import linen as nn

from mi.cells import LSTM, MILSTM, HyperLSTM, MogrifierLSTM, MultiplicativeLSTM
from mi.layers import MultiHead
from mi.motifs.attention import (
    Attention,
    GatedCrossAttention,
    LatentCrossAttention,
)
from mi.motifs.conditioning import ConcatMLP, FeatureAttention, Gate, SameWidth
from mi.motifs.convolutional_attention import ConvolutionalSelfAttention
from mi.motifs.dynamic_conv import (
    ConditionalConvolution,
    DynamicConvolution,
    LightweightConvolution,
)
from mi.motifs.experts import DenseMixture, RoutedMixture
from mi.motifs.gating import GatedFeedForward, GatedLinearUnit, Highway, SqueezeExcitation
from mi.motifs.hypernetwork import Hypernetwork, LinearHypernetwork, MLPHypernetwork
from mi.motifs.normalization import (
    AdaLNZero,
    ConditionalBatchNorm,
    ConditionalLayerNorm,
    FeatureWiseModulation,
)
from mi.motifs.pooling import BLOCK, MFB, MLB, MUTAN, CompactBilinear
from mi.precision import use_highest
from mi.unify import (
    attention,
    cells,
    conditioning,
    dynamic_conv,
    experts,
    gating,
    hypernetwork,
    normalization,
    pooling,
)
from mi.unify.composition import Composition, Variables
from mi.unify.derivatives import convert_affine

CONVERTERS: dict[type[nn.Module], Callable[..., Composition]] = {
    LSTM: cells.convert_lstm,
    MultiplicativeLSTM: cells.convert_mlstm,
    MILSTM: cells.convert_mi_lstm,
    MogrifierLSTM: cells.convert_mogrifier,
    HyperLSTM: cells.convert_hyper_lstm,
    MultiHead: conditioning.convert_multi_head,
    ConcatMLP: conditioning.convert_concat_mlp,
    Gate: conditioning.convert_gate,
    FeatureAttention: conditioning.convert_feature_attention,
    SameWidth: conditioning.convert_same_width,
    Attention: attention.convert_attention,
    GatedCrossAttention: attention.convert_gated_cross_attention,
    LatentCrossAttention: attention.convert_latent_cross_attention,
    ConvolutionalSelfAttention: attention.convert_convolutional_self_attention,
    LightweightConvolution: dynamic_conv.convert_lightweight_convolution,
    DynamicConvolution: dynamic_conv.convert_dynamic_convolution,
    ConditionalConvolution: dynamic_conv.convert_conditional_convolution,
    DenseMixture: experts.convert_dense_mixture,
    RoutedMixture: experts.convert_routed_mixture,
    GatedLinearUnit: gating.convert_gated_linear_unit,
    GatedFeedForward: gating.convert_gated_feed_forward,
    Highway: gating.convert_highway,
    SqueezeExcitation: gating.convert_squeeze_excitation,
    LinearHypernetwork: hypernetwork.convert_linear_hypernetwork,
    MLPHypernetwork: hypernetwork.convert_mlp_hypernetwork,
    Hypernetwork: hypernetwork.convert_hypernetwork,
    FeatureWiseModulation: normalization.convert_feature_wise_modulation,
    ConditionalLayerNorm: normalization.convert_conditional_layer_norm,
    ConditionalBatchNorm: normalization.convert_conditional_batch_norm,
    AdaLNZero: normalization.convert_ada_ln_zero,
    MLB: pooling.convert_mlb,
    MFB: pooling.convert_mfb,
    MUTAN: pooling.convert_mutan,
    BLOCK: pooling.convert_block,
    CompactBilinear: pooling.convert_compact_bilinear,
}
"""Converters by class. A subclass uses the converter of its nearest base class.

A converter takes (module, variables, *inputs) and returns a `Composition`. To add one, assign
`CONVERTERS[MyModule] = convert_my_module`.
"""


@use_highest
def as_mi(module: nn.Module, variables: Variables, *args: object, **kwargs: object) -> Composition:
    """Write module.apply(variables, *args, **kwargs) as products f(x, z) = zᵀWx + zᵀU + Vx + b.

    A module that is affine in x and affine in z needs no converter. Its tensors are its derivatives
    at zero, W = ∂²f/∂z∂x, U = ∂f/∂z, V = ∂f/∂x and b = f(0, 0), which are exact for such a
    function. The property is checked row by row, at the inputs and at random points with entries up
    to about 1e4. The tolerance is 1e-4 of the largest term in a row. Inside `jax.jit` the check
    cannot raise an error, so the tensors and the output are NaN if it fails.

    Args:
      module: any motif of `mi`, or your own module (x [..., n], z [..., m]) → [..., k].
      variables: variables of the module, as for `module.apply`.
      *args, **kwargs: inputs of the module, as for `module.apply`.

    Returns:
      The products with their W, U, V and b, and the output computed from them.

    Raises:
      ValueError: if the module has no converter and is not affine, does not have two streams and
        one output [..., k], or is not a Linen module.
    """
    for module_class in type(module).__mro__:
        if module_class in CONVERTERS:
            return CONVERTERS[module_class](module, variables, *args, **kwargs)
    return convert_affine(module, variables, *args, **kwargs)
