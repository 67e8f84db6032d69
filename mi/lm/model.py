"""A recurrent language model with a place, its site, where a token stream meets a context.

Shapes: T steps, B sequences, E embedding, H hidden, m context, V vocabulary; tokens are [T, B].
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi import cells
from mi.contract import linear
from mi.layers import Affine, MultiplicativeInteraction

Site = Literal['none', 'encoder', 'decoder', 'both']
Source = Literal['recurrent', 'state']
SITES, SOURCES = get_args(Site), get_args(Source)

Carry = dict[str, Any]


class LanguageModel(nn.Module):
    """Embedding → [encoder fusion] → LSTM layers → decoder fusion or affine map → logits.

        e_t = embedding of token t                       [E]
        x_t = fuse(e_t, z_t)  or  e_t                    [E]   site 'encoder', 'both'
        h_t = LSTM(x_t, h_{t−1})                         [H]
        y_t = fuse(h_t, z_t)  or  an affine map of h_t   [E]   site 'decoder', 'both'
        logits_t = y_t · output embedding + bias         [V]   predicts token t + 1

    The context z_t [m] has seen the tokens before t and no other. It is the state of a small LSTM
    of its own ('recurrent'), or an affine map of the core's state h_{t−1} ('state').

    With source 'state' at the encoder, x_t depends on h_{t−1}, so that fusion and input projection
    run inside the loop over time; in all other cases they are one product for all steps.

    Attributes:
      vocabulary: V.
      embed: E.
      hidden: H.
      layers: number of LSTM layers.
      site: where the fusion is; 'none' for a plain LSTM.
      source: where the context comes from.
      context: m; 0 for no context at all, as the fusion 'none' wants it.
      fusion: constructor of the module (x, z) → y, one of `mi.fusion.FUSIONS`.
      dropout: rate, on the embedding, between layers and on the output.
      tied: whether the output embedding is the input embedding.
      dtype: of the products; parameters, state and logits are f32.
    """

    vocabulary: int
    embed: int
    hidden: int
    layers: int = 1
    site: Site = 'encoder'
    source: Source = 'recurrent'
    context: int = 64
    fusion: Callable[..., nn.Module] = MultiplicativeInteraction
    dropout: float = 0.0
    tied: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, tokens: Array, train: bool = False) -> tuple[Carry, Array]:
        """Carry, [T, B] ids → carry after the last token, logits [T, B, V] in f32.

        Args:
          carry: from `initial_carry`, or from the call on the tokens before these.
          tokens: the inputs; logits[t] is for the token after tokens[t].
          train: whether dropout is on; needs the rng 'dropout'.
        """
        V, E = self.vocabulary, self.embed
        at_encoder, at_decoder = self.site in ('encoder', 'both'), self.site in ('decoder', 'both')
        table = self.param('embedding', initializers.normal(E**-0.5), (V, E))
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop((table[tokens] * E**0.5).astype(self.dtype))

        core = _Core(
            hidden=self.hidden,
            layers=self.layers,
            fusion=self.fusion if at_encoder else None,
            context=self.context,
            dropout=self.dropout,
            dtype=self.dtype,
            name='core',
        )
        before: Carry = carry
        after: Carry = {}
        if not self._has_context():
            z = jnp.zeros((1, x.shape[1], 0), self.dtype)
            after['core'], (h, _) = core(before['core'], x, z, train)
        elif self.source == 'recurrent':
            context = cells.LSTM(self.context, dtype=self.dtype, name='context')
            after['context'], states = context(before['context'], x)
            z = _previous(before['context'], states)
            after['core'], (h, _) = core(before['core'], x, z, train)
        elif at_encoder:
            loop = nn.scan(
                lambda core, state, x_t: core(state, x_t[None], None, train),
                variable_broadcast='params',
                split_rngs={'params': False, 'dropout': True},
            )
            after['core'], (h, z) = loop(core, before['core'], x)
            h, z = h[:, 0], z[:, 0]
        else:
            after['core'], (h, _) = core(before['core'], x, None, train)
            z = Affine(self.context, dtype=self.dtype, name='context')(
                _previous(before['core'][-1], h)
            )

        h = drop(h)
        if at_decoder:
            y = self.fusion(E, dtype=self.dtype, name='decoder')(h, z)
        else:
            y = Affine(E, dtype=self.dtype, name='decoder')(h)
        output = table.T if self.tied else self.param('output', initializers.lecun_normal(), (E, V))
        bias = self.param('bias', initializers.zeros, (V,))
        logits = linear(y, output.astype(self.dtype), out_dtype=jnp.float32)
        return after, logits + bias.reshape(1, 1, V)

    def initial_carry(self, batch: int) -> Carry:
        """The state before the first token: zeros."""
        carry: Carry = {'core': [cells.initial(batch, self.hidden) for _ in range(self.layers)]}
        if self._has_context() and self.source == 'recurrent':
            carry['context'] = cells.initial(batch, self.context)
        return carry

    def _has_context(self) -> bool:
        return self.site != 'none' and self.context > 0


class _Core(nn.Module):
    """Encoder fusion, where there is one, and LSTM layers; attributes as in `LanguageModel`."""

    hidden: int
    layers: int
    fusion: Callable[..., nn.Module] | None
    context: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, state: list[cells.Carry], x: Array, z: Array | None, train: bool
    ) -> tuple[list[cells.Carry], tuple[Array, Array | None]]:
        """States, x [T, B, E], z [T, B, m] → states, h [T, B, H] and the z that was fused.

        Without z, the fusion's context is made from the top layer's state; T is 1 then.
        """
        if self.fusion is not None:
            if z is None:
                z = Affine(self.context, dtype=self.dtype, name='context')(state[-1][1][None])
            x = self.fusion(x.shape[-1], dtype=self.dtype, name='encoder')(x, z)
        after = []
        for i in range(self.layers):
            if i > 0:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            last, x = cells.LSTM(self.hidden, dtype=self.dtype, name=f'lstm_{i}')(state[i], x)
            after.append(last)
        return after, (x, z)


def _previous(carry: cells.Carry, h: Array) -> Array:
    """[T, B, H] with row t the state before step t."""
    return jnp.concatenate([carry[1][None].astype(h.dtype), h[:-1]])
