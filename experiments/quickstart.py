"""Sweep that compares concatenation and multiplicative interaction in a language model.

The model is an LSTM on six Jane Austen novels, tokenized with 1024 byte pairs. The two arms only
differ in the fusion of the token's embedding with a recurrent context. The size of the LSTM is
adjusted so that both have the parameters of the concat arm. Seven seeds are trained together by
vmap. If all of them agree in sign, p = 0.016.

    make run

experiments/lm_fusion.py compares five fusions at two sites of two cores, with three seeds.

Source: the question of Jayakumar et al. (ICLR 2020). The model, data and sizes are ours.
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
