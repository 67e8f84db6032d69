"""Config for a modular teacher, which tests generalization to unseen combinations of modules.

Source: Schug et al., Discovering Modular Solutions That Generalize Compositionally (ICLR 2024), for
the teacher, its sizes and the supports. The trainer, the inference of contexts and all other
constants are ours. See experiments/composition/problem.py.

    python -m mi.main --config=experiments/composition/config.py --workdir=runs/composition

Ten seeds train simultaneously.
"""

import ml_collections

from mi.fit import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config.get_base_config('experiments.composition.problem')
    config.seeds = tuple(range(10))

    # What is learned.
    problem = config.problem
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
    config.model = model = base_config.get_fused_mlp_config()
    model.parameters = 4000  # choose the width with about this many
    model.fusion.name = 'mi'

    # How it is trained.
    train = config.train
    train.steps = 4000
    train.batch = 32  # examples of each task, new ones in every step
    train.log_every = 1000
    train.eval_every = 4000
    train.save_every = 4000

    config.optim.learning_rate = 1e-2
    return config.lock()
