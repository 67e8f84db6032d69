"""From an observation to features: dense, convolutional and residual torsos."""

import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.convolution import convolve
from mi.layers import Affine
from mi.rl.envs.spec import Spec

convolution = functools.partial(nn.Conv, conv_general_dilated=convolve)


class Dense(nn.Module):
    """Grids as one-hot categories, and features, through two dense layers.

    A convolution's gradient inside a scan is 10 to 20 times slower than this on XLA's CPU backend.
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = jnp.concatenate(flatten_observation(observation, self.spec, self.dtype), axis=-1)
        for name in ('hidden', 'out'):
            x = nn.relu(affine(self.features, self.dtype, name)(x))
        return x


class Conv(nn.Module):
    """A grid of one-hot categories through two 3 × 3 convolutions and a dense layer."""

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = to_images(one_hot_grid(observation['grid'], self.spec.categories, self.dtype))
        for i, channels in enumerate((32, 64)):
            x = nn.relu(convolution(channels, (3, 3), dtype=self.dtype, name=f'conv_{i}')(x))
        return read_out(x, observation, self.spec, self.features, self.dtype)


class Shallow(nn.Module):
    """The convolutions of DQN (Mnih et al., 2015): 32 of 8 × 8, 64 of 4 × 4, 64 of 3 × 3."""

    least: ClassVar[int] = 36  # pixels of a side: fewer leave nothing for the last convolution
    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = to_images(observation['pixels'].astype(self.dtype) / 255)
        for i, (channels, size, stride) in enumerate(((32, 8, 4), (64, 4, 2), (64, 3, 1))):
            conv = convolution(
                channels,
                (size, size),
                (stride, stride),
                'VALID',
                dtype=self.dtype,
                name=f'conv_{i}',
            )
            x = nn.relu(conv(x))
        return read_out(x, observation, self.spec, self.features, self.dtype)


class Deep(nn.Module):
    """The residual network of IMPALA (Espeholt et al., 2018): (16, 32, 32) channels, 2 blocks each.

    A section is a convolution, a max pool of 3 × 3 with stride 2, and two residual blocks
    x + conv(relu(conv(relu(x)))), all 3 × 3.
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = to_images(observation['pixels'].astype(self.dtype) / 255)
        for i, channels in enumerate((16, 32, 32)):
            conv = functools.partial(convolution, channels, (3, 3), dtype=self.dtype)
            x = conv(name=f'section_{i}')(x)
            x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
            for j in range(2):
                block = conv(name=f'section_{i}_block_{j}_in')(nn.relu(x))
                x = x + conv(name=f'section_{i}_block_{j}_out')(nn.relu(block))
        return read_out(nn.relu(x), observation, self.spec, self.features, self.dtype)


TORSOS_BY_NAME: dict[str, Callable[..., nn.Module]] = {
    'dense': Dense,
    'conv': Conv,
    'shallow': Shallow,
    'deep': Deep,
}


def affine(features: int, dtype: DTypeLike, name: str) -> Affine:
    return Affine(features, dtype, V_init=initializers.he_normal(), name=name)


def one_hot_grid(grid: Array, categories: tuple[int, ...], dtype: DTypeLike) -> Array:
    """[..., h, w, layers] → [..., h, w, Σ categories]."""
    return jnp.concatenate(
        [jax.nn.one_hot(grid[..., i], c, dtype=dtype) for i, c in enumerate(categories)], axis=-1
    )


def flatten_observation(
    observation: Mapping[str, Array], spec: Spec, dtype: DTypeLike
) -> list[Array]:
    """The grid, one-hot, and the features of an observation, each as vectors [T, B, n]."""
    parts = []
    if 'grid' in observation:
        x = one_hot_grid(observation['grid'], spec.categories, dtype)
        parts.append(x.reshape(*x.shape[:-3], -1))
    if 'features' in observation:
        parts.append(observation['features'].astype(dtype))
    return parts


def to_images(x: Array) -> Array:
    """[T, B, h, w, c] → [T · B, h, w, c]."""
    return x.reshape(-1, *x.shape[-3:])


def read_out(
    x: Array, observation: Mapping[str, Array], spec: Spec, features: int, dtype: DTypeLike
) -> Array:
    """The convolutions' last layer, and the observation's features, through a dense layer."""
    x = x.reshape(*observation['task'].shape, -1)
    if 'features' in observation:
        x = jnp.concatenate([x, observation['features'].astype(dtype)], axis=-1)
    return nn.relu(affine(features, dtype, 'out')(x))
