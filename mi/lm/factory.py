"""Constructors of the corpus, the model and the trainer from a config."""

import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from mi import cells, counting, fusion
from mi.config import UserError, has_parameter, name_config_keys
from mi.lm.adaptive_softmax import AdaptiveWords
from mi.lm.config import BASELINES, CORES
from mi.lm.data import token_store
from mi.lm.data.corpus import Corpus
from mi.lm.dropout import Rates
from mi.lm.embeddings import Words
from mi.lm.loss import Objective
from mi.lm.model import LanguageModel
from mi.lm.recurrent import Recurrent
from mi.lm.trainer import Trainer
from mi.options import Options, check_options, get_field_defaults, get_options
from mi.training import optim

DATA_KEYS = {
    name: f'config.data.{name}' for name in ('source', 'path', 'cache', 'train_tokens', 'tokenizer')
}
"""Argument of `token_store.load` → its config key."""
CELL_KEYS = {name: f'config.model.{name}' for name in ('impl', 'rounds', 'rank', 'capped')}
"""Field of a cell → its config key."""
CORE_KEYS = {
    name: f'config.model.{name}'
    for name in ('layers', 'heads', 'kv_heads', 'activation', 'positions', 'memory', 'remat')
} | {'hidden': 'config.model.ffn'}
"""Field of a core in CORES → its config key."""
INTERNAL_FIELDS = ('site', 'fusion', 'context', 'rates', 'decode')
"""Fields of a core in CORES that `LanguageModel` sets."""


def load_corpus(config: ml_collections.ConfigDict) -> Corpus:
    """Load the corpus that a config names.

    Raises:
      UserError: if the corpus cannot be read, or if it lacks the domains that the model needs.
    """
    data = config.data
    with name_config_keys(DATA_KEYS):
        corpus = token_store.load(
            token_store.Recipe(data.source, data.level, data.vocabulary, tokenizer=data.tokenizer),
            data.cache,
            path=data.path,
            train_tokens=data.train_tokens,
        )
    if config.model.source == 'domain' and not corpus.domains:
        raise UserError(
            f"config.model.source = 'domain': expected a corpus with domains, but "
            f'config.data.source = {data.source!r} has none. Try config.data.source = '
            f"'austen-domains' or 'domains'"
        )
    return corpus


def build_model(
    config: ml_collections.ConfigDict, vocabulary: int, num_domains: int = 0
) -> LanguageModel:
    """Build the model that a config describes.

    Args:
      config: config of a run.
      vocabulary: number of token ids.
      num_domains: number of domains, for `model.source` = 'domain'.

    Raises:
      UserError: if a cutoff of the adaptive softmax is not below the vocabulary.
    """
    # The context, which a model without fusion does not have.
    model_config, fusion_config = config.model, config.model.fusion
    uses_domains = model_config.source == 'domain'
    fusion_options = {'context': 'one_hot'} if uses_domains and fusion_config.name != 'none' else {}
    context = num_domains if uses_domains else model_config.context
    with name_config_keys({'options': 'config.model.fusion.options'}):
        make_fusion = fusion.get(
            fusion_config.name,
            get_options(fusion_config, 'options'),
            rank=fusion_config.rank,
            hidden=fusion_config.hidden,
        )

    # The model, with constructors of its parts.
    return LanguageModel(
        words=functools.partial(
            _get_words(config, vocabulary),
            vocabulary=vocabulary,
            features=model_config.embed,
            tied=model_config.tied,
        ),
        core=functools.partial(
            _get_core(model_config),
            features=model_config.hidden,
            layers=model_config.layers,
            hidden=model_config.ffn,
        ),
        site=model_config.site,
        source=model_config.source,
        context=0 if fusion_config.name == 'none' else context,
        fusion=functools.partial(make_fusion, **fusion_options),
        rates=Rates(**config.dropout),
        dtype=jnp.dtype(model_config.dtype),
    )


def _get_words(
    config: ml_collections.ConfigDict, vocabulary: int
) -> Callable[..., Words | AdaptiveWords]:
    """Return a constructor of the embedding and the softmax."""
    objective, cutoffs = Objective(**config.loss), tuple(config.model.cutoffs)
    if not cutoffs:
        return functools.partial(Words, objective=objective)
    if cutoffs[-1] >= vocabulary:
        raise UserError(
            f'config.model.cutoffs = {cutoffs}: expected integers below {vocabulary}, the '
            f'vocabulary size'
        )
    return functools.partial(
        AdaptiveWords, cutoffs=cutoffs, divisor=config.model.divisor, chunk=objective.chunk
    )


def _get_core(model: ml_collections.ConfigDict) -> Callable[..., nn.Module]:
    """Return a constructor of the core, with the options that are fields of the core."""
    core_options = _get_core_options(model)
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
        known_options = {k: v for k, v in options.items() if has_parameter(module, k)}
        return functools.partial(module, **known_options, **core_options)
    options = {'rounds': model.rounds, 'rank': model.rank or None, 'capped': model.capped}
    cell = cells.get(model.core, impl=model.impl, **options, **core_options)
    return functools.partial(Recurrent, cell=cell)


def _get_core_options(model: ml_collections.ConfigDict) -> Options:
    """Return the options of the core, which are the fields that no other config key sets.

    Raises:
      UserError: if the core does not have an option, or if another config key sets it.
    """
    options = get_options(model, 'core_options')
    is_cell = model.core not in CORES
    config_keys = CELL_KEYS if is_cell else CORE_KEYS
    for name in options.keys() & config_keys.keys():
        raise UserError(
            f'config.model.core_options.{name} = {options[name]!r}: expected a field without a '
            f'config key of its own. Try {config_keys[name]} = {options[name]!r}'
        )
    reserved = {*config_keys, *(() if is_cell else INTERNAL_FIELDS)}
    defaults = get_field_defaults(ChainMap(CORES, cells.CELLS)[model.core])
    defaults = {name: value for name, value in defaults.items() if name not in reserved}
    with name_config_keys({'options': 'config.model.core_options'}):
        check_options(model.core, options, defaults)
    return options


def build_trainer(
    config: ml_collections.ConfigDict, vocabulary: int, num_domains: int = 0
) -> Trainer:
    """Build the trainer that a config describes, including its model and its optimizer."""
    return Trainer(
        model=build_model(config, vocabulary, num_domains),
        optimizer=optim.make_optimizer(config.optim, config.train.steps),
        batch_size=config.train.batch,
        accumulation=config.train.accumulate,
    )


def configure_evaluation(model: LanguageModel, config: ml_collections.ConfigDict) -> LanguageModel:
    """Return the model with the memory size that `config.eval.memory` sets."""
    if config.model.core != 'transformer' or config.eval.memory < 0:
        return model
    return model.clone(core=functools.partial(model.core, memory=config.eval.memory))


def configure_sampling(model: LanguageModel, config: ml_collections.ConfigDict) -> LanguageModel:
    """Return the model with an attention window as long as in training, for texts of any length."""
    if config.model.core != 'transformer' or config.model.memory:
        return model
    memory = max(1, config.train.length - 1)
    return model.clone(core=functools.partial(model.core, memory=memory))


def compute_costs(
    config: ml_collections.ConfigDict, vocabulary: int, num_domains: int = 0
) -> dict[str, dict[str, int]]:
    """Count parameters and forward FLOPs per token, for the model and for its fusions.

    FLOPs count only matrix products. For an adaptive softmax they include every tail for every
    token, whereas a step skips the blocks without a token in the tail.
    """
    model, variables, inputs = _make_shapes(config, vocabulary, num_domains)

    # The fusions alone; one inside a loop over time runs once for each token.
    fusion_params = fusion_flops = 0.0
    for module, fusion_variables, shapes in counting.modules(model, 'fuse_.*', variables, *inputs):
        fusion_params += counting.parameters(fusion_variables)
        flops = counting.flops(module.apply, fusion_variables, *shapes)
        num_tokens = shapes[0].shape[0] * shapes[0].shape[1]
        fusion_flops += flops / num_tokens

    # The whole model.
    model_flops = counting.flops(model.apply, variables, *inputs)
    return {
        'parameters': {
            'model': counting.parameters(variables),
            'fusion': round(fusion_params),
        },
        'flops_per_token': {
            'model': round(model_flops / (config.train.length * config.train.batch)),
            'fusion': round(fusion_flops),
        },
    }


def _make_shapes(
    config: ml_collections.ConfigDict, vocabulary: int, num_domains: int
) -> tuple[LanguageModel, Any, tuple[Any, ...]]:
    """Return the model, and the shapes of its variables and of the inputs of a call."""
    # XLA's LSTM in place of cuDNN's, whose FLOPs cannot be counted.
    model = build_model(_override(config, {'model.impl': 'xla'}), vocabulary, num_domains)
    num_steps, batch_size = config.train.length, config.train.batch
    tokens = jax.ShapeDtypeStruct((num_steps, batch_size), jnp.int32)
    carry = jax.eval_shape(lambda: model.initial_carry(batch_size))
    inputs = carry, tokens, None, tokens if model.source == 'domain' else None
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return model, variables, inputs


def match_size(
    config: ml_collections.ConfigDict, vocabulary: int, num_domains: int = 0
) -> ml_collections.ConfigDict:
    """Return the config with the size `match.knob` whose cost `match.by` is nearest to a target.

    The target is `match.target`, or the cost of the baseline `match.baseline`: the same config with
    the fusion 'concat', or without a fusion ('plain'). The hidden size of a Transformer increases
    in steps of 2 · heads, and its feed-forward layers grow in proportion.

    Raises:
      UserError: if the fusion does not have this size, or if every size costs more than the target.
    """
    # Check that the size exists.
    if config.match.by == 'none':
        return config
    if config.match.knob == 'rank' and 'rank' not in fusion.get_options(config.model.fusion.name):
        raise UserError(
            f"config.match.knob = 'rank': expected a fusion with a rank, but "
            f'config.model.fusion.name = {config.model.fusion.name!r} has none. Try '
            f"config.match.knob = 'hidden'"
        )

    # The cost of the config with changes, in parameters or in FLOPs per token.
    def compute_cost(changes: Mapping[str, object]) -> int:
        resized = _override(config, changes)
        if 'model.fusion.name' in changes:  # the options are those of the config's own fusion
            with resized.unlocked():
                resized.model.fusion.options = ml_collections.ConfigDict()
        model, variables, inputs = _make_shapes(resized, vocabulary, num_domains)
        if config.match.by == 'parameters':
            return counting.parameters(variables)
        num_tokens = config.train.length * config.train.batch
        return round(counting.flops(model.apply, variables, *inputs) / num_tokens)

    # Search for the size.
    target = config.match.target or compute_cost(BASELINES[config.match.baseline])
    try:
        matched_size = counting.nearest_size(
            lambda size: compute_cost(_resize(config, size)), target, guess=_get_size(config)
        )
    except ValueError as error:
        raise UserError(f'config.match: {error}. Try another config.match.target') from error
    return _override(config, _resize(config, matched_size))


def _get_size(config: ml_collections.ConfigDict) -> int:
    """Return the size that the config has, in the units of `_resize`."""
    model = config.model
    if config.match.knob == 'rank':
        return max(1, model.fusion.rank)
    return model.hidden // (2 * model.heads) if model.core == 'transformer' else model.hidden


def _resize(config: ml_collections.ConfigDict, size: int) -> dict[str, int]:
    """Return the config changes that set the matched size, see `match_size`."""
    model = config.model
    if config.match.knob == 'rank':
        return {'model.fusion.rank': size}
    if model.core != 'transformer':
        return {'model.hidden': size}
    hidden = 2 * model.heads * size
    return {'model.hidden': hidden, 'model.ffn': max(1, round(hidden * model.ffn / model.hidden))}


def _override(
    config: ml_collections.ConfigDict, changes: Mapping[str, object]
) -> ml_collections.ConfigDict:
    """Return a copy of a config with some values changed."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config
