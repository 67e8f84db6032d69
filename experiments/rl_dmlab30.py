"""Sweep over the read-outs of experiments/rl_readout.py on DMLab-30, in the paper's topology.

configs/rl_dmlab30.py describes what is known about the paper's run: thirty levels, 150 engines, and
one learner on 4 GPUs. Each arm and seed is a run on a host with 4 GPUs and enough cores for 150
engines, on which DeepMind Lab has been built (docs/dmlab.md):

    python -m launch.slurm --sweep=experiments/rl_dmlab30.py --workdir=runs/rl_dmlab30 --gpus=4
    python -m launch.local --sweep=experiments/rl_dmlab30.py --workdir=runs/rl_dmlab30 --dry_run

The second command lists the members with their parameters and FLOPs, and does not need the engine.
We have never run the first command, because none of our machines has the engine.

Source: Jayakumar et al. (ICLR 2020) for the levels, actors and learner. The site and the arms are
recalled from memory.
"""

from experiments.rl_readout import ARMS
from launch.sweep import Overrides, product

CONFIG = 'configs/rl_dmlab30.py'
TITLE = 'DMLab-30: read-outs of the policy and the value'
METRIC = 'capped_mean'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat, index'
NOTES = [
    'Mean of the human-normalized scores of the levels, each capped at 1, of 10 episodes a level, '
    'sampled from the policy. The levels are those of training; published scores are of '
    'dmlab30/test.',
    'Torso and LSTM are the same in all arms, so that the arms differ in the parameters of their '
    'read-outs alone: see that column.',
    'The core reads pixels and, in four levels, an instruction, so that single head and MI, '
    'learned context can find out which level they are in.',
    'Actors and learner run side by side, which is not deterministic.',
]


def sweep() -> list[Overrides]:
    return product(ARMS, seeds=[(0,), (1,), (2,), (3,), (4,)])
