"""Sweep for the language-model table on WikiText-103 at word level, for GPUs.

    MI_DATA=DIR python -m launch.local --sweep=experiments/lm_table_wikitext103.py \
        --workdir=runs/lm_table_wikitext103 --parallel=8 --gpus=1

DIR/wikitext-103 contains wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens. Each arm and
seed is a member that uses one GPU. --dry_run prints the parameters and the costs of the members.

The model is the LSTM of configs/lm_wikitext103.py with the optimizer of the known baseline, and a
context of 16 features. W of the decoder has 16 · H · 512 entries, and the core is smaller to
compensate. We have not measured these arms.

Source: see experiments/lm_table.py, which defines the arms, the table and the figure.
"""

from experiments import lm_table
from experiments.lm_table import BASELINE, CURVES, METRIC, SPLIT, report
from launch.sweep import Overrides

__all__ = ['BASELINE', 'CURVES', 'METRIC', 'SPLIT', 'report']

CONFIG = 'configs/lm_wikitext103.py:rae_2018'
TITLE = 'Multiplicative encoder and decoder of an LSTM, WikiText-103'
NOTES = [
    'WikiText-103, word level, the standard splits with all 267,735 words. Perplexity is that of a '
    'word; bits per byte count the bytes of the text.',
    'Each text is read once from a zero state, in 10 parts, with state carried.',
    *lm_table.NOTES[2:],
]

SEEDS = [(0,), (1,), (2,), (3,), (4,)]  # a member each


def sweep() -> list[Overrides]:
    sizes: Overrides = {'model.context': 16, 'match.by': 'parameters', 'match.baseline': 'plain'}
    return [arm | sizes | {'seeds': seeds} for seeds in SEEDS for arm in lm_table.list_arms()]
