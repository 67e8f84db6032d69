"""The read-outs of experiments/rl_readout.py, for an agent whose core reads the goal in words.

There, only the read-outs know the task, so a single head and a learned context cannot. Here, the
encoded instruction ('hold red ball') is concatenated to the core's input in every arm. So the
core's output h can tell the tasks apart, as on DMLab-30, where the agent sees which level it is in.

    python -m launch.local --sweep=experiments/rl_readout_instruction.py --workdir=runs/rl_words

The report also has rl_readout.png, .pdf and .md, as that of experiments/rl_readout.py.

Source: site and arms are those of Jayakumar et al. (ICLR 2020), section on multi-task RL, as
recalled; environment, agent and sizes are ours.
"""

from experiments import rl_readout
from launch.sweep import Overrides

CONFIG = 'configs/rl.py'
TITLE = 'Thirty tasks of XLand, told in words: read-outs of the policy and the value'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat, index'
NOTES = [
    rl_readout.NOTES[0],
    'Torso, encoder of the instruction and LSTM are the same in all arms, so that the arms differ '
    'in the parameters of their read-outs alone: see that column.',
    'All arms read the instruction before the core. single head and MI, learned context have '
    'nothing else that tells the task.',
]
report = rl_readout.report


def sweep() -> list[Overrides]:
    return [arm | {'model.instruction': True} for arm in rl_readout.sweep()]
