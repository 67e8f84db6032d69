"""Sweep for the language-model table on bytes, the first 10 MB of enwik8.

    MI_DATA=DIR python -m launch.local --sweep=experiments/lm_table_enwik8.py --workdir=runs/enwik8

DIR contains enwik8, plain or compressed. The arms are trained on the first 10 MB and evaluated on
the first 0.5 MB of the standard validation and test texts, so that the results are not comparable
to published results.

Source: see experiments/lm_table.py, which defines the arms, the table and the figure.
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
