"""Config that fits conditional statements or, with the preset 'metrics', similarity metrics.

    python -m mi.main --config=experiments/conditional/config.py --workdir=runs/statements
    python -m mi.main --config=experiments/conditional/config.py:metrics --workdir=runs/metrics

Two networks, one for each of two targets, are trained simultaneously with ten seeds.

Source: the hypothesis of Jayakumar et al. (ICLR 2020). All constants are ours.
"""

import ml_collections

from mi.fit import base_config

PRESETS = {
    'statements': ('conditional', 'choice'),
    'metrics': ('cosine', 'squared_distance'),
}


def get_config(arg: str = 'statements') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/conditional/config.py', arg, PRESETS)
    config = base_config.get_base_config('experiments.conditional.problem')
    config.seeds = tuple(range(10))

    # What is learned.
    problem = config.problem
    problem.targets = PRESETS[arg]  # a network for each: statements, or metrics
    problem.dimension = 8  # d, of x and of z
    problem.branches = 4  # K of 'choice'
    problem.examples = 8192  # of an evaluation
    problem.far_scale = 3.0  # factor on x in the second evaluation

    # The network.
    config.model = model = base_config.get_fused_mlp_config()
    model.parameters = 1000  # of each network: choose the width with about this many
    model.encodes_context = False  # whether z passes a hidden layer of its own first
    model.fusion.name = 'mi'

    # How it is trained.
    train = config.train
    train.steps = 3000
    train.batch = 128
    train.log_every = 1000
    train.eval_every = 3000
    train.save_every = 3000

    config.optim.learning_rate = 1e-2
    config.optim.clip_norm = 0.0  # a norm over all networks would couple them
    return config.lock()
