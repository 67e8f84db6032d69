"""Models with attention: Flax's module, a vision Transformer in Equinox, and Perceiver in Haiku."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn

Built = tuple[Any, Any, dict[str, Any]]  # function, params and streams


def describe_array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an input, in place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def build_flax(module: nn.Module, **streams: Any) -> Built:
    """Return the function of a Linen module and the shapes of its variables."""
    variables = jax.eval_shape(module.init, jax.random.key(0), **streams)
    return module.apply, variables, streams


def build_haiku(function: Any, **streams: Any) -> Built:
    """Return a function that calls Haiku modules, and the shapes of their parameters."""
    transformed = hk.without_apply_rng(hk.transform(function))
    params = jax.eval_shape(transformed.init, jax.random.key(0), **streams)
    return transformed.apply, params, streams


# ------------------------------------------------------------------------------ Flax


def build_flax_attention() -> Built:
    """Build Flax's attention with 8 heads, on 256 tokens of 512 features."""
    attention = nn.MultiHeadDotProductAttention(num_heads=8)
    tokens = describe_array(1, 256, 512)
    variables = jax.eval_shape(attention.init, jax.random.key(0), tokens)
    return (lambda variables, x: attention.apply(variables, x)), variables, {'x': tokens}


# ------------------------------------------------------------------------------ Equinox


class AttentionBlock(eqx.Module):
    """A block of the vision Transformer, without dropout; both norms share parameters."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, features: int, hidden: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(features)
        self.attention = eqx.nn.MultiheadAttention(heads, features, key=keys[0])
        self.up = eqx.nn.Linear(features, hidden, key=keys[1])
        self.down = eqx.nn.Linear(hidden, features, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm)(x)
        x += self.attention(y, y, y)
        y = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm)(x)))
        return x + jax.vmap(self.down)(y)


class VisionTransformer(eqx.Module):
    """A vision Transformer with six blocks that classifies an image [3, 32, 32]."""

    embed: eqx.nn.Linear
    positions: jax.Array
    class_token: jax.Array
    blocks: list[AttentionBlock]
    norm: eqx.nn.LayerNorm
    classify: eqx.nn.Linear
    patch: int = eqx.field(static=True, default=4)

    def __init__(self, features: int = 512, hidden: int = 256, heads: int = 8, layers: int = 6):
        keys = jax.random.split(jax.random.key(0), layers + 2)
        self.embed = eqx.nn.Linear(3 * self.patch**2, features, key=keys[0])
        self.positions = jnp.zeros(((32 // self.patch) ** 2 + 1, features))
        self.class_token = jnp.zeros((1, features))
        self.blocks = [AttentionBlock(features, hidden, heads, key) for key in keys[2:]]
        self.norm = eqx.nn.LayerNorm(features)
        self.classify = eqx.nn.Linear(features, 10, key=keys[1])

    def __call__(self, image: jax.Array) -> jax.Array:
        side = 32 // self.patch
        patches = image.reshape(3, side, self.patch, side, self.patch)
        x = jax.vmap(self.embed)(patches.transpose(1, 3, 0, 2, 4).reshape(side**2, -1))
        x = jnp.concatenate([self.class_token, x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classify(self.norm(x[0]))


def build_equinox_transformer() -> Built:
    """Build the vision Transformer with the sizes of Equinox's example."""
    model = eqx.filter_eval_shape(VisionTransformer)
    return (lambda model, image: model(image)), model, {'image': describe_array(3, 32, 32)}


# ------------------------------------------------------------------------------ Perceiver


def norm(x: jax.Array) -> jax.Array:
    """Apply a new layer norm."""
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


class Attention(hk.Module):
    """Attention with `channels` features, projected to the number of features of the queries."""

    def __init__(self, heads: int, channels: int, name: str | None = None):
        super().__init__(name)
        self._heads, self._channels = heads, channels

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        queries, keys, values = (hk.Linear(self._channels)(array) for array in (x, z, z))
        queries, keys, values = (
            array.reshape(*array.shape[:2], self._heads, -1) for array in (queries, keys, values)
        )
        logits = jnp.einsum('bthd,bshd->bhts', queries, keys) / queries.shape[-1] ** 0.5
        mixed = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(logits), values)
        return hk.Linear(x.shape[-1])(mixed.reshape(*mixed.shape[:2], -1))


class CrossAttention(hk.Module):
    """Attention of latents x to inputs z, with a residual MLP of widening factor 1."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        x += Attention(1, z.shape[-1])(norm(x), norm(z))
        return x + hk.Linear(x.shape[-1])(jax.nn.gelu(hk.Linear(x.shape[-1])(norm(x))))


class SelfAttention(hk.Module):
    """Attention among latents, with a residual MLP of widening factor 1."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = norm(x)
        x += Attention(8, x.shape[-1])(y, y)
        return x + hk.Linear(x.shape[-1])(jax.nn.gelu(hk.Linear(x.shape[-1])(norm(x))))


def build_perceiver() -> Built:
    """Build Perceiver's first cross-attention and self-attention, with its sizes for ImageNet."""

    def encode(pixels: jax.Array) -> jax.Array:
        latents = hk.get_parameter('latents', (512, 1024), init=jnp.zeros)
        x = jnp.broadcast_to(latents, (pixels.shape[0], *latents.shape))
        return SelfAttention()(CrossAttention()(x, pixels))

    return build_haiku(encode, pixels=describe_array(1, 224 * 224, 261))
