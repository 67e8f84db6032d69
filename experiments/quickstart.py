"""Concatenation against multiplicative interaction where a token meets its context.

An LSTM language model on six Jane Austen novels, cut into 1024 byte pairs. Arms differ in one word,
the fusion of the token's embedding with a recurrent context; the LSTM is made larger or smaller so
that all have the parameters of the concat arm. Three seeds.

    make run

Source: the question is that of Jayakumar et al. (ICLR 2020); model, data and sizes are ours.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/lm.py:quickstart'
TITLE = 'Concatenation against multiplicative interaction, LSTM on Austen'
METRIC = 'bits_per_byte'
SPLIT = 'test'
BASELINE = 'concat'
NOTES = [
    'Test text: Persuasion, all of it once, in 64 parts, each read from a zero state to '
    'its end with the state carried. Training text: Emma, Mansfield Park, Pride and Prejudice and '
    'Sense and Sensibility, less than one pass. Curves: the first 30,000 tokens of Northanger '
    'Abbey.',
    'Hidden size of the LSTM set per arm so that all arms have the parameters of concat. '
    'The arm none has no context, and a larger LSTM in its place.',
    'A few minutes of training of small models: it shows the machinery, and settles nothing.',
]


def sweep() -> list[Overrides]:
    # The costliest arm early, so that it does not run alone at the end.
    return product(**{'model.fusion.name': ['mi', 'concat', 'none', 'mi_low_rank']})
