"""Core × site × fusion of a language model, with the parameters of the concat arm.

An LSTM and a Transformer, byte level, a recurrent context; the fusion stands at the token's
embedding or at the output embedding. Arms of one core and site differ in the word of the fusion;
the core is made larger or smaller so that all have the parameters of the concat arm there. Three
seeds.

    python -m launch.local --sweep=experiments/lm_fusion.py --workdir=runs/lm_fusion --parallel=2
    MI_ENWIK8=enwik8.gz python -m launch.local --sweep=experiments/lm_fusion.py …

On Austen, or on enwik8 where MI_ENWIK8 says where it is: the first 9 MB to train on, the first
0.5 MB of the standard validation text to evaluate, so that the figures are not enwik8's.

Source: the question is that of Jayakumar et al. (ICLR 2020), section on language modelling;
models, sizes and text are ours.
"""

import os
from typing import Any

from launch.sweep import product

ENWIK8 = os.environ.get('MI_ENWIK8', '')

CONFIG = 'configs/lm.py:fusion_study'
TITLE = 'Where and how a context meets a language model'
METRIC = 'bits_per_byte'
SPLIT = 'valid_whole'
BASELINE = 'lstm, encoder, concat'
NOTES = [
    'Text: the first 9 MB of enwik8, evaluated on the first 0.5 MB of its standard validation '
    'text. Not the published split: no figure here compares with one.'
    if ENWIK8
    else 'Text: four novels by Jane Austen, evaluated on Northanger Abbey.',
    'Read once from a zero state, in 64 parts, with state or memory carried.',
    'Sizes set per arm so that all arms of one core and site have the parameters of concat. none '
    'has no context, and a larger core in its place.',
]


def sweep() -> list[dict[str, Any]]:
    arms = product(**{
        'model.core': ['transformer', 'lstm'],
        'model.site': ['encoder', 'decoder'],
        'model.fusion.name': ['concat', 'mi', 'mi_low_rank', 'film', 'none'],
    })  # fmt: skip
    data = {'data.source': 'enwik8', 'data.path': ENWIK8, 'data.train_tokens': 9_000_000}
    return [arm | (data if ENWIK8 else {}) for arm in arms]
