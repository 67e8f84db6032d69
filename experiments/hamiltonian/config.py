"""A law of motion learned from states ('phase') or from 32×32 frames ('frames'), rolled out longer.

Source: after Hamiltonian Generative Networks (Toth et al., ICLR 2020), and for states after
Greydanus et al. (2019); the systems and their constants are recalled, networks, data and training
are ours.

    python -m mi.main --config=experiments/hamiltonian/config.py:phase --workdir=runs/phase
    python -m mi.main --config=experiments/hamiltonian/config.py:frames --workdir=runs/frames

The law is an energy that fuses q and p, or a field without an energy.
"""

import ml_collections

from mi.config import UserError, suggest
from mi.training import optim

PRESETS = ('phase', 'frames')


def get_config(arg: str = 'phase') -> ml_collections.ConfigDict:
    if arg not in PRESETS:
        raise UserError(
            f'--config=experiments/hamiltonian/config.py:{arg}: expected a preset; '
            f'{suggest(arg, PRESETS)}'
        )
    config = ml_collections.ConfigDict()
    config.task = 'fit'
    config.tracker = 'none'  # a name in mi.training.trackers.TRACKERS: none, wandb, trackio
    config.seeds = (0, 1, 2, 3, 4)

    is_phase = arg == 'phase'
    config.problem = problem = ml_collections.ConfigDict()
    module = 'phase_space' if is_phase else 'frames'
    problem.name = f'experiments.hamiltonian.{module}'
    problem.system = 'mass_spring'  # mass_spring, pendulum, two_body
    problem.trajectories = 100 if is_phase else 1000  # of the training set
    problem.horizon = 15 if is_phase else 10  # observations of each after its first
    problem.longer = 10  # horizons of the evaluation
    problem.iterations = 3 if is_phase else 2  # of the leapfrog's implicit lines; 1: as Toth et al.
    problem.examples = 50 if is_phase else 20  # trajectories of the evaluation
    if is_phase:
        problem.substeps = 3  # of the integrator between two observations, in the evaluation
    else:
        problem.seen = 3  # frames, by the encoder
        problem.decoded = 3  # later ones, of each trajectory in a batch
        problem.early = 0.5  # share of the loss on those that are seen
        problem.beta = 1.0  # of the divergence from the prior; 1: the ELBO

    config.model = model = ml_collections.ConfigDict()
    model.form = 'joint'  # joint, square, separable: of the energy; field: none
    model.width = 64
    # choose the width with about this many; 0 keeps it
    model.parameters = 4500 if is_phase else 286_600
    model.depth = 2  # hidden layers
    model.site = 'first'  # first, last, all: the maps that fuse the two streams
    model.activation = 'softplus'  # relu, softplus, tanh, identity
    model.fusion = fusion = ml_collections.ConfigDict()
    fusion.name = 'concat'
    fusion.rank = 0  # as the width
    fusion.hidden = 0  # as the width
    if not is_phase:
        model.latent = 4  # coordinates q, and momenta p
        model.hidden = 64  # width of encoder and decoder

    config.train = train = ml_collections.ConfigDict()
    train.steps = 5000 if is_phase else 2000
    train.batch = 200 if is_phase else 16
    train.matmul_precision = 'highest'  # of f32 products: default, high, highest
    train.log_every = 500
    train.eval_every = 5000 if is_phase else 2000  # at the end
    train.save_every = 2500 if is_phase else 1000
    train.keep = 2

    config.optim = optim.get_config()
    config.optim.learning_rate = 1e-2 if is_phase else 2e-3
    return config.lock()
