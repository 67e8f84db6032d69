"""Neural processes, whose decoder fuses a target x with a representation of the context.

    deterministic   r = mean_i h(x_i, y_i),  y ~ N(g(x, r))           Garnelo et al., 2018a (CNP)
    latent          z ~ q(z | mean_i h(x_i, y_i)),  y ~ N(g(x, z))    Garnelo et al., 2018b (NP)
    both            y ~ N(g(x, [r; z])), with an encoder for each     Kim et al., 2019 (ANP)

h is an MLP, optionally with self-attention between the points. With cross-attention, r depends on
the target: r(x) = Σ_i softmax_i(q(x)ᵀk(x_i)) v(h_i) for each head (Kim et al., 2019). g is a
`mi.fit.network.FusedMLP`, whose fusion with r and z is the subject of this experiment. Its two
outputs are the mean and s, where the standard deviation is σ = σ_min + (1 − σ_min) softplus(s).

Shapes: N context points, T targets, m features. Leading axes are functions.
"""

import warnings
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
from chex import Array
from flax import linen as nn

from experiments.neural_process.likelihood import Gaussian
from mi import fusion
from mi.config import Rule, UserError, choice, integer, number
from mi.fit import network

PATHS = ('deterministic', 'latent', 'both')

SCHEMA: dict[str, Rule] = {
    'model.paths': choice(PATHS),
    'model.features': integer(1),
    'model.encoder_width': integer(1),
    'model.encoder_depth': integer(1),
    'model.self_attention': integer(0),
    'model.cross_attention': integer(0),
    'model.min_std': number(0, exclusive=True, below=1),
    **network.SCHEMA,
}


class Points(NamedTuple):
    """Points of functions: x and y [..., N], and a mask [..., N] that is False for padding."""

    x: Array
    y: Array
    mask: Array


def average_points(representations: Array, mask: Array) -> Array:
    """Average [..., N, m] over the points in the mask [..., N]. The mean of no points is 0."""
    weights = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    return jnp.sum(weights[..., None] * jnp.where(mask[..., None], representations, 0), -2)


class MLP(nn.Module):
    """An MLP with ReLU after every layer.

    Attributes:
      width: width of each layer.
      depth: number of layers.
    """

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


class PointEncoder(nn.Module):
    """The encoder h, which maps points to representations [..., N, m].

    Attributes:
      features: number of features m.
      width, depth: width and depth of the MLP.
      heads: number of heads of self-attention between the points, or 0 for no self-attention.
    """

    features: int
    width: int
    depth: int
    heads: int = 0

    @nn.compact
    def __call__(self, points: Points) -> Array:
        inputs = jnp.stack([points.x, jnp.where(points.mask, points.y, 0)], -1)
        hidden = MLP(self.width, self.depth, name='mlp')(inputs)
        if self.heads:
            visible = points.mask[..., None, None, :]  # for every head and every query
            attend = nn.MultiHeadDotProductAttention(self.heads, name='self_attention')
            hidden = hidden + attend(hidden, hidden, mask=visible)
        return nn.Dense(self.features, name='out')(hidden)


class CrossAttention(nn.Module):
    """Attention of targets to points by their positions, which computes r(x) [..., T, m].

    Attributes:
      features: number of features m.
      width, depth: width and depth of the MLP that embeds the positions.
      heads: number of attention heads.
    """

    features: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, points: Points, representations: Array, x: Array) -> Array:
        embed = MLP(self.width, self.depth, name='mlp')
        attend = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.width, out_features=self.features, name='attention'
        )
        queries, keys = embed(x[..., None]), embed(points.x[..., None])
        visible = points.mask[..., None, None, :]
        with warnings.catch_warnings():
            # Flax takes values for an old argument, the mask, if they are as many as features.
            warnings.filterwarnings('ignore', 'You are passing an array', DeprecationWarning)
            attended = attend(queries, keys, representations, mask=visible)
        return jnp.where(points.mask.any(-1)[..., None, None], attended, 0)


class LatentEncoder(nn.Module):
    """The encoder of q(z | points), with σ between 0.1 and 1, as in Kim et al. (2019).

    Attributes:
      point_encoder: encoder of single points. A hidden layer follows the mean of its outputs.
      features: number of latent features m.
    """

    point_encoder: PointEncoder
    features: int

    @nn.compact
    def __call__(self, points: Points) -> Gaussian:
        hidden = average_points(self.point_encoder(points), points.mask)
        hidden = nn.relu(nn.Dense(self.point_encoder.width, name='hidden')(hidden))
        raw_std = nn.Dense(self.features, name='std')(hidden)
        mean = nn.Dense(self.features, name='mean')(hidden)
        return Gaussian(mean, 0.1 + 0.9 * nn.sigmoid(raw_std))


class NeuralProcess(nn.Module):
    """A neural process. See the docstring of this module.

    Attributes:
      decoder: module that maps x [..., T, 1] and a context [..., T or 1, m or 2m] to [..., T, 2].
      paths: a name in PATHS.
      features: number of features m of r and of z.
      encoder_width, encoder_depth: width and depth of the MLPs in the encoders.
      self_attention, cross_attention: number of heads, or 0 for no attention.
      min_std: minimum standard deviation σ_min.
    """

    decoder: network.FusedMLP
    paths: str
    features: int
    encoder_width: int
    encoder_depth: int
    self_attention: int
    cross_attention: int
    min_std: float

    def setup(self) -> None:
        sizes = self.encoder_width, self.encoder_depth
        if self.paths != 'latent':
            self.encoder = PointEncoder(self.features, *sizes, self.self_attention)
            if self.cross_attention:
                self.attention = CrossAttention(self.features, *sizes, self.cross_attention)
        if self.paths != 'deterministic':
            point_encoder = PointEncoder(self.encoder_width, *sizes, self.self_attention)
            self.latent_encoder = LatentEncoder(point_encoder, self.features)

    def __call__(self, x: Array, y: Array, mask: Array, targets: Array, epsilon: Array) -> Gaussian:
        """Predict targets [..., T] from points [..., N], with z = μ + σ ε for ε [..., m]."""
        points = Points(x, y, mask)
        z = None
        if self.paths != 'deterministic':
            latent = self.infer(points)
            z = latent.mean + latent.std * epsilon
        return self.decode(self.represent(points, targets), z, targets)

    def infer(self, points: Points) -> Gaussian:
        """Compute q(z | points), [..., m]. The deterministic path has no latent."""
        latent: Gaussian = self.latent_encoder(points)
        return latent

    def represent(self, points: Points, targets: Array) -> Array | None:
        """Compute r [..., T or 1, m], or return None on the latent path."""
        if self.paths == 'latent':
            return None
        representations = self.encoder(points)
        if self.cross_attention:
            attended: Array = self.attention(points, representations, targets)
            return attended
        return average_points(representations, points.mask)[..., None, :]

    def decode(self, r: Array | None, z: Array | None, targets: Array) -> Gaussian:
        """Predict y [..., T] at targets [..., T] from r, z [..., m] or both."""
        parts = [] if r is None else [r]
        parts += [] if z is None else [z[..., None, :]]
        if len(parts) == 2:  # z is shared by the targets
            parts[1] = jnp.broadcast_to(parts[1], (*parts[0].shape[:-1], self.features))
        outputs = self.decoder(targets[..., None], jnp.concatenate(parts, -1))
        std = self.min_std + (1 - self.min_std) * nn.softplus(outputs[..., 1])
        return Gaussian(outputs[..., 0], std)


def make(model: ml_collections.ConfigDict) -> NeuralProcess:
    """Build the neural process that the section `model` of a config describes.

    Raises:
      UserError: if the paths, the attention and the fusion are incompatible.
    """
    if model.paths == 'latent' and model.cross_attention:
        raise UserError(
            f'config.model.cross_attention = {model.cross_attention}: expected 0, because all '
            f"targets share one z. Try config.model.paths = 'both'"
        )
    for key in ('self_attention', 'cross_attention'):
        if model[key] and model.encoder_width % model[key]:
            raise UserError(
                f'config.model.{key} = {model[key]}: expected a divisor of '
                f'config.model.encoder_width = {model.encoder_width}'
            )
    if model.fusion.name in fusion.ONE_HOT:
        raise UserError(
            f'config.model.fusion.name = {model.fusion.name!r}: expected a fusion for dense '
            f"contexts, because r and z are not one-hot. Try 'mi'"
        )
    return NeuralProcess(
        decoder=network.make(model, features=2, context='dense'),
        paths=model.paths,
        features=model.features,
        encoder_width=model.encoder_width,
        encoder_depth=model.encoder_depth,
        self_attention=model.self_attention,
        cross_attention=model.cross_attention,
        min_std=model.min_std,
    )
