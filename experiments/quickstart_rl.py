"""Sweep that compares concatenation and multiplicative interaction in an agent, within minutes.

One IMPALA agent learns eight tasks, which permute the effects of the actions
(mi/rl/envs/jax/actuator_inversion.py). The index of the task is fused with the input of the core.
With eight seeds, p = 0.008 if all of them agree in sign.

    make run

In a trial with six seeds, MI needed about 280 updates to learn all eight tasks, which is the length
of this sweep. After 360 updates, concatenation had learned them with four of the six seeds.

experiments/rl_multitask.py has thirty goals, eight arms, five seeds and more steps.

Source: the question of Jayakumar et al. (ICLR 2020). The environment and sizes are ours.
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
