"""Language models: an LSTM with one place where the token stream meets a context.

Source: the question is that of Jayakumar et al. (ICLR 2020), section on language modelling; every
size here is ours, chosen for a laptop, and none is the paper's.

    python -m mi.main --config=configs/lm.py --workdir=runs/lm
    python -m mi.main --config=configs/lm.py:quickstart,fusion=concat --workdir=runs/concat
    python -m mi.main --config=configs/lm.py --config.optim.learning_rate=5e-4 --workdir=runs/slow

The argument after the colon: a preset (quickstart, tiny), and `fusion=WORD`, `site=WORD`.
"""

import ml_collections

from mi import optim
from mi.config import UserError, nearest

PRESETS = ('default', 'quickstart', 'tiny')


def get_config(arg: str = 'default') -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = 'lm'
    config.seeds = (0,)  # all trained at once, logged apart

    config.data = data = ml_collections.ConfigDict()
    data.source = 'austen'  # or a text file, or a directory with train, valid and test files
    data.level = 'byte'  # byte, bpe, word, token
    data.vocabulary = 10_000  # at most; bpe, word and token
    data.cache = ''  # directory for token files; '' is $MI_CACHE or ~/.cache/mi

    config.model = model = ml_collections.ConfigDict()
    model.embed = 128  # E
    model.hidden = 512  # H
    model.layers = 1
    model.tied = True
    model.dropout = 0.1
    model.dtype = 'float32'  # of the products: float32, bfloat16

    model.site = 'encoder'  # encoder, decoder, both, none
    model.source = 'recurrent'  # the context: recurrent (an LSTM of its own), state (the core's)
    model.context = 32  # m
    model.fusion = fusion = ml_collections.ConfigDict()
    fusion.name = 'mi'  # a word of mi.fusion.FUSIONS
    fusion.rank = 32  # of the words that have one: mi_low_rank, mi_tucker, mlb, …
    fusion.hidden = 128  # of those that have a hidden layer: concat_mlp, hypernetwork, …

    # Gives every arm of a comparison the same cost, by changing one size of the model.
    config.match = match = ml_collections.ConfigDict()
    match.by = 'none'  # none, parameters, flops (forward, per token)
    match.knob = 'hidden'  # the size that is changed: hidden (H), rank
    match.target = 0  # the cost to reach; 0 for that of this config with fusion concat

    config.train = train = ml_collections.ConfigDict()
    train.steps = 5_000
    train.batch = 32  # B: streams read in parallel, a seed
    train.length = 64  # T: tokens a stream and step; gradients stop there, the state goes on
    train.log_every = 50
    train.eval_every = 500  # on the validation text
    train.save_every = 500
    train.keep = 2  # checkpoints

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.batch = 32
    evaluation.length = 256
    evaluation.valid_tokens = 0  # of the validation text on the way; 0 for all. All at the end

    config.optim = optim.get_config()
    config.optim.learning_rate = 2e-3

    for word in arg.split(','):
        _apply(config, word)
    return config.lock()


def _apply(config: ml_collections.ConfigDict, word: str) -> None:
    key, equals, value = word.partition('=')
    if equals and key == 'fusion':
        config.model.fusion.name = value
    elif equals and key == 'site':
        config.model.site = value
    elif word == 'quickstart':  # minutes on two cores
        config.seeds = (0, 1, 2)
        config.data.level = 'bpe'
        config.data.vocabulary = 1024
        config.model.embed = 64
        config.model.hidden = 256
        config.model.dropout = 0.0
        config.model.fusion.hidden = 64
        config.match.by = 'parameters'
        config.train.steps = 400
        config.train.log_every = 20
        config.train.eval_every = 50
        config.train.save_every = 100
        config.eval.batch = 64
        config.eval.valid_tokens = 30_000
        config.optim.learning_rate = 4e-3
    elif word == 'tiny':  # seconds, for tests
        config.model.embed = 16
        config.model.hidden = 32
        config.model.context = 8
        config.model.fusion.rank = 4
        config.model.fusion.hidden = 16
        config.train.steps = 20
        config.train.batch = 4
        config.train.length = 16
        config.train.log_every = 5
        config.train.eval_every = 10
        config.train.save_every = 5
        config.optim.warmup_steps = 5
        config.eval.batch = 128
        config.eval.valid_tokens = 5_000
    elif word != 'default':
        raise UserError(
            f'configs/lm.py:{word}: neither fusion=… nor site=… nor a preset; '
            f'{nearest(word, PRESETS)}'
        )
