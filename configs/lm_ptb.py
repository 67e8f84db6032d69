"""Penn Treebank at the word level (Mikolov's preprocessing): a regularized LSTM and the Mogrifier.

    python -m mi.main --config=configs/lm_ptb.py --config.data.path=DIR --workdir=runs/ptb
    python -m mi.main --config=configs/lm_ptb.py:mogrifier --config.data.path=DIR …
    python -m mi.main --config=configs/lm_ptb.py:smoke --workdir=runs/smoke

DIR contains ptb.train.txt, ptb.valid.txt and ptb.test.txt, with 929,589 training tokens.

awd        based on AWD-LSTM (Merity et al., 2018; test perplexity 57.3, and 52.8 with a continuous
           cache): three layers, E = 400, dropout of words 0.1, of inputs 0.4, between layers 0.25
           and of outputs 0.4, segments of 70, batch 20. Unlike AWD-LSTM, it drops the state (0.25)
           instead of recurrent weights (0.5), has layers of equal size, uses Adam instead of
           averaged SGD, and does not penalize activations. So do not expect AWD-LSTM's perplexity.
mogrifier  Melis et al. (2020): two layers, 24 million parameters, 5 rounds of rank 84, capped input
           gates. Dropout and optimizer are ours; the paper tunes them by search.
smoke      a minute on a laptop, on Austen's words.

We have not trained these models, because the text requires a license.
"""

import ml_collections

from configs import arguments, lm

PRESETS: dict[str, arguments.Settings] = {
    'awd': {
        'model.core': 'lstm',
        'model.hidden': 1000,
        'model.layers': 3,
    },
    'mogrifier': {
        'model.core': 'mogrifier',
        'model.rounds': 5,
        'model.rank': 84,
        'model.layers': 2,
        'model.hidden': 1150,
    },
    'smoke': {},  # overrides the rest: SMOKE
}
SMOKE: arguments.Settings = {
    **lm.SMOKE,
    'data.level': 'word',
    'data.vocabulary': 2_000,
    'model.layers': 2,
    'model.embed': 64,
    'model.hidden': 64,
    'model.rank': 8,
    'eval.batch': 32,
    'eval.valid_tokens': 20_000,
    'eval.final_tokens': 20_000,
}


def get_config(arg: str = 'awd') -> ml_collections.ConfigDict:
    argument = arguments.parse('configs/lm_ptb.py', arg, PRESETS, lm.KEYS)
    # The settings of both models.
    config = lm.get_config().unlock()
    config.data.source = 'ptb'
    config.data.level = 'token'
    config.model.site = 'none'
    config.model.embed = 400
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

    # Their own settings: those of `awd`, overridden by what the argument names.
    config.update_from_flattened_dict(PRESETS['awd'])
    lm.apply_argument(config, argument, PRESETS)
    if 'smoke' in argument.presets:
        config.update_from_flattened_dict(SMOKE)
    return config.lock()
