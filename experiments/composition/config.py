"""A modular teacher: generalization to combinations of modules that training did not have.

Source: Schug et al., Discovering Modular Solutions That Generalize Compositionally (ICLR 2024), of
which we took teacher, sizes and the supports; the trainer, how contexts are learned and the other
constants are ours. See experiments/composition/problem.py.

    python -m mi.main --config=experiments/composition/config.py --workdir=runs/composition

Ten seeds train simultaneously.
"""

import ml_collections

from mi.training import optim


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = 'fit'
    config.tracker = 'none'  # a name in mi.training.trackers.TRACKERS: none, wandb, trackio
    config.seeds = tuple(range(10))

    # What is learned.
    config.problem = problem = ml_collections.ConfigDict()
    problem.name = 'experiments.composition.problem'
    problem.modules = 6  # M
    problem.inputs = 16  # n
    problem.hidden = 16  # h, of the teacher
    problem.outputs = 4  # k
    problem.support = 'connected'  # connected, disconnected, alone
    problem.coefficients = 'drawn'  # drawn, equal
    problem.context = 'given'  # given, learned
    problem.contexts = 12  # m of a learned context
    problem.examples = 256  # of each task in the evaluation

    config.transfer = transfer = ml_collections.ConfigDict()
    transfer.examples = 256  # of a new task, to learn its context
    transfer.steps = 500
    transfer.learning_rate = 3e-2

    # The network.
    config.model = model = ml_collections.ConfigDict()
    model.width = 32
    model.parameters = 4000  # or 0 for the width above
    model.depth = 1  # hidden layers
    model.site = 'first'  # first, last, all: the maps that take z
    model.activation = 'relu'  # relu, identity
    model.fusion = fusion = ml_collections.ConfigDict()
    fusion.name = 'mi'
    fusion.rank = 0  # as the width
    fusion.hidden = 0  # as the width

    # How it is trained.
    config.train = train = ml_collections.ConfigDict()
    train.steps = 4000
    train.batch = 32  # examples of each task, new ones in every step
    train.matmul_precision = 'highest'  # of f32 products: default, high, highest
    train.log_every = 1000
    train.eval_every = 4000
    train.save_every = 4000
    train.keep = 1

    config.optim = optim.get_config()
    config.optim.learning_rate = 1e-2
    return config.lock()
