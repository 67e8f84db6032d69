"""Penn Treebank, word level (Mikolov's preprocessing): a regularised LSTM and the Mogrifier.

    python -m mi.main --config=configs/lm_ptb.py --config.data.path=DIR --workdir=runs/ptb
    python -m mi.main --config=configs/lm_ptb.py:mogrifier --config.data.path=DIR …
    python -m mi.main --config=configs/lm_ptb.py:smoke --workdir=runs/smoke

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt, 929,589 training tokens.

awd        after AWD-LSTM (Merity et al., 2018; test perplexity 57.3, 52.8 with a continuous cache):
           three layers, E = 400, dropout of words 0.1, of inputs 0.4, between layers 0.25, of
           outputs 0.4, segments of 70, batch 20. Where it drops recurrent weights (0.5) this drops
           the state (0.25); all layers are of one size; Adam instead of averaged SGD; no penalties
           on activations. So it is not AWD-LSTM, and its number is not to be expected.
mogrifier  Melis et al. (2020): two layers, 24 million parameters, 5 rounds of rank 84, capped input
           gates. Dropout and optimiser are ours, the paper tunes them by search.
smoke      a minute on a laptop, on Austen's words instead.

Nothing here was measured by us: the text may not be had without a licence.
"""

import ml_collections

from configs import lm
from mi.config import UserError, nearest

PRESETS = ('awd', 'mogrifier', 'smoke')


def get_config(arg: str = 'awd') -> ml_collections.ConfigDict:
    config = lm.get_config().unlock()
    config.data.source = 'ptb'
    config.data.level = 'token'
    config.model.site = 'none'
    config.model.embed = 400
    config.model.hidden = 1000
    config.model.layers = 3
    config.dropout.word = 0.1
    config.dropout.input = 0.4
    config.dropout.layer = 0.25
    config.dropout.state = 0.25
    config.dropout.output = 0.4
    config.dropout.locked = True
    config.train.batch = 20
    config.train.length = 70
    config.train.steps = 130_000  # 200 epochs
    config.train.log_every = 100
    config.train.eval_every = 2_000
    config.train.save_every = 2_000
    config.eval.batch = 10
    config.eval.length = 70
    config.optim.name = 'adamw'
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 1e-4
    config.optim.warmup_steps = 500
    config.optim.clip_norm = 0.25
    for word in lm.in_order(arg, ('smoke',)):
        if word == 'mogrifier':
            config.model.core = 'mogrifier'
            config.model.rounds = 5
            config.model.rank = 84
            config.model.layers = 2
            config.model.hidden = 1150
        elif word == 'smoke':
            _smoke(config)
        elif '=' in word:
            lm.apply(config, word)
        elif word != 'awd':
            raise UserError(f'configs/lm_ptb.py:{word}: {nearest(word, PRESETS)}')
    return config.lock()


def _smoke(config: ml_collections.ConfigDict) -> None:
    config.data.source = 'austen'
    config.data.level = 'word'
    config.data.vocabulary = 2_000
    config.model.layers = 2
    config.model.embed = config.model.hidden = 64
    config.model.rank = 8
    config.train.batch = 16
    config.train.length = 32
    config.train.steps = 60
    config.train.log_every = config.train.save_every = config.train.eval_every = 20
    config.eval.batch = 32
    config.eval.length = -1
    config.eval.valid_tokens = config.eval.final_tokens = 20_000
    config.optim.warmup_steps = -1
