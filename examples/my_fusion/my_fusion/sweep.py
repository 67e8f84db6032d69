"""A comparison of the gate with concatenation and MI, where the task flips a sign.

python -m launch.local --sweep=my_fusion/sweep.py --workdir=runs/signs --parallel=2
"""

from typing import Any

from launch.sweep import product

CONFIG = 'configs/rl.py:tiny'
TITLE = 'A gate of our own, two tasks of opposite sign'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat'
NOTES = ['Equal environment steps, eight steps an episode, success is eight right answers.']


def sweep() -> list[dict[str, Any]]:
    """Return a member for each of three fusions, with six seeds."""
    return product(
        **{
            'env.name': ['my_fusion.environment:make/two'],
            'model.fusion.name': ['concat', 'mi', 'my_fusion.layers:TanhGate'],
            'seeds': [(0, 1, 2, 3, 4, 5)],
            'train.steps': [60_000],
        }
    )
