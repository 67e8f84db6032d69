"""Sweep that checks whether the preset for CartPole-v1 solves it with each of five seeds.

CartPole-v1 is solved at the threshold that gymnasium registers, a mean return of 475, with the
greedy policy in the last evaluation. Each seed is a separate run in the topology `threads`, and the
report combines them.

    pip install -e '.[sweep,gym]'
    python -m launch.local --sweep=experiments/rl_cartpole.py --workdir=runs/rl_cartpole
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/rl.py:cartpole'
TITLE = 'CartPole-v1 with its preset'
METRIC = 'return'
SPLIT = 'eval_greedy'
CURVES = 'eval_greedy'
LOWER_IS_BETTER = False
BASELINE = None
NOTES = [
    'Mean return of 32 new episodes of the greedy policy, at most 500 each; solved from 475 on.',
    'Actors and learner run side by side, which is not deterministic: the same seed gives other '
    'numbers the next time.',
]


def sweep() -> list[Overrides]:
    return product(seeds=[(0,), (1,), (2,), (3,), (4,)])
