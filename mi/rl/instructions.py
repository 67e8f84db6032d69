"""The instruction encoder, and functions that avoid repeated work on equal instructions.

Instructions seldom change within an unroll, so most steps repeat the instruction of the previous
step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi import cells, counting

MAX_INSTRUCTIONS = 4  # per environment and unroll; with more, every row is computed


def encode_once_per_instruction(
    encode: Callable[[Array], Any], tokens: Array, is_new: Array
) -> Array:
    """Return encode(tokens), [T, B, …], for tokens that change only where `is_new` is True.

    If no environment has more than `MAX_INSTRUCTIONS` instructions, each is encoded once. For
    T = 20 this is a fifth of the work. Otherwise, or if T or L is small, every row is encoded.
    """
    T, _, L = tokens.shape
    if 2 * MAX_INSTRUCTIONS >= T or MAX_INSTRUCTIONS >= L:
        return encode(tokens)
    instruction_index, starts, is_few = index_instructions(is_new)

    def encode_distinct() -> Array:
        encodings = encode(jnp.take_along_axis(tokens, starts[..., None], axis=0))
        return jnp.take_along_axis(encodings, instruction_index[..., None], axis=0, mode='clip')

    return jax.lax.cond(is_few, encode_distinct, lambda: encode(tokens))


def fuse_once_per_instruction(fusion: nn.Module, x: Array, z: Array, is_new: Array) -> Array:
    """Return fusion(x, z), [T, B, k], for z [T, B, m] that changes only where `is_new` is True.

    Like `encode_once_per_instruction`, but each x is fused with every distinct z of its
    environment, and each step selects the result for its own z. A full form contracts z first,
    which takes a quarter of the work for T = 20. Unless the work is at least halved, each row is
    fused with its own z only.
    """
    is_short = len(x) <= 2 * MAX_INSTRUCTIONS
    if fusion.is_initializing() or is_short or not _halves_flops(fusion, x, z):
        return fusion(x, z)
    instruction_index, starts, is_few = index_instructions(is_new)

    def fuse_distinct(fusion: nn.Module, x: Array, z: Array) -> Array:
        distinct_z = jnp.take_along_axis(z, starts[..., None], axis=0)
        outputs = fusion(x[None], distinct_z[:, None])
        indices = instruction_index[None, ..., None]
        return jnp.take_along_axis(outputs, indices, axis=0, mode='clip')[0]

    return nn.cond(is_few, fuse_distinct, lambda fusion, x, z: fusion(x, z), fusion, x, z)  # type: ignore[no-any-return,unused-ignore]


def _halves_flops(fusion: nn.Module, x: Array, z: Array) -> bool:
    """Return whether fusing with `MAX_INSTRUCTIONS` distinct z at least halves the FLOPs."""
    (T, B, n), m, dtype = x.shape, z.shape[-1], x.dtype
    apply, variables = fusion.clone(parent=None, name=None).apply, fusion.variables

    def count_flops(*shapes: tuple[int, ...]) -> int:
        x, z = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        return counting.flops(apply, variables, x, z)

    distinct_flops = count_flops((1, T, B, n), (MAX_INSTRUCTIONS, 1, B, m))
    return 2 * distinct_flops <= count_flops((T, B, n), (T, B, m))


def index_instructions(is_new: Array) -> tuple[Array, Array, Array]:
    """Assign an index to each instruction of each environment.

    Args:
      is_new: bool [T, B], whether the instruction differs from that of the previous step.

    Returns:
      instruction_index: [T, B], index of the instruction of each step, from 0.
      starts: [MAX_INSTRUCTIONS, B], first step of each instruction.
      is_few: bool [], whether no environment has more than `MAX_INSTRUCTIONS` instructions.
    """
    changes = is_new & (jnp.arange(len(is_new)) > 0).reshape(-1, 1)
    instruction_index = jnp.cumsum(changes, axis=0)
    matches = instruction_index[None] == jnp.arange(MAX_INSTRUCTIONS).reshape(-1, 1, 1)
    return instruction_index, matches.argmax(1), (instruction_index < MAX_INSTRUCTIONS).all()


class InstructionEncoder(nn.Module):
    """An LSTM that maps tokens [..., L], with 0 for padding, to its last state [..., hidden].

    The embedding size of 20 and the hidden size of 64 are those of IMPALA's public code. An
    instruction without tokens is encoded as zero.
    """

    vocabulary: int
    embed: int = 20
    hidden: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        token_rows = tokens.reshape(-1, tokens.shape[-1]).T  # [L, rows]
        table_shape = self.vocabulary, self.embed
        embeddings = self.param('embedding', initializers.normal(1.0), table_shape)
        lstm = cells.LSTM(self.hidden, dtype=self.dtype, name='lstm')
        carry = cells.initial_carry(token_rows.shape[1], self.hidden)
        _, hidden = lstm(carry, embeddings[token_rows].astype(self.dtype))

        # The state after the last token of each row; zero for a row without tokens.
        is_token = token_rows > 0
        last_index = jnp.maximum(is_token.sum(0) - 1, 0)
        last_hidden = jnp.take_along_axis(hidden, last_index[None, :, None], axis=0)[0]
        encodings = jnp.where(is_token.any(0)[:, None], last_hidden, 0)
        return encodings.reshape(*tokens.shape[:-1], self.hidden)
