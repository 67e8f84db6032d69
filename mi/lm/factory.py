"""Build a language model and its corpus from a config."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mi import cells, counting, fusion
from mi.config import (
    UserError,
    has_parameter,
)
from mi.lm.adaptive_softmax import AdaptiveWords
from mi.lm.config import CORES
from mi.lm.data import token_store
from mi.lm.dropout import Rates
from mi.lm.embeddings import Objective, Words
from mi.lm.model import LanguageModel
from mi.lm.recurrent import Recurrent


def corpus(config: ml_collections.ConfigDict) -> token_store.Corpus:
    """The corpus of a config."""
    source = config.data
    corpus = token_store.load(
        source.source,
        source.level,
        source.vocabulary,
        source.cache,
        path=source.path,
        train_tokens=source.train_tokens,
    )
    if config.model.source == 'domain' and not corpus.domains:
        raise UserError(
            f"config.model.source = 'domain': config.data.source = {source.source!r} has no "
            f"domains; use 'domains' or 'austen-domains'"
        )
    return corpus


def build(config: ml_collections.ConfigDict, vocabulary: int, domains: int = 0) -> LanguageModel:
    """The model of a config; from here on there are typed fields and no config."""
    model, word = config.model, config.model.fusion
    objective = Objective(**config.loss)
    words: Callable[..., Any]
    if model.cutoffs:
        if model.cutoffs[-1] >= vocabulary:
            raise UserError(
                f'config.model.cutoffs = {tuple(model.cutoffs)}: expected all below the '
                f'vocabulary, which has {vocabulary} ids'
            )
        words = functools.partial(
            AdaptiveWords,
            cutoffs=tuple(model.cutoffs),
            divisor=model.divisor,
            chunk=objective.chunk,
        )
    else:
        words = functools.partial(Words, objective=objective)
    core: Callable[..., Any]
    if model.core in CORES:
        module = CORES[model.core]
        options = {
            'heads': model.heads,
            'kv_heads': model.kv_heads or None,
            'activation': model.activation,
            'positions': model.positions,
            'memory': model.memory,
            'remat': model.remat,
        }
        core = functools.partial(
            module, **{k: v for k, v in options.items() if has_parameter(module, k)}
        )
    else:
        options = {'rounds': model.rounds, 'rank': model.rank or None, 'capped': model.capped}
        cell = cells.get(model.core, impl=model.impl, **options)
        core = functools.partial(Recurrent, cell=cell)
    domain = model.source == 'domain'
    context = domains if domain else model.context
    kind = {'context': 'one_hot'} if domain and word.name != 'none' else {}
    return LanguageModel(
        words=functools.partial(
            words, vocabulary=vocabulary, features=model.embed, tied=model.tied
        ),
        core=functools.partial(core, features=model.hidden, layers=model.layers, hidden=model.ffn),
        site=model.site,
        source=model.source,
        context=0 if word.name == 'none' else context,
        fusion=functools.partial(fusion.get(word.name, rank=word.rank, hidden=word.hidden), **kind),
        rates=Rates(**config.dropout),
        dtype=jnp.dtype(model.dtype),
    )


def for_evaluation(model: LanguageModel, config: ml_collections.ConfigDict) -> LanguageModel:
    """The model with the memory that it is evaluated with."""
    if config.model.core != 'transformer' or config.eval.memory < 0:
        return model
    return model.clone(core=functools.partial(model.core, memory=config.eval.memory))


def for_sampling(model: LanguageModel, config: ml_collections.ConfigDict) -> LanguageModel:
    """Return the model whose tokens see as far back as in training, however long the text gets."""
    if config.model.core != 'transformer' or config.model.memory:
        return model
    reach = max(1, config.train.length - 1)
    return model.clone(core=functools.partial(model.core, memory=reach))


def costs(
    config: ml_collections.ConfigDict, vocabulary: int, domains: int = 0
) -> dict[str, dict[str, int]]:
    """Parameters, and forward FLOPs of products per token, of the model and of its fusions."""
    # Of cuDNN's call nothing could be counted.
    model = build(_changed(config, {'model.impl': 'xla'}), vocabulary, domains)
    T, B = config.train.length, config.train.batch
    tokens = jax.ShapeDtypeStruct((T, B), jnp.int32)
    carry = jax.eval_shape(lambda: model.initial_carry(B))
    inputs = carry, tokens, None, tokens if model.source == 'domain' else None
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    parameters = per_token = 0.0
    for module, own, shapes in counting.modules(model, 'fuse_.*', variables, *inputs):
        parameters += counting.parameters(own)
        x = shapes[0]
        per_token += counting.flops(module.apply, own, *shapes) / (x.shape[0] * x.shape[1])
    return {
        'parameters': {'model': counting.parameters(variables), 'fusion': round(parameters)},
        'flops_per_token': {
            'model': round(counting.flops(model.apply, variables, *inputs) / (T * B)),
            'fusion': round(per_token),
        },
    }


def matched(
    config: ml_collections.ConfigDict, vocabulary: int, domains: int = 0
) -> ml_collections.ConfigDict:
    """The config with the size `match.knob` at which `match.by` comes nearest to its target.

    The target is `match.target`, or the cost of this config as given with the fusion 'concat'. The
    hidden size of a Transformer goes up in steps of 2 · heads, its feed-forward layer with it.
    """
    if config.match.by == 'none':
        return config
    if config.match.knob == 'rank' and 'rank' not in fusion.get_options(config.model.fusion.name):
        raise UserError(
            f"config.match.knob = 'rank': the fusion {config.model.fusion.name!r} has no rank; "
            f"use 'hidden'"
        )
    kind = 'parameters' if config.match.by == 'parameters' else 'flops_per_token'
    model = config.model

    def of_size(size: int) -> dict[str, Any]:
        if config.match.knob == 'rank':
            return {'model.fusion.rank': size}
        if model.core != 'transformer':
            return {'model.hidden': size}
        hidden = 2 * model.heads * size
        return {
            'model.hidden': hidden,
            'model.ffn': max(1, round(hidden * model.ffn / model.hidden)),
        }

    def at(changes: dict[str, Any]) -> int:
        return costs(_changed(config, changes), vocabulary, domains)[kind]['model']

    target = config.match.target or at({'model.fusion.name': 'concat'})
    try:
        size = counting.nearest_size(lambda size: at(of_size(size)), target)
    except ValueError as error:
        raise UserError(f'config.match: {error}; give another config.match.target') from error
    return _changed(config, of_size(size))


def _changed(
    config: ml_collections.ConfigDict, changes: dict[str, Any]
) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config
