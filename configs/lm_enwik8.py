"""enwik8 at the byte level: the Mogrifier LSTM, and a Transformer with a memory.

    python -m mi.main --config=configs/lm_enwik8.py --config.data.path=FILE --workdir=runs/enwik8
    python -m mi.main --config=configs/lm_enwik8.py:transformer --config.data.path=FILE …
    python -m mi.main --config=configs/lm_enwik8.py:smoke --workdir=runs/smoke

FILE is enwik8, plain or compressed, which is split into 90, 5 and 5 million bytes.

mogrifier_48m, mogrifier_96m  Melis et al. (2020): two layers, capped input gates, 5 rounds of rank
             61 (tuned for 96M parameters), segments of 70 bytes; test bits per byte 1.122 at 96M.
             Layer sizes (45 and 88 million parameters), dropout, optimizer and batch are ours; the
             paper tunes the latter three by search.
transformer  12 layers of 512, 8 heads, feed-forward 2048, segment and memory of 512: the sizes of
             Transformer-XL's small enwik8 model (Dai et al., 2019; 1.06), with rotary positions,
             SwiGLU and RMSNorm. Batch and optimizer are ours.
smoke        a minute on a laptop, on Austen's bytes unless config.data.source is set.

We have not trained these models.
"""

import ml_collections

from configs import arguments, lm

MOGRIFIER: arguments.Settings = {
    'model.core': 'mogrifier',
    'model.rounds': 5,
    'model.rank': 61,
    'model.capped': True,
    'model.layers': 2,
    'model.embed': 512,
    'model.hidden': 2560,
    'dropout.input': 0.15,
    'dropout.layer': 0.15,
    'dropout.output': 0.15,
    'dropout.state': 0.15,
    'dropout.locked': True,
    'train.batch': 128,
    'train.length': 70,
    'train.steps': 400_000,
    'eval.length': 70,
    'optim.learning_rate': 1e-3,
    'optim.warmup_steps': 1_000,
    'optim.b1': 0.0,  # Melis et al. tune Adam without a first moment
    'optim.clip_norm': 10.0,
    'loss.z_loss': 0.0,
}
PRESETS: dict[str, arguments.Settings] = {
    'mogrifier_48m': MOGRIFIER | {'model.hidden': 1800},
    'mogrifier_96m': MOGRIFIER,
    'transformer': {
        'model.core': 'transformer',
        'model.layers': 12,
        'model.embed': 512,
        'model.hidden': 512,
        'model.heads': 8,
        'model.ffn': 1408,  # SwiGLU has three products: about the parameters of 2048 with two
        'model.memory': 512,
        'model.dtype': 'bfloat16',
        'dropout.input': 0.1,
        'dropout.layer': 0.1,
        'dropout.output': 0.1,
        'dropout.state': 0.0,
        'dropout.locked': False,
        'train.batch': 24,
        'train.length': 512,
        'train.steps': 400_000,
        'eval.length': 512,
        'eval.memory': 2048,
        'optim.learning_rate': 2.5e-4,
        'optim.warmup_steps': 4_000,
        'optim.b1': 0.9,
        'optim.clip_norm': 0.25,
    },
    'smoke': {},  # depends on the rest: _shrink
}


def get_config(arg: str = 'mogrifier_96m') -> ml_collections.ConfigDict:
    argument = arguments.parse('configs/lm_enwik8.py', arg, PRESETS, lm.KEYS)
    config = lm.get_config().unlock()
    config.data.source = 'enwik8'
    config.data.level = 'byte'
    config.model.site = 'none'
    config.eval.batch = 10
    config.eval.valid_tokens = 200_000
    config.train.log_every = 100
    config.train.eval_every = 4_000
    config.train.save_every = 4_000
    config.update_from_flattened_dict(MOGRIFIER)
    lm.apply_argument(config, argument, PRESETS)
    if 'smoke' in argument.presets:
        _shrink(config)
    return config.lock()


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Set sizes for a run of a minute, for any model."""
    config.update_from_flattened_dict(lm.SMOKE)
    config.model.layers = min(2, config.model.layers)
    config.model.embed = config.model.hidden = 64
    config.model.ffn = 128
    config.model.rank = 8
    config.model.memory = min(64, config.model.memory)
    config.eval.memory = min(64, config.eval.memory)
    config.eval.batch = 64
    config.eval.valid_tokens = config.eval.final_tokens = 50_000
