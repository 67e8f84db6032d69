"""Concatenation against multiplicative interaction where a token meets its context.

An LSTM language model on six Jane Austen novels, cut into 1024 byte pairs. The two arms differ in
one word, the fusion of the token's embedding with a recurrent context; the LSTM is made larger or
smaller so that both have the parameters of the concat arm. Seven seeds, trained together by vmap:
if all agree in sign, p = 0.016.

    make run

experiments/lm_fusion.py compares five fusions at two sites of two cores, with three seeds.
Source: the question is that of Jayakumar et al. (ICLR 2020); model, data and sizes are ours.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/lm.py:quickstart'
TITLE = 'An LSTM on Austen: MI against concatenation'
METRIC = 'bits_per_byte'
SPLIT = 'test'
BASELINE = 'concat'
NOTES = [
    'Test text: Persuasion, all of it once, in 64 parts, each read from a zero state to '
    'its end with the state carried. Training text: Emma, Mansfield Park, Pride and Prejudice and '
    'Sense and Sensibility, less than one pass. Curves: the first 30,000 tokens of Northanger '
    'Abbey.',
    'Hidden size of the LSTM set per arm so that both arms have the parameters of concat.',
    'A few minutes of training of small models: the difference is settled for these models alone.',
]


def sweep() -> list[Overrides]:
    return product(
        **{
            'model.fusion.name': ['mi', 'concat'],
            'seeds': [tuple(range(7))],
            'train.steps': [320],
            'train.eval_every': [80],
            'train.save_every': [80],
        }
    )
