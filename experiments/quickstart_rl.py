"""Concatenation against multiplicative interaction where an agent meets its task, in minutes.

Eight tasks permute what the actions do (mi/rl/envs/jax/actuator_inversion.py), and one IMPALA agent
learns them; the task's index comes in by the fusion at what the core reads. Eight seeds: if all
agree in sign, p = 0.008.

    make run

280 updates: about as many as MI needed, in a trial with six seeds, to learn all eight tasks.
There, after 360 updates, concatenation had learned them with four of the six seeds.

experiments/rl_multitask.py has thirty goals, eight arms, five seeds and more steps.
Source: the question is that of Jayakumar et al. (ICLR 2020); environment and sizes are ours.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/rl.py:actuator_inversion'
TITLE = 'Eight action permutations: MI against concatenation'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat'
NOTES = [
    'Equal environment steps. 16 episodes of each task, sampled from the policy.',
    'Torso and core have the same sizes in both arms, so that the arms differ in parameters.',
    'Both arms can represent the best policy, whose success is 1, and 280 updates were chosen as '
    'about as many as MI needs: the difference is one of speed.',
]


def sweep() -> list[Overrides]:
    return product(
        **{
            'model.fusion.name': ['mi', 'concat'],
            'seeds': [tuple(range(8))],
            'train.steps': [280 * 64 * 10],  # updates · environments · steps of each
        }
    )
