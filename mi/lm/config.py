"""Validation of language-model configs: a rule for each key, and checks across keys."""

from collections import ChainMap
from collections.abc import Callable
from typing import get_args

import jax
import ml_collections
from flax import linen as nn

from mi import cells, fusion
from mi.config import (
    RUN_SCHEMA,
    Rule,
    UserError,
    any_value,
    check,
    choice,
    integer,
    mesh_shape,
    number,
)
from mi.lm.context import SOURCES
from mi.lm.data import tokenizers
from mi.lm.dropout import Rates
from mi.lm.evaluate import Reading
from mi.lm.feed_forward import ACTIVATIONS
from mi.lm.model import SITES
from mi.lm.transformer import Transformer
from mi.precision import PRECISIONS
from mi.registry import Registry
from mi.training import optim, trackers

CORES: Registry[Callable[..., nn.Module]] = Registry(transformer=Transformer)
CORES.refuse = lambda core: 'it is a cell' if cells.is_cell(core) else ''
"""Name → module of a core that is not a stack of recurrent cells, called like Transformer.

Every name in `mi.cells.CELLS` is also a core. A config file may add to both registries.
"""

BASELINES: dict[str, dict[str, str]] = {
    'concat': {'model.fusion.name': 'concat'},
    'plain': {'model.site': 'none'},
}
"""`match.baseline` → config changes that select the model whose cost is the target."""

RATE = number(0, 0.99)
SEGMENT = 256  # tokens of a segment in evaluation, if state or a memory is carried


def check_cutoffs(value: object) -> str:
    """Return a description of valid `model.cutoffs`, or '' if the value is valid."""
    is_valid = (
        isinstance(value, tuple | list)
        and not any(map(integer(1), value))
        and sorted(set(value)) == list(value)
    )
    return '' if is_valid else 'a tuple of increasing integers of at least 1'


def check_token_count(value: object) -> str:
    """Return a description of valid token counts, or '' if the value is valid.

    One token is too few, because evaluation does not predict the first token.
    """
    is_valid = not integer(0)(value) and value != 1
    return '' if is_valid else 'an integer of at least 2, or 0'


def check_segment(value: object) -> str:
    """Return a description of valid values of `eval.length`, or '' if the value is valid."""
    is_valid = value == -1 or not integer(1)(value)
    return '' if is_valid else 'an integer of at least 1, or -1'


SCHEMA: dict[str, Rule] = {
    'task': choice(['lm']),
    **RUN_SCHEMA,
    'tracker': trackers.check_tracker,
    'data.source': str,
    'data.path': str,
    'data.level': choice(tokenizers.LEVELS),
    'data.vocabulary': integer(2),
    'data.tokenizer': str,
    'data.train_tokens': integer(0),
    'data.cache': str,
    'model.core': choice(ChainMap(CORES, cells.CELLS)),
    'model.embed': integer(1),
    'model.hidden': integer(1),
    'model.layers': integer(1),
    'model.ffn': integer(1),
    'model.impl': choice(get_args(cells.Impl)),
    'model.rounds': integer(0),
    'model.rank': integer(0),
    'model.capped': bool,
    'model.core_options.*': any_value,  # `factory` checks them against the core's fields
    'model.heads': integer(1),
    'model.kv_heads': integer(0),
    'model.activation': choice(ACTIVATIONS),
    'model.positions': choice(['rotary', 'relative']),
    'model.memory': integer(0),
    'model.remat': bool,
    'model.tied': bool,
    'model.cutoffs': check_cutoffs,
    'model.divisor': integer(1),
    'model.dtype': choice(['float32', 'bfloat16']),
    'model.site': choice(SITES),
    'model.source': choice(SOURCES),
    'model.context': integer(1),
    'model.fusion.name': choice(fusion.FUSIONS),
    'model.fusion.options.*': any_value,  # `fusion.get` checks them against the fields
    'model.fusion.rank': integer(1),
    'model.fusion.hidden': integer(1),
    **{f'dropout.{name}': RATE for name in Rates._fields if name != 'locked'},
    'dropout.locked': bool,
    'loss.label_smoothing': number(0, 0.99),
    'loss.z_loss': number(0),
    'loss.chunk': integer(0),
    'match.by': choice(['none', 'parameters', 'flops']),
    'match.knob': choice(['hidden', 'rank']),
    'match.baseline': choice(BASELINES),
    'match.target': integer(0),
    'train.steps': integer(1, 2**31 - 1),
    'train.length': integer(1),
    'train.accumulate': integer(1),
    'train.fsdp': integer(1),
    'train.mesh': mesh_shape,
    'train.matmul_precision': choice(PRECISIONS),
    'eval.batch': integer(1),
    'eval.length': check_segment,
    'eval.memory': integer(-1),
    'eval.stride': integer(0),
    'eval.valid_tokens': check_token_count,
    'eval.final_tokens': check_token_count,
    'dynamic.tokens': check_token_count,
    'dynamic.length': integer(1),
    'dynamic.learning_rate': number(0),
    'dynamic.decay': number(0),
    'dynamic.epsilon': number(0, exclusive=True),
    'dynamic.statistics': integer(1),
    'sample.prompt': str,
    'sample.texts': integer(1),
    'sample.tokens': integer(1),
    'sample.temperature': number(0),
    'sample.top_p': number(0, 1, exclusive=True),
    **optim.SCHEMA,
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Validate a config.

    Raises:
      UserError: if a value is invalid or contradicts another value.
    """
    check(config, SCHEMA)
    optim.validate(config.optim, config.train.steps)
    if config.data.level == 'bpe' and config.data.vocabulary < 256:
        raise UserError(
            f'config.data.vocabulary = {config.data.vocabulary}: expected at least 256, because '
            f"config.data.level = 'bpe' always includes the 256 byte tokens"
        )
    _check_tokenizer(config)
    _check_model(config)
    _check_training(config)
    _check_evaluation(config)


def _check_tokenizer(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if `data.level` and `data.tokenizer` contradict each other."""
    level, file = config.data.level, config.data.tokenizer
    if level == 'file' and not file:
        raise UserError(
            "config.data.tokenizer = '': expected the path of a tokenizer.json, because "
            "config.data.level = 'file'. Try config.data.level = 'bpe', which trains a tokenizer"
        )
    if file and level != 'file':
        raise UserError(
            f"config.data.level = {level!r}: expected 'file', because config.data.tokenizer = "
            f'{file!r} is set. Try --config.data.level=file'
        )


def _check_model(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if options of the model contradict each other."""
    # Sites and sources that the core does not have.
    model = config.model
    is_transformer = model.core == 'transformer'
    if model.core in CORES and model.source == 'state':
        raise UserError(
            f"config.model.source = 'state': expected a core with a recurrent state, but "
            f"config.model.core = {model.core!r} has none. Try config.model.source = 'recurrent' "
            f"or 'summary'"
        )
    if model.site == 'attention' and not is_transformer:
        raise UserError(
            f"config.model.site = 'attention': expected a core with attention, but "
            f"config.model.core = {model.core!r} has none. Try config.model.core = 'transformer'"
        )
    if model.fusion.name in fusion.ONE_HOT and model.source != 'domain':
        raise UserError(
            f'config.model.fusion.name = {model.fusion.name!r}: expected one-hot contexts, '
            f"which this fusion needs. Try config.model.source = 'domain'"
        )

    # Sizes of a Transformer.
    head_counts = {'heads': model.heads, 'kv_heads': model.kv_heads or model.heads}
    for key, num_heads in head_counts.items():
        dividend_key = 'hidden' if key == 'heads' else 'heads'
        dividend = model[dividend_key]
        if is_transformer and dividend % num_heads:
            raise UserError(
                f'config.model.{key} = {num_heads}: expected a divisor of '
                f'config.model.{dividend_key} = {dividend}'
            )
    if is_transformer and model.hidden // model.heads % 2:
        raise UserError(
            f'config.model.hidden / config.model.heads = {model.hidden // model.heads}: expected '
            f'an even number, because position embeddings need an even head dimension'
        )

    # Implementations and losses.
    if model.impl == 'cudnn':
        fits = model.core == 'lstm' and model.dtype == 'float32' and not config.dropout.state
        if not fits or jax.default_backend() != 'gpu':
            raise UserError(
                "config.model.impl = 'cudnn': expected an NVIDIA GPU, config.model.core = 'lstm', "
                "config.model.dtype = 'float32' and config.dropout.state = 0. Try "
                "config.model.impl = 'xla'"
            )
    if model.cutoffs and (config.loss.label_smoothing or config.loss.z_loss):
        raise UserError(
            f'config.model.cutoffs = {tuple(model.cutoffs)}: expected () with label smoothing or a '
            f'z-loss, because an adaptive softmax does not compute the full distribution. Try '
            f'config.loss.label_smoothing = 0 and config.loss.z_loss = 0'
        )


def _check_training(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if `train.accumulate` does not divide the batch size."""
    training = config.train
    if training.batch % training.accumulate:
        raise UserError(
            f'config.train.accumulate = {training.accumulate}: expected a divisor of '
            f'config.train.batch = {training.batch}'
        )


def _check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if `eval` or `dynamic` sets a protocol that the model cannot follow."""
    is_transformer = config.model.core == 'transformer'
    if config.eval.memory >= 0 and not is_transformer:
        raise UserError(
            f'config.eval.memory = {config.eval.memory}: expected -1 for '
            f'config.model.core = {config.model.core!r}, because the key only applies to a '
            f'Transformer'
        )
    length = get_reading(config).length
    if not 0 <= config.eval.stride <= length:
        raise UserError(
            f'config.eval.stride = {config.eval.stride}: expected at most {length}, the length of '
            f'a window. Try a larger config.eval.length'
        )
    if is_transformer:
        _refuse_unseen_positions(config)


def _refuse_unseen_positions(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if evaluation would use distances between tokens never seen in training.

    If both training and evaluation use a memory, it may have any length: segment recurrence is
    designed for that.
    """
    trained_memory, length = config.model.memory, config.train.length
    memory = trained_memory if config.eval.memory < 0 else config.eval.memory
    if memory and not trained_memory and memory >= length:
        raise UserError(
            f'config.eval.memory = {memory}: expected at most {length - 1}, because the model was '
            f'trained on config.train.length = {length} positions without memory. Try a smaller '
            f'memory, or train with config.model.memory > 0'
        )
    if memory:
        return
    max_length = trained_memory + 1 if trained_memory else length
    lengths = {'eval.length': get_reading(config).length}
    if config.dynamic.tokens:
        lengths['dynamic.length'] = config.dynamic.length
    for key, num_tokens in lengths.items():
        if num_tokens > max_length:
            raise UserError(
                f'config.{key} = {num_tokens}: expected at most {max_length}, the number of '
                f'positions in training, because the Transformer is evaluated without memory. Try '
                f'config.{key} = {max_length}, or train with config.model.memory > 0'
            )


def get_reading(config: ml_collections.ConfigDict) -> Reading:
    """Return the evaluation protocol that `config.eval` sets.

    `eval.length` = −1 means the training length for a Transformer without memory, and SEGMENT
    otherwise.
    """
    length = config.eval.length
    if length < 0:
        is_bounded = config.model.core == 'transformer' and not config.model.memory
        length = config.train.length if is_bounded else SEGMENT
    return Reading(config.eval.batch, length, config.eval.stride)
