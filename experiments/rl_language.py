"""Sweep that compares concat, FiLM, gated attention and MI for agents that follow instructions.

One agent learns three levels of BabyAI (EnvPool) in which only the instruction identifies the
object. The arms differ in the fusion of the view with the encoded instruction, at the site
`instruction`. The fusion `gate` is the gated attention of Chaplot et al. (2018). Each seed is a
separate run in the topology `threads`, and the report combines them.

    pip install -e '.[sweep,envpool]'
    python -m launch.local --sweep=experiments/rl_language.py --workdir=runs/rl_language

Source: the question of Jayakumar et al. (ICLR 2020). The levels, agent and sizes are ours.
"""

from launch.sweep import Overrides, product

CONFIG = 'configs/rl.py'
TITLE = 'Three levels of BabyAI: how the instruction comes in'
METRIC = 'success'
SPLIT = 'eval'
CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = 'concat'
NOTES = [
    'Equal environment steps; the column at equal time has the same wall time instead. Actors and '
    'learner run side by side, which is not deterministic, unlike the other experiments.',
    'In PickupDistDebug a wrong object ends the episode; in the other two levels it costs time.',
    'Sizes of torso, encoder and LSTM are the same in all arms, so that the arms differ in '
    'parameters: see that column.',
]


def sweep() -> list[Overrides]:
    return product(
        **{
            'seeds': [(0,), (1,), (2,)],
            'model.fusion.name': ['concat', 'film', 'gate', 'mi'],
            'env.name': ['babyai/GoToRedBlueBall,GoToLocalS6N2,PickupDistDebug'],
            'train.topology': ['threads'],
            'train.steps': [1_000_000],
            'train.eval_every': [40],
            'model.instruction': [True],
            'model.sites': [('instruction',)],
        }
    )
