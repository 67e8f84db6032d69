"""Config that searches for the smallest network that fits xᵀz, or fits one network ('fit').

    python -m mi.main --config=experiments/expressivity/config.py --workdir=runs/product
    python -m mi.main --config=experiments/expressivity/config.py:fit --workdir=runs/surface
    python -m mi.main --config=experiments/expressivity/config.py:paper --workdir=runs/paper

A search trains about a dozen widths for each dimension, with three learning rates and five seeds.

Source: Jayakumar et al. (ICLR 2020), section on expressivity, for the question, the targets xᵀz and
xᵀWz, and the mean squared error of 0.1 on Gaussian inputs. The preset 'paper' follows their
protocol as far as it is known: Adam, 6,000 steps of 100 examples, the best of three learning rates,
and a plot up to 2,500 parameters. One hidden layer is recalled from memory. The constant learning
rate, the other constants of Adam, the choice of widths, the evaluation and the five seeds are ours.
Everything else in the other presets is ours.
"""

import ml_collections

from mi.fit import base_config

PRESETS = ('search', 'fit', 'paper')


def get_config(arg: str = 'search') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/expressivity/config.py', arg, PRESETS)
    config = base_config.get_base_config('experiments.expressivity.problem')
    config.task = 'fit' if arg == 'fit' else 'search'

    # What is learned.
    problem = config.problem
    problem.target = 'product'  # product, bilinear, additive, x_only
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

    if config.task == 'search':
        config.search = search = ml_collections.ConfigDict()
        search.over = 'problem.dimension'
        search.at = (1, 2, 4, 8, 16)
        search.fit_from = 4  # the growth law is that of these values and above
        search.target = 0.1  # mean squared error, in the units of y²
        search.parameters = 30_000  # at most
        search.per_octave = 3  # widths
        search.rates = (1e-2, 3e-2, 1e-1)  # learning rates, in place of config.optim.learning_rate

    config.optim.learning_rate = 3e-3
    if arg == 'paper':
        _set_paper_protocol(config)
    return config.lock()


def _set_paper_protocol(config: ml_collections.ConfigDict) -> None:
    train, search, optim = config.train, config.search, config.optim
    train.steps = 6000
    train.batch = 100
    train.log_every = train.eval_every = 500  # ours
    train.save_every = 6000

    search.at = tuple(range(1, 21))
    search.fit_from = 1
    search.parameters = 2500
    search.rates = (1e-1, 1e-3, 1e-4)

    optim.schedule = 'constant'  # ours, as are the next two
    optim.warmup_steps = 0
    optim.clip_norm = 0.0
