"""Sweep that checks whether the preset for Acrobot-v1 solves it with each of five seeds.

Acrobot-v1 is solved at the threshold that gymnasium registers, a mean return of −100, with the
greedy policy in the last evaluation. Each seed is a separate run in the topology `threads`, and the
report combines them.

    pip install -e '.[sweep,gym]'
    python -m launch.local --sweep=experiments/rl_acrobot.py --workdir=runs/rl_acrobot
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/rl.py:acrobot'
TITLE = 'Acrobot-v1 with its preset'
METRIC = 'return'
SPLIT = 'eval_greedy'
CURVES = 'eval_greedy'
LOWER_IS_BETTER = False
BASELINE = None
NOTES = [
    'Mean return of 32 new episodes of the greedy policy, cut at 500 steps; solved from −100 on.',
    'Actors and learner run side by side, which is not deterministic: the same seed gives other '
    'numbers the next time.',
]


def sweep() -> list[Overrides]:
    return product(seeds=[(0,), (1,), (2,), (3,), (4,)])
