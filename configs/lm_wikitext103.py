"""WikiText-103 at the word level: the LSTM of the paper's question, and Transformer-XL base.

    python -m mi.main --config=configs/lm_wikitext103.py --config.data.path=DIR --workdir=runs/wt103
    python -m mi.main --config=configs/lm_wikitext103.py:rae_2018 --config.data.path=DIR …
    python -m mi.main --config=configs/lm_wikitext103.py:transformer --config.data.path=DIR …
    python -m mi.main --config=configs/lm_wikitext103.py:smoke --workdir=runs/smoke

DIR contains wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, with 103,227,021 training
tokens.

lstm         Jayakumar et al. (ICLR 2020) train an LSTM on WikiText-103 with a multiplicative
             encoder, decoder or both (recalled). We do not know its sizes. H = 2048, E = 512 and an
             adaptive softmax are those of a strong LSTM (Rae et al., 2018, test perplexity 36.4;
             recalled). Optimizer, dropout and context are ours.
rae_2018     the same LSTM with the optimizer of that baseline: Adam with β₁ = 0, β₂ = 0.999 and
             batch 64, on 8 GPUs (grade 'sources': independent public sources agree; docs/paper.md
             explains the grades). Learning rate, schedule and clipping are ours.
transformer  Transformer-XL base (Dai et al., 2019, test perplexity 24.0): 16 layers of 410
             features, 10 heads of 41, feed-forward 2100 with relu, segment and memory of 150, batch
             60, dropout 0.1, and an adaptive softmax with the cutoffs of its code. Here there are
             400 features and heads of 40, because rotary and relative positions need pairs, and
             RMSNorm before the layers.
smoke        a minute on a laptop, on Austen's words, to show that everything runs.

We have not trained these models.
"""

import ml_collections

from configs import arguments, lm

PRESETS: dict[str, arguments.Settings] = {
    'lstm': {
        'model.core': 'lstm',
        'model.embed': 512,
        'model.hidden': 2048,
        'model.context': 128,
        'model.dtype': 'bfloat16',
        'dropout.input': 0.3,
        'dropout.output': 0.3,
        'dropout.locked': True,
        'train.batch': 64,
        'train.length': 128,
        'train.steps': 250_000,  # 20 epochs
        'eval.length': 128,
        'optim.learning_rate': 1e-3,
        'optim.warmup_steps': 1_000,
        'optim.clip_norm': 0.25,
    },
    'rae_2018': {
        'optim.name': 'adam',
        'optim.b1': 0.0,
        'optim.b2': 0.999,
        'train.batch': 64,
    },
    'transformer': {
        'model.core': 'transformer',
        'model.layers': 16,
        'model.embed': 400,
        'model.hidden': 400,
        'model.heads': 10,
        'model.ffn': 2100,
        'model.activation': 'relu',
        'model.positions': 'relative',
        'model.memory': 150,
        'model.divisor': 1,
        'model.site': 'none',
        'dropout.input': 0.1,
        'dropout.layer': 0.1,
        'dropout.output': 0.1,
        'dropout.locked': False,
        'train.batch': 60,
        'train.length': 150,
        'train.steps': 200_000,
        'eval.length': 64,
        'eval.memory': 640,
        'optim.learning_rate': 2.5e-4,
        'optim.warmup_steps': 0,
        'optim.clip_norm': 0.25,
    },
    'smoke': {},  # depends on the rest: _shrink
}


def get_config(arg: str = 'lstm') -> ml_collections.ConfigDict:
    argument = arguments.parse('configs/lm_wikitext103.py', arg, PRESETS, lm.KEYS)
    config = lm.get_config().unlock()
    config.data.source = 'wikitext-103'
    config.data.level = 'token'
    config.data.vocabulary = 267_735
    config.model.cutoffs = (20_000, 40_000, 200_000)
    config.loss.chunk = 2048
    config.eval.batch = 10
    config.eval.valid_tokens = 50_000
    config.train.log_every = 100
    config.train.eval_every = 4_000
    config.train.save_every = 4_000
    config.update_from_flattened_dict(PRESETS['lstm'])
    lm.apply_argument(config, argument, PRESETS)
    if 'smoke' in argument.presets:
        _shrink(config)
    return config.lock()


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Set sizes for a run of a minute, for any model."""
    config.update_from_flattened_dict(lm.SMOKE)
    config.data.level = 'word'
    config.data.vocabulary = 8_000
    config.model.cutoffs = (1_000, 4_000)
    config.loss.chunk = 256
    is_transformer = config.model.core == 'transformer'
    config.model.layers = min(2, config.model.layers)
    config.model.embed = config.model.hidden = 40 if is_transformer else 64
    config.model.ffn = 128
    config.model.memory = min(32, config.model.memory)
    config.model.context = 16
    config.eval.memory = min(32, config.eval.memory)
    config.eval.batch = 32
    config.eval.valid_tokens = config.eval.final_tokens = 20_000
