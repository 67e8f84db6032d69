"""Encode instructions, each once per unroll."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi import cells, counting

INSTRUCTIONS = 4  # of a column that are looked at one by one


def once_per_instruction(encode: Callable[[Array], Any], tokens: Array, is_new: Array) -> Array:
    """encode(tokens) for tokens [T, B, L] that change where `is_new` alone, [T, B, …].

    Where no column has more than `INSTRUCTIONS` of them, only one row of each is encoded: for 20
    steps a fifth of the work. Otherwise, and where it would not be less work, every row is.
    """
    T, _, L = tokens.shape
    if 2 * INSTRUCTIONS >= T or INSTRUCTIONS >= L:
        return encode(tokens)
    number, begins, few = index_instructions(is_new)

    def some() -> Array:
        encoded = encode(jnp.take_along_axis(tokens, begins[..., None], axis=0))
        return jnp.take_along_axis(encoded, number[..., None], axis=0, mode='clip')

    return jax.lax.cond(few, some, lambda: encode(tokens))


def fused_per_instruction(meet: nn.Module, x: Array, z: Array, is_new: Array) -> Array:
    """meet(x, z) for x [T, B, n] and z [T, B, m] that changes where `is_new` alone, [T, B, k].

    As `once_per_instruction`: x meets each of the column's few z, and each step keeps its own. A
    full form, which contracts z first, has a quarter of the work then for 20 steps; where it would
    not be half of it, every row meets its own z alone.
    """
    if meet.is_initializing() or len(x) <= 2 * INSTRUCTIONS or not _halves_flops(meet, x, z):
        return meet(x, z)
    number, begins, few = index_instructions(is_new)

    def some(meet: nn.Module, x: Array, z: Array) -> Array:
        of_instructions = jnp.take_along_axis(z, begins[..., None], axis=0)
        y = meet(x[None], of_instructions[:, None])
        return jnp.take_along_axis(y, number[None, ..., None], axis=0, mode='clip')[0]

    return nn.cond(few, some, lambda meet, x, z: meet(x, z), meet, x, z)  # type: ignore[no-any-return,unused-ignore]


def _halves_flops(meet: nn.Module, x: Array, z: Array) -> bool:
    """Whether meeting every z of `INSTRUCTIONS` is half the products of meeting one z a step."""
    (T, B, n), m, dtype = x.shape, z.shape[-1], x.dtype
    apply, variables = meet.clone(parent=None, name=None).apply, meet.variables

    def flops(*axes: tuple[int, ...]) -> int:
        x, z = (jax.ShapeDtypeStruct(a, dtype) for a in axes)
        return counting.flops(apply, variables, x, z)

    shared = flops((1, T, B, n), (INSTRUCTIONS, 1, B, m))
    return 2 * shared <= flops((T, B, n), (T, B, m))


def index_instructions(is_new: Array) -> tuple[Array, Array, Array]:
    """Of columns [T, B]: each row's instruction, counted from 0; where each begins; whether few."""
    later = is_new & (jnp.arange(len(is_new)) > 0).reshape(-1, 1)
    number = jnp.cumsum(later, axis=0)  # [T, B]
    of_number = number[None] == jnp.arange(INSTRUCTIONS).reshape(-1, 1, 1)
    begins = of_number.argmax(1)  # [INSTRUCTIONS, B]
    return number, begins, (number < INSTRUCTIONS).all()


class InstructionEncoder(nn.Module):
    """Tokens [..., L], 0 for padding → the LSTM's state after the last of them [..., hidden].

    Embedding 20 and hidden 64 are those of IMPALA's public code. Without any token it is zero.
    """

    vocabulary: int
    embed: int = 20
    hidden: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        rows = tokens.reshape(-1, tokens.shape[-1]).T  # [L, rows]
        table = self.param('embedding', initializers.normal(1.0), (self.vocabulary, self.embed))
        lstm = cells.LSTM(self.hidden, dtype=self.dtype, name='lstm')
        _, h = lstm(cells.initial_carry(rows.shape[1], self.hidden), table[rows].astype(self.dtype))
        there = rows > 0
        last = jnp.maximum(there.sum(0) - 1, 0)
        state = jnp.take_along_axis(h, last[None, :, None], axis=0)[0]
        state = jnp.where(there.any(0)[:, None], state, 0)
        return state.reshape(*tokens.shape[:-1], self.hidden)
