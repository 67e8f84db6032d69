"""Config for Transformers with attention or other mixers, on functions of short sequences.

Source: the question of Yun et al., Are Transformers universal approximators of sequence-to-sequence
functions? (ICLR 2020), who prove which functions attention and some other mixers can represent. The
targets, the sizes and the training are ours.

    python -m mi.main --config=experiments/seq2seq/config.py --workdir=runs/sequences

Networks for four targets and five seeds are trained simultaneously.
"""

import ml_collections

from mi.fit import base_config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/seq2seq/config.py', arg)
    config = base_config.get_base_config('experiments.seq2seq.problem')

    # What is learned.
    problem = config.problem
    problem.targets = ('difference', 'farthest', 'reverse', 'sort')
    problem.length = 5  # n, tokens
    problem.features = 2  # d, of a token
    problem.temperature = 0.5  # τ, of the target 'farthest'
    problem.examples = 4096  # of the evaluation
    problem.orbits = 64  # sequences that are taken in all n! orders, for the equivariant floor
    problem.floor_examples = 16384  # of the additive floor

    # The network.
    config.model = model = ml_collections.ConfigDict()
    model.width = 32  # of the feed-forward layers
    # choose the width with about this many; 0 keeps it. Counts the networks of all targets, where
    # cost.json and the report count one: with four targets, 8,000 here are 2,000 there
    model.parameters = 0
    model.depth = 2  # L, mixers
    model.features = 16  # C, of the stream
    model.heads = 4  # H; a divisor of the features
    model.mixer = 'attention'  # attention, pairs, dynamic_conv, fixed, summary
    model.positions = 'learned'  # none, learned: added to the tokens
    model.ends = 'feed_forward'  # feed_forward, mixer
    model.fusion = fusion = ml_collections.ConfigDict()
    fusion.name = 'mi_low_rank'  # of pairs and summary
    fusion.options = ml_collections.ConfigDict()  # other fields of its module
    fusion.rank = 0  # as the features
    fusion.hidden = 0  # as the features

    # How it is trained.
    train = config.train
    train.steps = 1200
    train.batch = 32
    train.log_every = 200
    train.eval_every = 200
    train.save_every = 600

    config.optim.learning_rate = 5e-3
    config.optim.clip_norm = 0.0  # clipping would couple the networks of the targets
    return config.lock()
