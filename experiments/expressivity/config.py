"""Fitting xᵀz: the smallest network that reaches an error (task 'search'), or one of them (fit).

Source: the question is that of Jayakumar et al. (ICLR 2020), expressivity; the target of 0.1 mean
squared error on Gaussian inputs is recalled from it, and everything else here is ours.

    python -m mi.main --config=experiments/expressivity/config.py --workdir=runs/product
    python -m mi.main --config=experiments/expressivity/config.py:fit --workdir=runs/surface

A search trains about a dozen widths of each dimension, with three learning rates and five seeds.
"""

import ml_collections

from mi.config import UserError, suggest
from mi.training import optim

PRESETS = ('search', 'fit')


def get_config(arg: str = 'search') -> ml_collections.ConfigDict:
    if arg not in PRESETS:
        raise UserError(
            f'--config=experiments/expressivity/config.py:{arg}: expected a preset; '
            f'{suggest(arg, PRESETS)}'
        )
    config = ml_collections.ConfigDict()
    config.task = arg
    config.tracker = 'none'  # a name in mi.training.trackers.TRACKERS: none, wandb, trackio
    config.seeds = (0, 1, 2, 3, 4)

    # What is learned.
    config.problem = problem = ml_collections.ConfigDict()
    problem.name = 'experiments.expressivity.problem'
    problem.target = 'product'  # product, additive, x_only
    problem.dimension = 4  # d, of x and of z
    problem.examples = 8192  # of the evaluation

    # The network.
    config.model = model = ml_collections.ConfigDict()
    model.width = 32
    model.parameters = 0  # choose the width with about this many; 0 keeps it, as in a search
    model.depth = 1  # hidden layers
    model.site = 'first'  # first, last, all: the maps that take z
    model.activation = 'relu'  # relu, identity
    model.fusion = fusion = ml_collections.ConfigDict()
    fusion.name = 'concat'
    fusion.rank = 0  # as the width
    fusion.hidden = 0  # as the width

    # How it is trained.
    config.train = train = ml_collections.ConfigDict()
    train.steps = 2000
    train.batch = 256
    train.matmul_precision = 'highest'  # of f32 products: default, high, highest
    train.log_every = 250
    train.eval_every = 250  # a search checks its target there
    train.save_every = 1000
    train.keep = 2

    if arg == 'search':
        config.search = search = ml_collections.ConfigDict()
        search.over = 'problem.dimension'
        search.at = (1, 2, 4, 8, 16)
        search.fit_from = 4  # the growth law is that of these values and above
        search.target = 0.1  # mean squared error, in the units of y²
        search.parameters = 30_000  # at most
        search.per_octave = 3  # widths
        search.rates = (1e-2, 3e-2, 1e-1)  # learning rates, in place of config.optim.learning_rate

    config.optim = optim.get_config()
    config.optim.learning_rate = 3e-3
    return config.lock()
