"""Fitting xᵀz: the smallest network that reaches an error (task 'search'), or one of them (fit).

Source: the question is that of Jayakumar et al. (ICLR 2020), expressivity; the target of 0.1 mean
squared error on Gaussian inputs is recalled from it, and everything else here is ours.

    python -m mi.main --config=experiments/expressivity/config.py --workdir=runs/product
    python -m mi.main --config=experiments/expressivity/config.py:fit --workdir=runs/surface

A search trains about a dozen widths of each dimension, with three learning rates and five seeds.
"""

import ml_collections

from mi.fit import base_config

PRESETS = ('search', 'fit')


def get_config(arg: str = 'search') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/expressivity/config.py', arg, PRESETS)
    config = base_config.get_base_config('experiments.expressivity.problem')
    config.task = arg

    # What is learned.
    problem = config.problem
    problem.target = 'product'  # product, additive, x_only
    problem.dimension = 4  # d, of x and of z
    problem.examples = 8192  # of the evaluation

    # The network.
    config.model = base_config.get_fused_mlp_config()  # a search sets the width

    # How it is trained.
    train = config.train
    train.steps = 2000
    train.batch = 256
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

    config.optim.learning_rate = 3e-3
    return config.lock()
