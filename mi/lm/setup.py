"""From a config to typed parts: what may stand in it, and the corpus and model that it names."""

import functools
from collections import ChainMap
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from mi import cells, cost, fusion, optim, tracking
from mi.config import (
    Rule,
    UserError,
    boolean,
    check,
    choice,
    has_parameter,
    integer,
    mesh_shape,
    number,
    seeds,
    text,
)
from mi.lm import data
from mi.lm.adaptive import AdaptiveWords
from mi.lm.context import SOURCES
from mi.lm.dropout import Rates
from mi.lm.evaluate import Reading
from mi.lm.feed_forward import ACTIVATIONS
from mi.lm.model import SITES, LanguageModel
from mi.lm.recurrent import Recurrent
from mi.lm.transformer import Transformer
from mi.lm.words import Objective, Words
from mi.precision import PRECISIONS

CORES: dict[str, Callable[..., nn.Module]] = {'transformer': Transformer}
"""The cores that are not layers of a recurrent cell: config word → module, called as Transformer.

Every word of `mi.cells.CELLS` is a core too. A config file may add to both.
"""
RATE = number(0, 0.99)
SEGMENT = 256  # tokens of a segment in evaluation, where state or a memory is carried


def cutoffs(value: Any) -> str:
    is_valid = isinstance(value, tuple | list) and not any(map(integer(1), value))
    return '' if is_valid and sorted(set(value)) == list(value) else 'a tuple of rising integers'


def tokens(value: Any) -> str:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 0 and value != 1
    return '' if fine else 'an integer of at least 2, of which one is predicted, or 0'


def segment(value: Any) -> str:
    is_valid = value == -1 or not integer(1)(value)
    return '' if is_valid and not isinstance(value, bool) else 'an integer of at least 1, or -1'


SCHEMA: dict[str, Rule] = {
    'task': choice(['lm']),
    'seeds': seeds,
    'tracker': tracking.known,
    'data.source': text,
    'data.path': text,
    'data.level': choice(data.LEVELS),
    'data.vocabulary': integer(2),
    'data.train_tokens': integer(0),
    'data.cache': text,
    'model.core': choice(ChainMap(CORES, cells.CELLS)),
    'model.embed': integer(1),
    'model.hidden': integer(1),
    'model.layers': integer(1),
    'model.ffn': integer(1),
    'model.impl': choice(get_args(cells.Impl)),
    'model.rounds': integer(0),
    'model.rank': integer(0),
    'model.capped': boolean,
    'model.heads': integer(1),
    'model.kv_heads': integer(0),
    'model.activation': choice(ACTIVATIONS),
    'model.positions': choice(['rotary', 'relative']),
    'model.memory': integer(0),
    'model.remat': boolean,
    'model.tied': boolean,
    'model.cutoffs': cutoffs,
    'model.divisor': integer(1),
    'model.dtype': choice(['float32', 'bfloat16']),
    'model.site': choice(SITES),
    'model.source': choice(SOURCES),
    'model.context': integer(1),
    'model.fusion.name': choice(fusion.FUSIONS),
    'model.fusion.rank': integer(1),
    'model.fusion.hidden': integer(1),
    **{f'dropout.{name}': RATE for name in Rates._fields if name != 'locked'},
    'dropout.locked': boolean,
    'loss.label_smoothing': number(0, 0.99),
    'loss.z_loss': number(0),
    'loss.chunk': integer(0),
    'match.by': choice(['none', 'parameters', 'flops']),
    'match.knob': choice(['hidden', 'rank']),
    'match.target': integer(0),
    'train.steps': integer(1, 2**31 - 1),
    'train.batch': integer(1),
    'train.length': integer(1),
    'train.accumulate': integer(1),
    'train.fsdp': integer(1),
    'train.mesh': mesh_shape,
    'train.matmul_precision': choice(PRECISIONS),
    'train.log_every': integer(1),
    'train.eval_every': integer(1),
    'train.save_every': integer(1),
    'train.keep': integer(1),
    'eval.batch': integer(1),
    'eval.length': segment,
    'eval.memory': integer(-1),
    'eval.stride': integer(0),
    'eval.valid_tokens': tokens,
    'eval.final_tokens': tokens,
    'dynamic.tokens': tokens,
    'dynamic.length': integer(1),
    'dynamic.learning_rate': number(0),
    'dynamic.decay': number(0),
    'dynamic.epsilon': number(0, exclusive=True),
    'dynamic.statistics': integer(1),
    'sample.prompt': text,
    'sample.texts': integer(1),
    'sample.tokens': integer(1),
    'sample.temperature': number(0),
    'sample.top_p': number(0, 1, exclusive=True),
    **optim.SCHEMA,
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot work, before anything is built.

    Raises:
      UserError: which key, what was expected, what to change.
    """
    check(config, SCHEMA)
    model, training = config.model, config.train
    optim.validate(config.optim, training.steps)
    if config.data.level == 'bpe' and config.data.vocabulary < 256:
        raise UserError(
            f'config.data.vocabulary = {config.data.vocabulary}: at the level bpe the 256 bytes '
            f'are in it; expected at least 256'
        )
    transformer = model.core == 'transformer'
    if model.core in CORES and model.source == 'state':
        raise UserError(
            f"config.model.source = 'state': config.model.core = {model.core!r} has no state of "
            f"one step; use 'recurrent' or 'summary'"
        )
    if model.site == 'attention' and not transformer:
        raise UserError(
            f"config.model.site = 'attention': config.model.core = {model.core!r} has none; use "
            f"'transformer'"
        )
    for key, heads in (('heads', model.heads), ('kv_heads', model.kv_heads or model.heads)):
        whole = model.hidden if key == 'heads' else model.heads
        if transformer and whole % heads:
            raise UserError(f'config.model.{key} = {heads}: expected a divisor of {whole}')
    if transformer and model.hidden // model.heads % 2:
        raise UserError(
            f'config.model.hidden / config.model.heads = {model.hidden // model.heads}: positions '
            f'turn pairs of features; make it even'
        )
    if model.fusion.name in fusion.ONE_HOT and model.source != 'domain':
        raise UserError(
            f'config.model.fusion.name = {model.fusion.name!r} takes one-hot contexts alone; it '
            f"needs config.model.source = 'domain'"
        )
    if model.impl == 'cudnn':
        fits = model.core == 'lstm' and model.dtype == 'float32' and not config.dropout.state
        if not fits or jax.default_backend() != 'gpu':
            raise UserError(
                "config.model.impl = 'cudnn': expected an NVIDIA GPU, config.model.core = 'lstm', "
                "config.model.dtype = 'float32' and config.dropout.state = 0; use 'xla'"
            )
    if model.cutoffs and (config.loss.label_smoothing or config.loss.z_loss):
        raise UserError(
            'config.model.cutoffs: an adaptive softmax has no whole distribution to smooth or to '
            'normalise; set config.loss.label_smoothing and config.loss.z_loss to 0'
        )
    if training.batch % training.accumulate:
        raise UserError(
            f'config.train.accumulate = {training.accumulate}: expected a divisor of '
            f'config.train.batch = {training.batch}'
        )
    if config.eval.memory >= 0 and not transformer:
        raise UserError(
            f'config.eval.memory = {config.eval.memory} is for Transformers; a recurrent state is '
            f'carried through the whole text: use -1'
        )
    length = reading(config).length
    if not 0 <= config.eval.stride <= length:
        raise UserError(
            f'config.eval.stride = {config.eval.stride}: expected at most {length}, the tokens of '
            f'a window. Try a longer config.eval.length'
        )
    if transformer:
        _refuse_unseen_positions(config)


def _refuse_unseen_positions(config: ml_collections.ConfigDict) -> None:
    """Refuse to evaluate a Transformer at distances between tokens that training does not have.

    With a memory, in training and in evaluation, its length is free: recurrence over segments is
    made for that.
    """
    trained_memory, length = config.model.memory, config.train.length
    memory = trained_memory if config.eval.memory < 0 else config.eval.memory
    if memory and not trained_memory and memory >= length:
        raise UserError(
            f'config.eval.memory = {memory}: expected at most {length - 1}, as training has '
            f'config.train.length = {length} positions and no memory. Try config.model.memory'
        )
    if memory:
        return
    seen = trained_memory + 1 if trained_memory else length
    lengths = {'eval.length': reading(config).length}
    if config.dynamic.tokens:
        lengths['dynamic.length'] = config.dynamic.length
    for key, value in lengths.items():
        if value > seen:
            raise UserError(
                f'config.{key} = {value}: expected at most {seen}, the positions that training '
                f'has for a Transformer that is evaluated without memory. Try '
                f'config.{key} = {seen}, or config.model.memory'
            )


def corpus(config: ml_collections.ConfigDict) -> data.Corpus:
    """The corpus of a config."""
    source = config.data
    corpus = data.load(
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


def reading(config: ml_collections.ConfigDict) -> Reading:
    """Return how a text is read: with `eval.length` −1, in segments as long as training allows."""
    length = config.eval.length
    if length < 0:
        is_bounded = config.model.core == 'transformer' and not config.model.memory
        length = config.train.length if is_bounded else SEGMENT
    return Reading(config.eval.batch, length, config.eval.stride)


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
    for module, own, shapes in cost.modules(model, 'fuse_.*', variables, *inputs):
        parameters += cost.parameters(own)
        x = shapes[0]
        per_token += cost.flops(module.apply, own, *shapes) / (x.shape[0] * x.shape[1])
    return {
        'parameters': {'model': cost.parameters(variables), 'fusion': round(parameters)},
        'flops_per_token': {
            'model': round(cost.flops(model.apply, variables, *inputs) / (T * B)),
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
        size = cost.nearest_size(lambda size: at(of_size(size)), target)
    except ValueError as error:
        raise UserError(f'config.match: {error}; give another config.match.target') from error
    return _changed(config, of_size(size))


def _changed(
    config: ml_collections.ConfigDict, changes: dict[str, Any]
) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config
