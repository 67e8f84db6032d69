"""Config that learns a law of motion from states ('phase') or from 32×32 frames ('frames').

Source: Hamiltonian Generative Networks (Toth et al., ICLR 2020) and, for states, Greydanus et al.
(2019). The systems and their constants are recalled from memory. The networks, data and training
are ours.

    python -m mi.main --config=experiments/hamiltonian/config.py:phase --workdir=runs/phase
    python -m mi.main --config=experiments/hamiltonian/config.py:frames --workdir=runs/frames

The law is an energy that fuses q and p, or a field without an energy. Predictions are longer than
the training trajectories.
"""

import ml_collections

from mi.fit import base_config

PRESETS = ('phase', 'frames')


def get_config(arg: str = 'phase') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/hamiltonian/config.py', arg, PRESETS)
    is_phase = arg == 'phase'
    module = 'phase_space' if is_phase else 'frames'
    config = base_config.get_base_config(f'experiments.hamiltonian.{module}')

    # What is learned.
    problem = config.problem
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

    # The network.
    config.model = model = base_config.get_fused_mlp_config()
    model.form = 'joint'  # joint, square, separable: of the energy; field: none
    model.width = 64
    model.parameters = 4500 if is_phase else 286_600  # choose the width with about this many
    model.depth = 2  # hidden layers
    model.site = 'first'  # the map that fuses the two streams
    model.activation = 'softplus'
    if not is_phase:
        model.latent = 4  # coordinates q, and momenta p
        model.hidden = 64  # width of encoder and decoder

    # How it is trained.
    train = config.train
    train.steps = 5000 if is_phase else 2000
    train.batch = 200 if is_phase else 16
    train.log_every = 500
    train.eval_every = 5000 if is_phase else 2000  # at the end
    train.save_every = 2500 if is_phase else 1000
    train.keep = 2

    config.optim.learning_rate = 1e-2 if is_phase else 2e-3
    return config.lock()
