"""The network of the small problems: affine maps with ReLU between them, some fused with a context.

Shapes: x [..., n] the input, z [..., m] the context, y [..., k] the output.
"""

from collections.abc import Callable

import jax
import ml_collections
from flax import linen as nn
from jax import Array

from mi import counting, fusion
from mi.config import Rule, choice, integer
from mi.layers import Context
from mi.options import get_options

SITES = ('first', 'last', 'all')
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu': nn.relu,
    'softplus': nn.softplus,
    'tanh': nn.tanh,
    'identity': lambda h: h,
}

SCHEMA: dict[str, Rule] = {
    'model.depth': integer(0),
    'model.site': choice(SITES),
    'model.activation': choice(ACTIVATIONS),
    'model.fusion.name': choice(fusion.FUSIONS),
    'model.fusion.options.*': lambda value: '',  # `fusion.get` checks them against the fields
    'model.fusion.rank': integer(0),
    'model.fusion.hidden': integer(0),
}


class FusedMLP(nn.Module):
    """y = A_d(φ(… φ(A_0(x)))), where the A at the site are fusions with z and the others affine.

    With the fusion 'concat' at the site 'first' it is the MLP of the concatenation [x; z].

    Attributes:
      features: k.
      width: width of the hidden layers.
      depth: d, the number of hidden layers.
      fusion: features → module (x, z) → y.
      site: 'first', 'last' or 'all': which of the d + 1 maps meet z.
      activation: φ, a word of ACTIVATIONS.
    """

    features: int
    width: int
    depth: int
    fusion: Callable[..., nn.Module]
    site: str = 'first'
    activation: str = 'relu'

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        fused = {'first': {0}, 'last': {self.depth}, 'all': set(range(self.depth + 1))}[self.site]
        h = x
        for i in range(self.depth + 1):
            features = self.features if i == self.depth else self.width
            if i in fused:
                h = self.fusion(features, name=f'fusion_{i}')(h, z)
            else:
                h = nn.Dense(features, name=f'affine_{i}')(h)
            if i < self.depth:
                h = ACTIVATIONS[self.activation](h)
        return h


def make(model: ml_collections.ConfigDict, features: int, context: Context) -> FusedMLP:
    """Build the network of a config's section `model`; rank and hidden size 0 mean the width."""
    word = model.fusion
    fuse = fusion.get(
        word.name,
        get_options(word, 'options'),
        rank=word.rank or model.width,
        hidden=word.hidden or model.width,
    )

    def fused(features: int, name: str) -> nn.Module:
        return fuse(features, context=context, name=name)

    return FusedMLP(features, model.width, model.depth, fused, model.site, model.activation)


def costs(
    model: nn.Module, *inputs: jax.ShapeDtypeStruct, part: str = r'fusion.*'
) -> dict[str, dict[str, int]]:
    """Count parameters and FLOPs per example of a network and of its fusions.

    Args:
      inputs: the shapes of one example.
      part: the names of the modules that count as fusions, a regular expression.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    fused = list(counting.modules(model, part, variables, *inputs))
    return {
        'parameters': {
            'model': counting.parameters(variables),
            'fusion': sum(counting.parameters(part_variables) for _, part_variables, _ in fused),
        },
        'flops_per_example': {
            'model': counting.flops(model.apply, variables, *inputs),
            'fusion': sum(
                counting.flops(part.apply, part_variables, *shapes)
                for part, part_variables, shapes in fused
            ),
        },
    }
