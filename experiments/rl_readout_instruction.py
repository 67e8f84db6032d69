"""Sweep over the read-outs of experiments/rl_readout.py, for a core that reads the instruction.

In experiments/rl_readout.py, only the read-outs receive the task, so that a single head and a
learned context cannot distinguish tasks. Here, the encoded instruction ('hold red ball') is
concatenated to the input of the core in every arm. Therefore, the output h of the core can identify
the task, as on DMLab-30, where observations identify the level.

    python -m launch.local --sweep=experiments/rl_readout_instruction.py --workdir=runs/rl_words

The report also has rl_readout.png, .pdf and .md, like that of experiments/rl_readout.py.

Source: Jayakumar et al. (ICLR 2020), section on multi-task RL, recalled from memory, for the site
and the arms. The environment, agent and sizes are ours.
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
