"""Sweep that compares fusions of the task, for one agent with thirty goals in one world.

The environment is xland (mi/rl/envs/jax/xland.py), in which only the task identifies the goal. Arms
differ in the fusion at the site `core_input`, which combines the features with the index of the
task. The arm 'none' does not receive the task. Two arms remove a handicap of others: 'concat,
large' has as many parameters as 'mi', in a wider torso and LSTM, and 'film, random' starts with a
different policy for each task, whereas 'film' starts with one policy for all. One
program trains five seeds.

    python -m launch.local --sweep=experiments/rl_multitask.py --workdir=runs/rl --parallel=2

By default, the learning rate and the entropy cost are those of configs/rl.py, which were tuned for
mi and none. To use the values that experiments/rl_tuning.py chose for each arm, with fresh seeds:

    MI_RL_TUNING=runs/rl_tuning/report/rl_tuning.json python -m launch.local \
        --sweep=experiments/rl_multitask.py --workdir=runs/rl_tuned --parallel=2

Source: the question of Jayakumar et al. (ICLR 2020), section on multi-task RL, which uses DMLab-30
and other sites. The environment, agent and sizes are ours.
"""

import os
import pathlib

from launch.sweep import Overrides, product
from mi.config import UserError
from mi.training.io import read_json

TUNING = os.environ.get('MI_RL_TUNING', '')

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
    'Sizes of torso and LSTM are the same in all arms but concat, large, so that the arms differ '
    'in parameters: see that column. concat, large has those of mi.',
    'none does not know the task, and shows what a policy gets that tries everything in turn.',
    'Learning rate and entropy cost of each arm were chosen by experiments/rl_tuning.py, on other '
    'seeds.'
    if TUNING
    else 'Learning rate and entropy cost, the same in all arms, were found with mi and none.',
]
SEEDS = (5, 6, 7, 8, 9) if TUNING else (0, 1, 2, 3, 4)
LARGE = 245  # features and LSTM of a concat agent with the parameters of mi
ARMS: dict[str, Overrides] = {  # label → overrides
    'mi': {'model.fusion.name': 'mi'},
    'concat, large': {
        'model.fusion.name': 'concat',
        'model.features': LARGE,
        'model.hidden': LARGE,
    },
    'concat': {'model.fusion.name': 'concat'},
    'multi_head': {'model.fusion.name': 'multi_head'},
    'mi_low_rank': {'model.fusion.name': 'mi_low_rank'},
    'film, random': {'model.fusion.name': 'film', 'model.fusion.options.gamma_variance': 1.0},
    'film': {'model.fusion.name': 'film'},
    'none': {'model.fusion.name': 'none'},
}
TUNED_KEYS = ('optim.learning_rate', 'loss.entropy_cost')


def sweep() -> list[Overrides]:
    choices = read_choices(pathlib.Path(TUNING)) if TUNING else {}
    arms = [{'label': label} | arm | choices.get(label, {}) for label, arm in ARMS.items()]
    return product(arms, seeds=[SEEDS])


def read_choices(file: pathlib.Path) -> dict[str, Overrides]:
    """Read the overrides that experiments/rl_tuning.py chose for each arm, by label.

    Raises:
      UserError: if the file does not exist, if it lacks an arm or a value, or if the values were
        chosen on a seed of this sweep.
    """
    if not file.is_file():
        raise UserError(
            f'MI_RL_TUNING={file}: expected the path of an rl_tuning.json, but found no file. '
            f'Try the one in the report on experiments/rl_tuning.py'
        )
    tuning = read_json(file)
    chosen = tuning.get('chosen', {})
    missing = [label for label in ARMS if not set(TUNED_KEYS) <= set(chosen.get(label, {}))]
    if missing:
        raise UserError(
            f'MI_RL_TUNING={file}: expected a choice for every arm, but found none for '
            f'{"; ".join(missing)}. Run the rest of experiments/rl_tuning.py'
        )
    if shared := set(tuning.get('seeds', ())) & set(SEEDS):
        raise UserError(
            f'MI_RL_TUNING={file}: expected a choice on seeds other than {SEEDS}, but it was made '
            f'on {sorted(shared)}'
        )
    return {label: {key: chosen[label][key] for key in TUNED_KEYS} for label in ARMS}
