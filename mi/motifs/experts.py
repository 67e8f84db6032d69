"""Mixtures of experts: a context weighs, or selects, maps of the input.

Shapes: x [..., n] the input, z [..., m] the context, y [..., k] the output. E is the number of
experts, N the number of tokens (the product of all leading axes), S the number of experts per token
and h the hidden width of an expert.
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
from mi.layers import Context, align_streams, check_dense, context_init


class DenseMixture(nn.Module):
    """A mixture of linear experts: y = Σ_i g_i (E_i x + e_i), g = softmax(zᵀG).

    With g in place of z, it is the multiplicative interaction with W = E [E, n, k] and U = e
    [E, k]. G [m, E] starts small (zᵀG has variance 1/100), so y starts near the mean of the
    experts. The experts are independent, each with E times the variance of a single layer, so y has
    unit variance for unit-variance x. Source: Jacobs et al., Adaptive Mixtures of Local Experts,
    1991.

    Attributes:
      features: k.
      experts: E.
      context, dtype, param_dtype: as in `MultiplicativeInteraction`; softmax in f32 at least.
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
        m, n, k = z.shape[-1], x.shape[-1], self.features
        G = self.param('G', context_init(self.context, 0.01), (m, self.experts), self.param_dtype)
        E = self.param('E', _expert_init(self.experts), (self.experts, n, k), self.param_dtype)
        e = self.param('e', initializers.zeros, (self.experts, k), self.param_dtype)
        x, z, G, E, e = nn.dtypes.promote_dtype(x, z, G, E, e, dtype=self.dtype)
        g = jax.nn.softmax(linear(z, G, out_dtype=accumulation_dtype(x))).astype(x.dtype)
        return bilinear(x, g, E) + linear(g, e)


class RoutedMixture(nn.Module):
    """A sparse mixture of experts: each token passes the S experts with the largest router weight.

        y = Σ_{i ∈ top S} g_i (A_i act(V_i x + b_i) + a_i),   p = softmax(zᵀG),   by default z = x

    V [E, n, h], b [E, h], A [E, h, k], a [E, k], G [m, E]. g is p, normalized over the top S, which
    equals the softmax of their logits (Shazeer et al., Outrageously Large Neural Networks,
    2017, without their noise). For S = 1 that would be 1 and give the router no gradient, so g = p,
    as in Fedus et al., Switch Transformers, 2022.

    Two unscaled losses are sown into 'losses', each a tuple with one scalar per call:
      `load_balance`: E · Σ_i f_i P_i, where f_i is the share of assignments to expert i and P_i the
        mean of p_i. It is 1 if both are uniform (Fedus et al.; their weight is 0.01).
      `router_z`: the mean of logsumexp(zᵀG)² (Zoph et al., ST-MoE, 2022; their weight is 0.001).

    By default no token is dropped, whatever the routing. The assignments, sorted by expert, fill
    fewer than 2 E blocks of ⌈N · S / E⌉ rows, with one expert per block. Thus the products and the
    gathered weights are at most twice those of a uniform routing. With a capacity, an expert takes
    ⌈capacity_factor · N · S / E⌉ tokens: first choices before second choices, and earlier tokens
    before later ones. The terms of further tokens are zero.

    Attributes:
      features: k.
      experts: E.
      hidden: h.
      top_k: S.
      capacity_factor: None to drop nothing.
      activation: activation of the hidden layer.
      context: 'dense' or 'one_hot'; determines the initial scale of G.
      dtype, param_dtype: as in `MultiplicativeInteraction`; the router is in f32 at least.
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
          z: [..., m], the router's input; its leading axes broadcast to those of x. None for x.
          mask: [...], True where there is a token. Elsewhere y is zero, and neither the capacity
            nor the losses count the position. None for all True.

        Raises:
          ValueError: if the shapes do not match, or top_k or the capacity factor is out of range.
        """
        E, S, k = self.experts, self.top_k, self.features
        if not 1 <= S <= E:
            raise ValueError(f'top_k = {S}: expected 1 to {E}, the number of experts')
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f'capacity_factor = {self.capacity_factor}: expected above 0, or None for no limit'
            )

        # Parameters.
        leading, n = x.shape[:-1], x.shape[-1]
        if z is None:
            z = x
        else:
            check_dense(z)
        G = self.param('G', context_init(self.context), (z.shape[-1], E), self.param_dtype)
        V = self.param('V', _expert_init(), (E, n, self.hidden), self.param_dtype)
        b = self.param('b', initializers.zeros, (E, self.hidden), self.param_dtype)
        A = self.param('A', _expert_init(2.0), (E, self.hidden, k), self.param_dtype)
        a = self.param('a', initializers.zeros, (E, k), self.param_dtype)

        # Route each token to its top S experts.
        dtype = nn.dtypes.canonicalize_dtype(x, V, b, A, a, dtype=self.dtype)
        wide = accumulation_dtype(dtype)
        logits = _flatten_rows('z', linear(*nn.dtypes.promote_dtype(z, G, dtype=wide)), leading)
        mask = jnp.ones(leading, bool) if mask is None else mask
        valid = _flatten_rows('the mask', mask[..., None], leading)[:, 0]
        p = jax.nn.softmax(logits)
        g, choices = jax.lax.top_k(p, S)
        if S > 1:
            g = g / g.sum(-1, keepdims=True)
        choices = jnp.where(valid[:, None], choices, E)

        # Losses.
        if not self.is_initializing():
            counts = jnp.bincount(choices.reshape(-1), length=E)
            f = counts / counts.sum().clip(1)
            share = valid / valid.sum().clip(1)
            self.sow('losses', 'load_balance', E * f @ (share @ p))
            self.sow('losses', 'router_z', share @ jax.nn.logsumexp(logits, axis=-1) ** 2)

        # Apply the experts to their blocks of tokens, and sum each token's terms.
        x, V, b, A, a = nn.dtypes.promote_dtype(x, V, b, A, a, dtype=dtype)
        capacity = None
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * choices.size / E)
        slot, token, expert = assign_blocks(choices, E, capacity)
        if capacity is None:
            V, b, A, a = V[expert], b[expert], A[expert], a[expert]
        tokens = x.reshape(-1, n).at[token].get(mode='fill', fill_value=0)
        h = self.activation(_multiply_blocks(tokens, V) + b[:, None])
        y = (
            (_multiply_blocks(h, A) + a[:, None])
            .reshape(-1, k)
            .at[slot]
            .get(mode='fill', fill_value=0)
        )
        return (g[..., None] * y).sum(1).astype(x.dtype).reshape(*leading, k)


@functools.partial(jax.jit, static_argnums=(1, 2))
def assign_blocks(choices: Array, experts: int, capacity: int | None) -> tuple[Array, Array, Array]:
    """Assign tokens to B blocks of R rows, with one expert per block.

    Args:
      choices: [N, S], the experts of each token, all different; `experts` for none.
      experts: E.
      capacity: the largest number of tokens per expert; None for no limit. Without a limit, R is
        ⌈N · S / E⌉, and B is the largest number of blocks that any assignment needs, fewer than
        2 E. With a limit, each expert has one block of `capacity` rows.

    Returns:
      slot [N, S]: the row of each assignment, out of B · R; B · R for none.
      token [B, R]: the token in each row; N for none.
      expert [B]: the expert of each block.
    """
    N, S = choices.shape
    flat = choices.T.reshape(-1)  # first choices first
    counts = jnp.bincount(flat, length=experts)
    order = jnp.argsort(flat)

    # The rank of each assignment among those of its expert.
    starts = (jnp.cumsum(counts) - counts)[flat[order]]
    rank = jnp.zeros_like(flat).at[order].set((jnp.arange(N * S) - starts).astype(flat.dtype))

    # The blocks of each expert.
    if capacity is None:
        R = max(1, math.ceil(N * S / experts))
        B = (N * S + min(experts, N * S) * (R - 1)) // R
        num_blocks = -(-counts // R)
        end = jnp.cumsum(num_blocks)
        expert = jnp.searchsorted(end, jnp.arange(B), side='right').clip(max=experts - 1)
        first = end - num_blocks
        is_assigned = flat < experts
    else:
        R, B = min(capacity, N), experts
        expert = first = jnp.arange(experts)
        is_assigned = (flat < experts) & (rank < R)

    # The rows of the assignments, and the tokens in the rows.
    slot = jnp.where(is_assigned, first[flat] * R + rank, B * R)
    token = jnp.full(B * R, N).at[slot].set(jnp.tile(jnp.arange(N), S), mode='drop')
    return slot.reshape(S, N).T, token.reshape(B, R), expert


def _multiply_blocks(x: Array, W: Array) -> Array:
    """Multiply [B, R, n] by [B, n, k] per block, accumulated in f32 at least."""
    wide = accumulation_dtype(x, W)
    return jnp.einsum('brn,bnk->brk', x, W, preferred_element_type=wide).astype(x.dtype)


def _flatten_rows(name: str, a: Array, leading: tuple[int, ...]) -> Array:
    """Broadcast the leading axes of a [..., c] to those of x and flatten them: [N, c]."""
    try:
        a = jnp.broadcast_to(a, (*leading, a.shape[-1]))
    except ValueError as error:
        raise ValueError(
            f'the leading axes {a.shape[:-1]} of {name} do not broadcast to those of x, {leading}'
        ) from error
    return a.reshape(-1, a.shape[-1])


def _expert_init(variance: float = 1.0) -> initializers.Initializer:
    """Return an initializer for [E, n, k]: the outputs of each expert have this variance."""
    return initializers.variance_scaling(variance, 'fan_in', 'truncated_normal', batch_axis=0)
