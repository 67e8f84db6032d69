"""Mixtures of experts, in which a context weighs or selects maps of the input.

Shapes: input x [..., n], context z [..., m], output y [..., k]. There are E experts, N tokens (the
product of all leading axes), S experts per token, and h hidden units per expert.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi.kernels.bilinear import bilinear
from mi.kernels.linear import accumulation_dtype, linear
from mi.layers import Context, align_streams, check_dense, context_init, stacked_init


class DenseMixture(nn.Module):
    """A mixture of linear experts: y = Σ_i g_i (E_i x + e_i), g = softmax(zᵀG).

    This is a multiplicative interaction of x and g, with W = E [E, n, k] and U = e [E, k]. G [m, E]
    starts small, with a variance of 1/100 for zᵀG, so y starts near the mean of the experts. The
    experts are independent, each with E times the variance of a single layer, so that y has unit
    variance for unit-variance x. Source: Jacobs et al., Adaptive Mixtures of Local Experts, 1991.

    Attributes:
      features: k, the number of output features.
      experts: E, the number of experts.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`, but the softmax is in at least
        f32.
    """

    features: int
    experts: int = 4
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        """Return y [..., k] for x [..., n] and z [..., m], whose leading axes broadcast."""
        x, z = align_streams(x, z)
        G_shape = z.shape[-1], self.experts
        E_shape = self.experts, x.shape[-1], self.features
        G = self.param('G', context_init(self.context, 0.01), G_shape, self.param_dtype)
        E = self.param('E', stacked_init(self.experts), E_shape, self.param_dtype)
        e = self.param('e', initializers.zeros, (self.experts, self.features), self.param_dtype)
        x, z, G, E, e = nn.dtypes.promote_dtype(x, z, G, E, e, dtype=self.dtype)
        g = jax.nn.softmax(linear(z, G, out_dtype=accumulation_dtype(x))).astype(x.dtype)
        return bilinear(x, g, E) + linear(g, e)


class RoutedMixture(nn.Module):
    """A sparse mixture of experts: each token uses the S experts with the largest router weights.

        y = Σ_{i ∈ top S} g_i (A_i act(V_i x + b_i) + a_i),   p = softmax(zᵀG),   by default z = x

    The parameters are V [E, n, h], b [E, h], A [E, h, k], a [E, k] and G [m, E]. g is p normalized
    over the top S, which equals the softmax of their logits (Shazeer et al., Outrageously Large
    Neural Networks, 2017, but without noise). For S = 1 this would be 1 and the router would have
    no gradient, so g = p instead, as in Fedus et al., Switch Transformers, 2022.

    The module sows two unscaled losses into 'losses', each a tuple with one scalar per call:
      `load_balance`: E · Σ_i f_i P_i, where f_i is the share of assignments to expert i and P_i the
        mean of p_i. It is 1 if both are uniform. Fedus et al. weigh it by 0.01.
      `router_z`: the mean of logsumexp(zᵀG)². Zoph et al., ST-MoE, 2022, weigh it by 0.001.

    By default, no token is dropped, whatever the routing. The assignments, sorted by expert, fill
    fewer than 2 E blocks of ⌈N · S / E⌉ rows, with one expert per block, so that the products and
    the gathered weights are at most twice those of a uniform routing. With a capacity factor, an
    expert takes ⌈capacity_factor · N · S / E⌉ tokens: first choices before second choices, and
    earlier tokens before later ones. For the other tokens, its term is zero.

    Attributes:
      features: k, the number of output features.
      experts: E, the number of experts.
      hidden: h, the hidden width of an expert.
      top_k: S, the number of experts per token.
      capacity_factor: limit of the tokens per expert, relative to a uniform routing, or None for no
        limit.
      activation: activation of the hidden layer.
      context: 'dense' or 'one_hot', which determines the initial scale of G.
      dtype, param_dtype: as in `MultiplicativeInteraction`, but the router is in at least f32.
    """

    features: int
    experts: int
    hidden: int
    top_k: int = 2
    capacity_factor: float | None = None
    activation: Callable[[Array], Array] = nn.relu
    context: Context = 'dense'
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None, mask: Array | None = None) -> Array:
        """Return y [..., k] for x [..., n].

        Args:
          x: the input.
          z: the router's input, [..., m]. Its leading axes broadcast to those of x. Defaults to x.
          mask: [...], True where there is a token. Elsewhere y is zero, and the position counts
            neither for the capacity nor for the losses. None if all positions are tokens.

        Raises:
          ValueError: if the shapes do not match, or top_k or the capacity factor is out of range.
        """
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(
                f'top_k = {self.top_k}: expected 1 to {self.experts}, the number of experts'
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f'capacity_factor = {self.capacity_factor}: expected a positive number, or None '
                'for no limit'
            )

        # Parameters.
        if z is None:
            z = x
        else:
            check_dense(z)
        leading, input_size = x.shape[:-1], x.shape[-1]
        num_experts, hidden_size, features = self.experts, self.hidden, self.features
        V_shape = num_experts, input_size, hidden_size
        A_shape = num_experts, hidden_size, features
        G_shape = z.shape[-1], num_experts
        G = self.param('G', context_init(self.context), G_shape, self.param_dtype)
        V = self.param('V', stacked_init(), V_shape, self.param_dtype)
        b = self.param('b', initializers.zeros, (num_experts, hidden_size), self.param_dtype)
        A = self.param('A', stacked_init(2.0), A_shape, self.param_dtype)
        a = self.param('a', initializers.zeros, (num_experts, features), self.param_dtype)

        # Route each token to its top S experts.
        dtype = nn.dtypes.canonicalize_dtype(x, V, b, A, a, dtype=self.dtype)
        z, G = nn.dtypes.promote_dtype(z, G, dtype=accumulation_dtype(dtype))
        logits = _flatten_rows('z', linear(z, G), leading)
        mask = jnp.ones(leading, bool) if mask is None else mask
        valid = _flatten_rows('the mask', mask[..., None], leading)[:, 0]
        gates, choices = self._route(logits, valid)

        # Apply the experts to their blocks of tokens, and sum each token's terms.
        x, V, b, A, a = nn.dtypes.promote_dtype(x, V, b, A, a, dtype=dtype)
        capacity = None
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * choices.size / num_experts)
        slot, row_token, block_expert = assign_blocks(choices, num_experts, capacity)
        if capacity is None:
            V, b, A, a = (param[block_expert] for param in (V, b, A, a))
        tokens = x.reshape(-1, input_size).at[row_token].get(mode='fill', fill_value=0)
        hidden = self.activation(_multiply_blocks(tokens, V) + b[:, None])
        outputs = (_multiply_blocks(hidden, A) + a[:, None]).reshape(-1, features)
        terms = outputs.at[slot].get(mode='fill', fill_value=0)
        return (gates[..., None] * terms).sum(1).astype(x.dtype).reshape(*leading, features)

    def _route(self, logits: Array, valid: Array) -> tuple[Array, Array]:
        """Return the gates and the experts of each token [N, S], and sow the losses.

        Args:
          logits: logits of the router, [N, E].
          valid: [N], whether a row is a token. Other rows get the expert E, which does not exist.
        """
        num_experts, top_k = self.experts, self.top_k
        p = jax.nn.softmax(logits)
        gates, choices = jax.lax.top_k(p, top_k)
        if top_k > 1:
            gates = gates / gates.sum(-1, keepdims=True)
        choices = jnp.where(valid[:, None], choices, num_experts)

        # The losses are means over the tokens.
        if not self.is_initializing():
            counts = jnp.bincount(choices.reshape(-1), length=num_experts)
            f = counts / counts.sum().clip(1)
            token_share = valid / valid.sum().clip(1)
            self.sow('losses', 'load_balance', num_experts * f @ (token_share @ p))
            self.sow('losses', 'router_z', token_share @ jax.nn.logsumexp(logits, axis=-1) ** 2)
        return gates, choices


@functools.partial(jax.jit, static_argnums=(1, 2))
def assign_blocks(choices: Array, experts: int, capacity: int | None) -> tuple[Array, Array, Array]:
    """Assign tokens to B blocks of R rows, with one expert per block.

    Args:
      choices: [N, S], the distinct experts of each token, or E for no expert.
      experts: E, the number of experts.
      capacity: maximum number of tokens per expert, or None. If None, R is ⌈N · S / E⌉, and B is
        the largest number of blocks that any assignment needs, which is less than 2 E. Otherwise,
        each expert has one block of at most `capacity` rows.

      Returns:
        slot [N, S]: the row of each assignment in the B · R rows, or B · R if it has no row.
        row_token [B, R]: the token in each row, or N if the row is empty.
        block_expert [B]: the expert of each block.
    """
    num_tokens, top_k = choices.shape
    num_assignments = num_tokens * top_k
    expert = choices.T.reshape(-1)  # of each assignment, first choices first
    counts = jnp.bincount(expert, length=experts)
    order = jnp.argsort(expert)

    # The rank of each assignment among those of its expert.
    starts = (jnp.cumsum(counts) - counts)[expert[order]]
    ranks = (jnp.arange(num_assignments) - starts).astype(expert.dtype)
    rank = jnp.zeros_like(expert).at[order].set(ranks)

    # The blocks of each expert.
    if capacity is None:
        num_rows = max(1, math.ceil(num_assignments / experts))
        max_padding = min(experts, num_assignments) * (num_rows - 1)
        num_blocks = (num_assignments + max_padding) // num_rows
        expert_blocks = -(-counts // num_rows)
        block_ends = jnp.cumsum(expert_blocks)
        block_expert = jnp.searchsorted(block_ends, jnp.arange(num_blocks), side='right')
        block_expert = block_expert.clip(max=experts - 1)
        first_block = block_ends - expert_blocks
        is_assigned = expert < experts
    else:
        num_rows, num_blocks = min(capacity, num_tokens), experts
        block_expert = first_block = jnp.arange(experts)
        is_assigned = (expert < experts) & (rank < num_rows)

    # The rows of the assignments, and the tokens in the rows.
    num_slots = num_blocks * num_rows
    slot = jnp.where(is_assigned, first_block[expert] * num_rows + rank, num_slots)
    token = jnp.tile(jnp.arange(num_tokens), top_k)
    row_token = jnp.full(num_slots, num_tokens).at[slot].set(token, mode='drop')
    return slot.reshape(top_k, num_tokens).T, row_token.reshape(num_blocks, num_rows), block_expert


def _multiply_blocks(x: Array, W: Array) -> Array:
    """Multiply [B, R, n] by [B, n, k] block by block, accumulated in at least f32."""
    product = jnp.einsum('brn,bnk->brk', x, W, preferred_element_type=accumulation_dtype(x, W))
    return product.astype(x.dtype)


def _flatten_rows(stream_name: str, stream: Array, leading: tuple[int, ...]) -> Array:
    """Broadcast the leading axes of a stream [..., c] to those of x and flatten them: [N, c]."""
    try:
        rows = jnp.broadcast_to(stream, (*leading, stream.shape[-1]))
    except ValueError as error:
        raise ValueError(
            f'the leading axes {stream.shape[:-1]} of {stream_name} do not broadcast to those of '
            f'x, {leading}'
        ) from error
    return rows.reshape(-1, rows.shape[-1])
