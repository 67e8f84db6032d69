"""Concatenation against multiplicative interaction where an agent meets its task, in minutes.

Six goals in one world, one IMPALA agent; the task's index comes in by the fusion at what the LSTM
reads. Three seeds.

    make run

experiments/rl_multitask.py is the same with thirty goals, six arms, five seeds and more steps.
Source: the question is that of Jayakumar et al. (ICLR 2020); environment and sizes are ours.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/rl.py:env=xland/kinds'
TITLE = 'Concatenation against multiplicative interaction, six tasks of XLand'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat'
NOTES = [
    'Equal environment steps. 16 episodes of each task, sampled from the policy.',
    'Sizes of torso and LSTM are the same in both arms, so that they differ in parameters.',
]


def sweep() -> list[Overrides]:
    return product(
        **{
            'model.fusion.name': ['mi', 'concat'],
            'seeds': [(0, 1, 2)],
            'train.steps': [800_000],
            'train.eval_every': [40],
        }
    )
