"""Thirty goals in one world, one agent: the task by concatenation, by heads of its own, by MI.

Environment: xland (mi/rl/envs/jax/xland.py), where only the task says what is wanted. Arms differ
in the word of the fusion, at the site `core_input`: what the LSTM reads is the fusion of the
features with the task's index. The arm none is not told the task. Five seeds, trained together by
vmap.

    python -m launch.local --sweep=experiments/rl_multitask.py --workdir=runs/rl --parallel=2

Source: the question is that of Jayakumar et al. (ICLR 2020), section on multi-task RL, which has
DMLab-30 and other sites; environment, agent and sizes are ours, and none is the paper's.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/rl.py'
TITLE = 'Thirty tasks of XLand, IMPALA with an LSTM: how the task comes in'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat'
NOTES = [
    'Equal environment steps; the column at equal time has the same wall time instead. 16 episodes '
    'of each task, sampled from the policy, on fresh layouts at every evaluation.',
    'Sizes of torso and LSTM are the same in all arms, so that the arms differ in parameters: see '
    'that column.',
    'none does not know the task, and shows what a policy gets that tries everything in turn.',
]


def sweep() -> list[Overrides]:
    fusions = ['mi', 'concat', 'none', 'multi_head', 'film', 'mi_low_rank']
    return product(**{'model.fusion.name': fusions, 'seeds': [(0, 1, 2, 3, 4)]})
