"""DMLab-30: thirty levels of DeepMind Lab, one IMPALA agent; the engine is built by hand.

    python -m mi.main --config=configs/rl_dmlab30.py --workdir=runs/dmlab30
    python -m mi.main --config=configs/rl_dmlab30.py:fusion=concat --workdir=runs/concat
    python -m mi.main --config=configs/rl_dmlab30.py:smoke --workdir=runs/smoke

Source: network, unroll, reward clipping, discount and RMSProp are those of IMPALA's deep agent
(Espeholt et al., 2018), PopArt's step that of Hessel et al. (2019), as recalled; learning rate and
entropy cost lie within the ranges that IMPALA searched, and were not tuned. The batch is two groups
of thirty engines, as a group needs a row for each level; IMPALA's is 32. Jayakumar et al. (ICLR
2020) train on these levels; their sites and sizes are not known to us.

default      10 billion frames, 2.5 billion steps of 4 frames
smoke        a minute on a laptop, on Catch instead of the engine: shows that everything runs

Nothing here was measured by us: no machine of ours has the engine. docs/tutorials/dmlab30.md.
"""

import ml_collections

from configs import arguments, rl

PRESETS: dict[str, arguments.Settings] = {
    'default': {},
    'smoke': {
        'env.name': 'catch',
        'model.torso': 'auto',
        'model.features': 32,
        'model.hidden': 32,
        'model.instruction': False,
        'train.steps': 60_000,
        'train.length': 20,
        'train.log_every': 10,
        'train.eval_every': 50,
        'train.save_every': 50,
        'actors.number': 1,
    },
}
KEYS = {'fusion': 'model.fusion.name'}


def get_config(arg: str = 'default') -> ml_collections.ConfigDict:
    argument = arguments.parse('configs/rl_dmlab30.py', arg, PRESETS, KEYS)
    # IMPALA's deep agent on the thirty levels.
    config = rl.get_config().unlock()
    config.env.name = 'dmlab30'
    config.model.torso = 'deep'
    config.model.features = config.model.hidden = 256
    config.model.instruction = True
    config.model.dtype = 'bfloat16'
    config.loss.discount = 0.99
    config.loss.lambda_ = 1.0
    config.loss.entropy_cost = 3e-3
    config.loss.reward_clip = 'paper'
    config.loss.popart = 3e-4
    config.loss.popart_corrected = True  # else σ = 1 stays for thousands of updates

    # Actors in threads; a group needs a row for each level.
    config.train.topology = 'threads'
    config.train.steps = 2_500_000_000
    config.train.batch = 60
    config.train.length = 100
    config.train.log_every = 50
    config.train.eval_every = 10_000
    config.train.save_every = 1_000
    config.actors.number = 8
    config.actors.batch = 30
    config.actors.timeout = 600.0  # maps are compiled at first
    config.eval.episodes = 10

    # IMPALA's optimizer, then what the argument names.
    config.optim.name = 'rmsprop'
    config.optim.learning_rate = 2e-4
    config.optim.schedule = 'linear'
    config.optim.b1 = 0.0  # no momentum
    config.optim.b2 = 0.99
    config.optim.eps = 0.1
    config.update_from_flattened_dict(argument.merge(PRESETS))
    config.update_from_flattened_dict(argument.values)
    return config.lock()
