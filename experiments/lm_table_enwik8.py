"""The language-model table in the paper's shape, of bytes: the first 10 MB of enwik8.

    MI_DATA=DIR python -m launch.local --sweep=experiments/lm_table_enwik8.py --workdir=runs/enwik8

DIR holds enwik8, plain or packed. The arms train on the first 10 MB, and are evaluated on the first
0.5 MB of its standard validation and test texts, so that no figure compares with a published one.

Source: see experiments/lm_table.py, which has the arms, the table and the figure.
"""

from experiments import lm_table
from experiments.lm_table import BASELINE, CURVES, SPLIT, report, sweep

__all__ = ['BASELINE', 'CURVES', 'SPLIT', 'report', 'sweep']

CONFIG = 'configs/lm.py:table_enwik8'
TITLE = 'Multiplicative encoder and decoder of an LSTM, bytes of enwik8'
METRIC = 'bits_per_byte'
NOTES = [
    'The first 10 MB of enwik8, evaluated on the first 0.5 MB of its standard validation and test '
    'texts: no figure here compares with a published one. Perplexity is that of a byte.',
    'Each text is read once from a zero state, in 64 parts, with state carried.',
    *lm_table.NOTES[2:],
]
