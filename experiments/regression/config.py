"""Config for sixteen regression tasks from each of two families, a x + b and a sin(10 x) + b.

Source: the experiment and all constants are ours. We do not know whether Jayakumar et al. (ICLR
2020) use such families, see docs/paper.md.

    python -m mi.main --config=experiments/regression/config.py --workdir=runs/regression

Ten seeds train simultaneously.
"""

import ml_collections

from mi.fit import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config.get_base_config('experiments.regression.problem')
    config.seeds = tuple(range(10))

    # What is learned.
    problem = config.problem
    problem.context = 'one_hot'  # one_hot, descriptor, inferred: what says which task it is
    problem.tasks = 32  # half of each family
    problem.examples = 16  # of each task, all that there are for training
    problem.noise = 0.1  # standard deviation, on y of the examples
    problem.descriptor = 16  # m of a descriptor
    problem.descriptor_noise = 0.1  # standard deviation, on a, b and the family
    problem.inferred = 16  # m of an inferred context
    problem.encoder = 32  # width of the encoder that infers it

    config.transfer = transfer = ml_collections.ConfigDict()
    transfer.tasks = 32  # new ones, half of each family
    transfer.shots = (2, 4, 8, 16)  # examples that they come with
    transfer.steps = 500  # to learn their contexts
    transfer.learning_rate = 1e-2

    # The network.
    config.model = model = base_config.get_fused_mlp_config()
    model.parameters = 6000  # choose the width with about this many
    model.depth = 2  # hidden layers
    model.site = 'last'  # first, last, all: the maps that take z
    model.fusion.name = 'mi'

    # How it is trained.
    train = config.train
    train.steps = 4000
    train.batch = 8  # examples of each task, new ones in every step
    train.log_every = 1000
    train.eval_every = 4000
    train.save_every = 4000

    config.optim.learning_rate = 3e-3
    return config.lock()
