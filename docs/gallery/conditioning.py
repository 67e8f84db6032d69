"""Models with conditioning: a DiT block in Flax, and QMIX and a VQA head in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from docs.gallery.attention import Built, build_flax, describe_array

Params = dict[str, Any]


# ------------------------------------------------------------------------------ DiT


class DiTBlock(nn.Module):
    """A block of a diffusion Transformer with adaLN-Zero, for x [B, T, d] and c [B, d]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        d = x.shape[-1]
        modulation = nn.Dense(6 * d, name='modulation')(nn.silu(c))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        normalize_1, normalize_2 = (
            nn.LayerNorm(use_bias=False, use_scale=False, name=f'norm_{i}') for i in (1, 2)
        )
        attention = nn.MultiHeadDotProductAttention(self.heads, name='attention')
        x += gate_1 * attention(normalize_1(x) * (1 + scale_1) + shift_1)
        y = nn.Dense(4 * d, name='up')(normalize_2(x) * (1 + scale_2) + shift_2)
        return x + gate_2 * nn.Dense(d, name='down')(nn.gelu(y))


def build_dit_block() -> Built:
    """Build a block of DiT-XL/2, on 256 patches."""
    return build_flax(DiTBlock(16), x=describe_array(1, 256, 1152), c=describe_array(1, 1152))


# ------------------------------------------------------------------------------ QMIX


def map_affinely(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    """Return xW + b for a layer (W, b)."""
    kernel, bias = layer
    return x @ kernel + jnp.expand_dims(bias, range(x.ndim - 1))


def mix_values(params: Params, values: jax.Array, state: jax.Array) -> jax.Array:
    """Return the joint action value of QMIX from agents' values [B, N] and the state [B, s]."""
    affine = {name: map_affinely(layer, state) for name, layer in params['hyper'].items()}
    W_1 = jnp.abs(affine['W_1']).reshape(*values.shape, -1)
    hidden = jax.nn.elu(jnp.einsum('bn,bnk->bk', values, W_1) + affine['b_1'])
    joint = jnp.einsum('bk,bk->b', hidden, jnp.abs(affine['W_2']))
    return joint + map_affinely(params['value'], jax.nn.relu(affine['V']))[:, 0]


def build_qmix() -> Built:
    """Build the mixing network of QMIX for 8 agents, a state of 168 numbers, and 32 units."""
    agents, state, hidden = 8, 168, 32
    sizes = {'W_1': agents * hidden, 'b_1': hidden, 'W_2': hidden, 'V': hidden}
    hyper = {
        name: (describe_array(state, size), describe_array(size)) for name, size in sizes.items()
    }
    params = {'hyper': hyper, 'value': (describe_array(hidden, 1), describe_array(1))}
    streams = {'values': describe_array(1920, agents), 'state': describe_array(1920, state)}
    return mix_values, params, streams


# ------------------------------------------------------------------------------ questions


def answer(params: Params, question: jax.Array, image: jax.Array) -> jax.Array:
    """Return MLB's logits of answers, from a question [B, q] and image features [B, S, v].

    Low-rank bilinear pooling computes two attention maps and the answer.
    """

    pooled = jnp.tanh(map_affinely(params['query'], question))[:, None] * jnp.tanh(
        map_affinely(params['key'], image)
    )
    weights = jax.nn.softmax(map_affinely(params['attention'], pooled), axis=1)
    glimpses = jnp.einsum('bsg,bsv->bgv', weights, image)
    visual = [jnp.tanh(map_affinely(params[f'value_{g}'], glimpses[:, g])) for g in (0, 1)]
    joint = jnp.tanh(map_affinely(params['question'], question)) * jnp.concatenate(visual, axis=-1)
    return map_affinely(params['answer'], joint)


def build_vqa_head() -> Built:
    """Build MLB's head for 2400 question features, 14 × 14 image cells and 2000 answers."""
    q, v, d, glimpses, answers = 2400, 2048, 1200, 2, 2000
    sizes = {
        'query': (q, d),
        'key': (v, d),
        'attention': (d, glimpses),
        'value_0': (v, d),
        'value_1': (v, d),
        'question': (q, glimpses * d),
        'answer': (glimpses * d, answers),
    }
    params = {name: (describe_array(n, k), describe_array(k)) for name, (n, k) in sizes.items()}
    return answer, params, {'question': describe_array(1, q), 'image': describe_array(1, 196, v)}
