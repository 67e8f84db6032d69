"""enwik8, bytes: the Mogrifier LSTM, and a Transformer with a memory.

    python -m mi.main --config=configs/lm_enwik8.py --config.data.path=FILE --workdir=runs/enwik8
    python -m mi.main --config=configs/lm_enwik8.py:transformer --config.data.path=FILE …
    python -m mi.main --config=configs/lm_enwik8.py:smoke --workdir=runs/smoke

FILE is enwik8, plain or packed: 90, 5 and 5 million bytes.

mogrifier_48m, mogrifier_96m  Melis et al. (2020): two layers, capped input gates, 5 rounds of rank
             61 (tuned for 96M parameters), segments of 70 bytes; test bits per byte 1.122 at 96M.
             The layer sizes are ours, with 45 and 88 million parameters; so are dropout, optimiser
             and batch, which the paper tunes by search.
transformer  12 layers of 512, 8 heads, feed-forward 2048, segment and memory of 512: the sizes of
             Transformer-XL's small enwik8 model (Dai et al., 2019; 1.06), with rotary positions,
             SwiGLU and RMSNorm; batch and optimiser ours.
smoke        a minute on a laptop, on the bytes of Austen instead, unless data.source says else.

Nothing here was measured by us: no machine of ours has trained it.
"""

import ml_collections

from configs import lm
from mi.config import UserError, nearest

PRESETS = ('mogrifier_48m', 'mogrifier_96m', 'transformer', 'smoke')


def get_config(arg: str = 'mogrifier_96m') -> ml_collections.ConfigDict:
    config = lm.get_config().unlock()
    config.data.source = 'enwik8'
    config.data.level = 'byte'
    config.model.site = 'none'
    config.eval.batch = 10
    config.eval.valid_tokens = 200_000
    config.train.log_every = 100
    config.train.eval_every = 4_000
    config.train.save_every = 4_000
    _mogrifier(config, 2560)
    for word in lm.in_order(arg, ('smoke',)):
        if word == 'mogrifier_48m':
            _mogrifier(config, 1800)
        elif word == 'transformer':
            _transformer(config)
        elif word == 'smoke':
            _smoke(config)
        elif '=' in word:
            lm.apply(config, word)
        elif word != 'mogrifier_96m':
            raise UserError(f'configs/lm_enwik8.py:{word}: {nearest(word, PRESETS)}')
    return config.lock()


def _mogrifier(config: ml_collections.ConfigDict, hidden: int) -> None:
    config.model.core = 'mogrifier'
    config.model.rounds = 5
    config.model.rank = 61
    config.model.capped = True
    config.model.layers = 2
    config.model.embed = 512
    config.model.hidden = hidden
    config.dropout.input = config.dropout.layer = config.dropout.output = 0.15
    config.dropout.state = 0.15
    config.dropout.locked = True
    config.train.batch = 128
    config.train.length = 70
    config.train.steps = 400_000
    config.eval.length = 70
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 1_000
    config.optim.b1 = 0.0  # Melis et al. tune Adam without a first moment
    config.optim.clip_norm = 10.0
    config.loss.z_loss = 0.0


def _transformer(config: ml_collections.ConfigDict) -> None:
    config.model.core = 'transformer'
    config.model.layers = 12
    config.model.embed = config.model.hidden = 512
    config.model.heads = 8
    config.model.ffn = 1408  # SwiGLU has three products: about the parameters of 2048 with two
    config.model.memory = 512
    config.model.dtype = 'bfloat16'
    for name in ('input', 'layer', 'output'):
        config.dropout[name] = 0.1
    config.dropout.state = 0.0
    config.dropout.locked = False
    config.train.batch = 24
    config.train.length = 512
    config.train.steps = 400_000
    config.eval.length = 512
    config.eval.memory = 2048
    config.optim.learning_rate = 2.5e-4
    config.optim.warmup_steps = 4_000
    config.optim.b1 = 0.9
    config.optim.clip_norm = 0.25


def _smoke(config: ml_collections.ConfigDict) -> None:
    config.data.source = 'austen'
    config.model.layers = min(2, config.model.layers)
    config.model.embed = config.model.hidden = 64
    config.model.ffn = 128
    config.model.rank = 8
    config.model.memory = min(64, config.model.memory)
    config.train.batch = 16
    config.train.length = 32
    config.train.steps = 60
    config.train.log_every = config.train.save_every = config.train.eval_every = 20
    config.eval.memory = min(64, config.eval.memory)
    config.eval.length = -1
    config.eval.batch = 64
    config.eval.valid_tokens = config.eval.final_tokens = 50_000
    config.optim.warmup_steps = -1
