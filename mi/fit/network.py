"""The network of the small problems: an MLP in which some layers are fusions with a context.

Shapes: input x [..., n], context z [..., m], output y [..., k].
"""

from collections.abc import Callable

import jax
import ml_collections
from flax import linen as nn
from jax import Array

from mi import counting, fusion
from mi.config import Rule, any_value, choice, integer, name_config_keys
from mi.layers import Context
from mi.options import get_options

SITES = ('first', 'last', 'all')
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu': nn.relu,
    'softplus': nn.softplus,
    'tanh': nn.tanh,
    'identity': lambda x: x,
}

SCHEMA: dict[str, Rule] = {
    'model.depth': integer(0),
    'model.site': choice(SITES),
    'model.activation': choice(ACTIVATIONS),
    'model.fusion.name': choice(fusion.FUSIONS),
    'model.fusion.options.*': any_value,  # `fusion.get` checks them against the fields
    'model.fusion.rank': integer(0),
    'model.fusion.hidden': integer(0),
}


class FusedMLP(nn.Module):
    """An MLP with fusions: y = A_d(φ(… φ(A_0(x)))), where A_i is a fusion with z or an affine map.

    With the fusion 'concat' at the site 'first', this is an MLP on the concatenation [x; z].

    Attributes:
      features: k, the number of output features.
      width: width of the hidden layers.
      depth: d, the number of hidden layers.
      fusion: constructor of a fusion module, called with `features` and `name`.
      site: which of the d + 1 maps are fusions: 'first', 'last' or 'all'.
      activation: φ, a key of ACTIVATIONS.
    """

    features: int
    width: int
    depth: int
    fusion: Callable[..., nn.Module]
    site: str = 'first'
    activation: str = 'relu'

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        layers = range(self.depth + 1)
        fused_layers = {'first': {0}, 'last': {self.depth}, 'all': {*layers}}[self.site]
        hidden = x
        for layer in layers:
            features = self.features if layer == self.depth else self.width
            if layer in fused_layers:
                hidden = self.fusion(features, name=f'fusion_{layer}')(hidden, z)
            else:
                hidden = nn.Dense(features, name=f'affine_{layer}')(hidden)
            if layer < self.depth:
                hidden = ACTIVATIONS[self.activation](hidden)
        return hidden


def make(model: ml_collections.ConfigDict, features: int, context: Context) -> FusedMLP:
    """Build the network of the config section `model`, where rank or hidden 0 means the width."""
    rank, hidden = (size or model.width for size in (model.fusion.rank, model.fusion.hidden))
    options = get_options(model.fusion, 'options')
    with name_config_keys({'options': 'config.model.fusion.options'}):
        make_fusion = fusion.get(model.fusion.name, options, rank=rank, hidden=hidden)

    def make_fused_layer(features: int, name: str) -> nn.Module:
        return make_fusion(features, context=context, name=name)

    return FusedMLP(
        features, model.width, model.depth, make_fused_layer, model.site, model.activation
    )


def costs(
    model: nn.Module, *inputs: jax.ShapeDtypeStruct, fusion_pattern: str = r'fusion.*'
) -> dict[str, dict[str, int]]:
    """Count the parameters and the FLOPs per example for a network and for its fusions.

    Args:
      model: the network.
      *inputs: shapes of the inputs for one example.
      fusion_pattern: regular expression for the names of the modules that count as fusions.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    fusion_modules = list(counting.modules(model, fusion_pattern, variables, *inputs))
    return {
        'parameters': {
            'model': counting.parameters(variables),
            'fusion': sum(
                counting.parameters(module_variables) for _, module_variables, _ in fusion_modules
            ),
        },
        'flops_per_example': {
            'model': counting.flops(model.apply, variables, *inputs),
            'fusion': sum(
                counting.flops(module.apply, module_variables, *input_shapes)
                for module, module_variables, input_shapes in fusion_modules
            ),
        },
    }
