"""DMLab-30: one IMPALA agent on thirty levels of DeepMind Lab, whose engine is built by hand.

    python -m mi.main --config=configs/rl_dmlab30.py --workdir=runs/dmlab30
    python -m mi.main --config=configs/rl_dmlab30.py:fusion=concat --workdir=runs/concat
    python -m mi.main --config=configs/rl_dmlab30.py:smoke --workdir=runs/smoke

The settings have these sources:

[paper]     Jayakumar et al. (ICLR 2020) train all thirty levels together, with 5 actors for each
            level, 150 in total, and one learner on 4 GPUs.
[sources]   The agent is IMPALA (Espeholt et al., 2018) with PopArt (Hessel et al., 2019). The
            public code of IMPALA has a deep residual torso, an LSTM of 256, unrolls of 100, γ 0.99,
            an action repeat of 4, a batch of 32, learning rate 3.1867e-4, entropy cost 3.339e-3,
            baseline cost 0.5, 10 billion frames, a learning rate that decays linearly to 0, no
            clipping of gradients, and RMSProp with decay 0.99, ε 0.1 and no momentum. PopArt's
            step is 3e-4.
[recalled]  The fusion is at the read-outs of the policy and the value, with the arms of
            experiments/rl_dmlab30.py. The reward clipping is that of the paper on IMPALA.
[ours]      Full MI with the task's one-hot index, bfloat16 products, and the batch of 60. The
            paper's batch is not known.

In IMPALA, an actor is one engine. Here, an actor is a thread with groups of engines, and a group
has a row for each level. The 150 engines are thus five actors with one group of thirty engines
each, and every engine has its own process. While one thread waits for its engines, the policy
serves another. A trajectory in the queue has the thirty rows of a group. An update takes two
trajectories, which are 60 rows, or 15 on each of 4 GPUs.

The public code sums the loss over its batch of 32, whereas ours is a mean. With ε under the root,
RMSProp makes the same steps for gradients 32 g, ε = 0.1 and an initial mean square of 1, as for g,
ε = 0.1 / 32² and 1 / 32², the values used here.

default      10 billion frames, which are 2.5 billion steps of 4 frames
smoke        a minute on a laptop, on Catch instead of the engine, to show that everything runs

We have not trained this agent, because we do not have the engine; see docs/tutorials/dmlab30.md.
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
    config.model.sites = ('readout',)
    config.model.instruction = True
    config.model.dtype = 'bfloat16'
    config.loss.discount = 0.99
    config.loss.lambda_ = 1.0
    config.loss.entropy_cost = 3.339e-3
    config.loss.reward_clip = 'paper'
    config.loss.popart = 3e-4
    config.loss.popart_corrected = True  # else σ = 1 stays for thousands of updates

    # Five engines for each level: five actors with a group of a row for each level.
    config.train.topology = 'threads'
    config.train.steps = 2_500_000_000
    config.train.batch = 60
    config.train.length = 100
    config.train.log_every = 50
    config.train.eval_every = 10_000
    config.train.save_every = 1_000
    config.actors.number = 5
    config.actors.groups = 1
    config.actors.batch = 30
    config.actors.timeout = 600.0  # maps are compiled at first
    config.eval.episodes = 10

    # IMPALA's optimizer, then what the argument names.
    config.optim.name = 'optax:rmsprop'
    config.optim.options.update({'decay': 0.99, 'eps': 0.1 / 32**2, 'initial_scale': 1 / 32**2})
    config.optim.learning_rate = 3.1867e-4
    config.optim.schedule = 'linear'
    config.optim.clip_norm = 0.0
    config.update_from_flattened_dict(argument.merge(PRESETS))
    config.update_from_flattened_dict(argument.values)
    return config.lock()
