"""A Transformer for short sequences, with alternating mixers and feed-forward layers.

Shapes: tokens x [..., n, d], stream h [..., n, C], outputs y [..., n, k].
"""

from collections.abc import Callable

import ml_collections
from flax import linen as nn
from jax import Array
from jax.nn import initializers

from experiments.seq2seq.mixers import MIXERS
from mi import fusion
from mi.config import Rule, UserError, any_value, choice, integer, name_config_keys
from mi.layers import Affine
from mi.options import get_options

POSITIONS = ('none', 'learned')
ENDS = ('feed_forward', 'mixer')

SCHEMA: dict[str, Rule] = {
    'model.depth': integer(1),
    'model.features': integer(1),
    'model.heads': integer(1),
    'model.mixer': choice(MIXERS),
    'model.positions': choice(POSITIONS),
    'model.ends': choice(ENDS),
    'model.fusion.name': choice(fusion.FUSIONS),
    'model.fusion.options.*': any_value,  # `fusion.get` checks them against the fields
    'model.fusion.rank': integer(0),
    'model.fusion.hidden': integer(0),
}


class Transformer(nn.Module):
    """A Transformer of L mixers between L + 1 feed-forward layers, each with a residual connection.

        h = A x + a + P                                    P [n, C], with positions
        h ← h + F_l(norm(h)),  h ← h + mixer_l(norm(h))    l = 1 … L
        h ← h + F_{L+1}(norm(h))                           if it ends with a feed-forward layer
        y = B h + b

    F(h) = C relu(D h + e) + c and the norms (RMSNorm) process tokens separately, and y is affine in
    h. Therefore, a network that ends with its only mixer is Σ_s w_ts φ(x_s) plus a function of x_t.

    Attributes:
      outputs: number of outputs k.
      mixer: function of a name that returns a module [..., n, C] → [..., n, C].
      features: number of features C.
      width: width of the feed-forward layers.
      depth: number of mixers L.
      positions: 'none' or 'learned'.
      ends: last layer, 'feed_forward' or 'mixer'.
    """

    outputs: int
    mixer: Callable[[str], nn.Module]
    features: int
    width: int
    depth: int
    positions: str = 'learned'
    ends: str = 'feed_forward'

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Affine(self.features, name='embed')(x)
        if self.positions == 'learned':
            P = self.param('P', initializers.normal(1.0), (x.shape[-2], self.features))
            h = h + P.reshape((1,) * (x.ndim - 2) + P.shape)
        for layer_index in range(self.depth + 1):
            if layer_index < self.depth or self.ends == 'feed_forward':
                normalized = _normalize(f'norm_{layer_index}', h)
                hidden = nn.relu(Affine(self.width, name=f'inner_{layer_index}')(normalized))
                he_normal = initializers.he_normal()  # keeps the variance through the relu
                h = h + Affine(self.features, V_init=he_normal, name=f'outer_{layer_index}')(hidden)
            if layer_index < self.depth:
                normalized = _normalize(f'norm_mixer_{layer_index}', h)
                h = h + self.mixer(f'mixer_{layer_index}')(normalized)
        return Affine(self.outputs, name='out')(h)


def _normalize(name: str, h: Array) -> Array:
    return nn.RMSNorm(name=name)(h)


def make(model: ml_collections.ConfigDict, outputs: int) -> Transformer:
    """Build the network that the section `model` of a config describes.

    A rank or hidden size of 0 means `features`.

    Raises:
      UserError: if the heads do not divide the features.
    """
    if model.features % model.heads:
        raise UserError(
            f'config.model.heads = {model.heads}: expected a divisor of config.model.features = '
            f'{model.features}, because the heads divide the features'
        )
    fusion_config = model.fusion
    with name_config_keys({'options': 'config.model.fusion.options'}):
        make_fusion = fusion.get(
            fusion_config.name,
            get_options(fusion_config, 'options'),
            rank=fusion_config.rank or model.features,
            hidden=fusion_config.hidden or model.features,
        )
    make_mixer = MIXERS[model.mixer]
    return Transformer(
        outputs,
        lambda name: make_mixer(model.heads, make_fusion, name),
        model.features,
        model.width,
        model.depth,
        model.positions,
        model.ends,
    )
