"""Torsos that map an observation to features.

A torso maps an observation, name → array [T, B, …], to features [T, B, F].
"""

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
    """Two dense layers on the one-hot grid and the features.

        v = relu(A₂ relu(A₁ [onehot(grid), features] + c₁) + c₂)

    This is the default for grids, because on XLA's CPU backend the gradient of a convolution inside
    a scan is an order of magnitude slower.
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        vectors = flatten_observation(observation, self.spec, self.dtype)
        hidden = jnp.concatenate(vectors, axis=-1)
        for layer_name in ('hidden', 'out'):
            hidden = nn.relu(affine(self.features, self.dtype, layer_name)(hidden))
        return hidden


class Conv(nn.Module):
    """Two 3 × 3 convolutions with 32 and 64 channels on the one-hot grid, and a dense layer.

    v = relu(A [relu(W₂ ∗ relu(W₁ ∗ onehot(grid))), features] + c)
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        images = merge_time_and_batch(
            encode_one_hot(observation['grid'], self.spec.categories, self.dtype)
        )
        for layer, channels in enumerate((32, 64)):
            conv = convolution(channels, (3, 3), dtype=self.dtype, name=f'conv_{layer}')
            images = nn.relu(conv(images))
        return project(images, observation, self.features, self.dtype)


class Shallow(nn.Module):
    """The convolutions of DQN (Mnih et al., 2015) and a dense layer.

        v = relu(A [relu(W₃ ∗ relu(W₂ ∗ relu(W₁ ∗ pixels / 255))), features] + c)

    W₁ has 32 channels of 8 × 8 with stride 4, W₂ has 64 of 4 × 4 with stride 2, and W₃ has 64 of
    3 × 3.
    """

    min_side: ClassVar[int] = 36  # pixels; a smaller picture leaves the last convolution nothing
    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        images = merge_time_and_batch(observation['pixels'].astype(self.dtype) / 255)
        for layer, (channels, size, stride) in enumerate(((32, 8, 4), (64, 4, 2), (64, 3, 1))):
            conv = convolution(
                channels,
                (size, size),
                (stride, stride),
                'VALID',
                dtype=self.dtype,
                name=f'conv_{layer}',
            )
            images = nn.relu(conv(images))
        return project(images, observation, self.features, self.dtype)


class Deep(nn.Module):
    """The residual network of IMPALA (Espeholt et al., 2018): sections of 16, 32 and 32 channels.

        block(x) = x + conv(relu(conv(relu(x))))
        section(x) = block(block(pool(conv(x))))
        v = relu(A [relu(section₃(section₂(section₁(pixels / 255)))), features] + c)

    Convolutions and max pooling are 3 × 3, and the pooling has stride 2.
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        images = merge_time_and_batch(observation['pixels'].astype(self.dtype) / 255)
        for section, channels in enumerate((16, 32, 32)):
            conv = functools.partial(convolution, channels, (3, 3), dtype=self.dtype)
            images = conv(name=f'section_{section}')(images)
            images = nn.max_pool(images, (3, 3), (2, 2), 'SAME')
            # Two residual blocks.
            for block in range(2):
                prefix = f'section_{section}_block_{block}'
                residual = conv(name=f'{prefix}_in')(nn.relu(images))
                images = images + conv(name=f'{prefix}_out')(nn.relu(residual))
        return project(nn.relu(images), observation, self.features, self.dtype)


TORSOS_BY_NAME: dict[str, Callable[..., nn.Module]] = {
    'dense': Dense,
    'conv': Conv,
    'shallow': Shallow,
    'deep': Deep,
}


def affine(features: int, dtype: DTypeLike, name: str) -> Affine:
    """Return a dense layer initialized for a subsequent ReLU."""
    return Affine(features, dtype, V_init=initializers.he_normal(), name=name)


def encode_one_hot(grid: Array, categories: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Encode each layer of a grid [..., h, w, layers] as one-hot, [..., h, w, Σ categories]."""
    one_hot_layers = [
        jax.nn.one_hot(grid[..., layer], num_categories, dtype=dtype)
        for layer, num_categories in enumerate(categories)
    ]
    return jnp.concatenate(one_hot_layers, axis=-1)


def flatten_observation(
    observation: Mapping[str, Array], spec: Spec, dtype: DTypeLike
) -> list[Array]:
    """Return the one-hot grid and the features of an observation as vectors [T, B, n]."""
    vectors = []
    if 'grid' in observation:
        one_hot_grid = encode_one_hot(observation['grid'], spec.categories, dtype)
        vectors.append(one_hot_grid.reshape(*one_hot_grid.shape[:-3], -1))
    if 'features' in observation:
        vectors.append(observation['features'].astype(dtype))
    return vectors


def merge_time_and_batch(images: Array) -> Array:
    """Reshape [T, B, h, w, c] to [T · B, h, w, c]."""
    return images.reshape(-1, *images.shape[-3:])


def project(
    images: Array, observation: Mapping[str, Array], features: int, dtype: DTypeLike
) -> Array:
    """Map feature maps and the features of an observation to [T, B, F] with a dense layer."""
    vectors = images.reshape(*observation['task'].shape, -1)
    if 'features' in observation:
        vectors = jnp.concatenate([vectors, observation['features'].astype(dtype)], axis=-1)
    return nn.relu(affine(features, dtype, 'out')(vectors))
