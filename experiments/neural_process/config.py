"""Config for neural processes, which predict functions from a few of their points.

Source: conditional neural processes (Garnelo et al., 2018a), neural processes (Garnelo et al.,
2018b) and attentive neural processes (Kim et al., 2019). The multiplicative decoder is that of
Jayakumar et al. (ICLR 2020), recalled from memory. The functions, sizes and training are ours.

    python -m mi.main --config=experiments/neural_process/config.py --workdir=runs/cnp
    python -m mi.main --config=experiments/neural_process/config.py:latent --workdir=runs/np
    python -m mi.main --config=experiments/neural_process/config.py:attentive --workdir=runs/anp

Ten seeds train simultaneously.
"""

import ml_collections

from mi.fit import base_config

PRESETS = ('conditional', 'latent', 'attentive')


def get_config(arg: str = 'conditional') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/neural_process/config.py', arg, PRESETS)
    config = base_config.get_base_config('experiments.neural_process.problem')
    config.seeds = tuple(range(10))

    # The functions.
    problem = config.problem
    problem.family = 'mixture'  # rbf, periodic, sinusoid, mixture
    problem.noise = 0.1  # standard deviation, on y
    problem.scale = (1.0, 1.0)  # interval of the standard deviation of f(x)
    problem.length = (0.6, 1.2)  # interval of the length scale of rbf; x is in [−2, 2]
    problem.periodic_length = (1.0, 2.0)  # interval of that of periodic, in units of its own
    problem.period = (2.0, 4.0)  # interval of the period, of periodic and sinusoid

    # What is seen of them.
    problem.max_context = 16  # points of context; their number is uniform from 0 on
    problem.targets = 16  # points to predict
    problem.functions = 96  # in an evaluation
    problem.contexts = (0, 1, 2, 4, 8, 16)  # points of context in an evaluation
    problem.samples = 32  # of the latent, in an evaluation

    # The encoder.
    config.model = model = base_config.get_fused_mlp_config()
    model.paths = 'deterministic'  # deterministic, latent, both
    model.features = 16  # of the representation and of the latent
    model.encoder_width = 48
    model.encoder_depth = 2  # hidden layers
    model.self_attention = 0  # heads, between points of context; 0 for none
    model.cross_attention = 0  # heads, from targets to the context; 0 for their mean

    # The decoder.
    model.parameters = 15_100  # choose the width with about this many, of the whole model
    model.depth = 2  # hidden layers
    model.site = 'all'  # first, last, all: the maps that take the representation or the latent
    model.fusion.name = 'mi'
    model.min_std = 0.05  # of a prediction

    # How it is trained.
    train = config.train
    train.steps = 4000
    train.batch = 12  # functions
    train.log_every = 1000
    train.eval_every = 2000
    train.save_every = 2000

    config.optim.learning_rate = 5e-3
    if arg == 'latent':
        model.paths = 'latent'
        model.parameters = 20_600
    elif arg == 'attentive':
        model.paths = 'both'
        model.self_attention = model.cross_attention = 4
        model.parameters = 56_000
    return config.lock()
