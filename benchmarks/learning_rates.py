r"""A sweep over forty learning rates, to measure how much time shared programs save.

    time python -m launch.local --sweep=benchmarks/learning_rates.py --workdir=runs/rates \
        --parallel=2

With --cache_megabytes=0, each member compiles its own programs.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/lm.py:tiny'
TITLE = 'Forty learning rates of a small language model'
METRIC = 'bits_per_byte'
BASELINE = None
SPLIT = 'test'
NOTES: list[str] = []


def sweep() -> list[Overrides]:
    rates = [step / 5000 for step in range(1, 41)]
    return product(**{'optim.learning_rate': rates, 'train.steps': [20]})
