"""Config that classifies handwritten digits by convolutions or quadratic self-attention.

Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers (ICLR
2020), for the layer, its encoding and the initial centers. The images (theirs were CIFAR-10), the
network and the training are ours.

    python -m mi.main --config=experiments/attention_conv/config.py --workdir=runs/centres
    python -m mi.main --config=experiments/attention_conv/config.py \
        --config.model.layer=convolution --workdir=runs/convolutions

This config needs scikit-learn, from the extra `digits`.
"""

import ml_collections

from mi.fit import base_config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    base_config.check_preset('experiments/attention_conv/config.py', arg)
    config = base_config.get_base_config('experiments.attention_conv.problem')

    # What is learned.
    problem = config.problem
    problem.train = 1200  # images to learn from; the other 597 are held out
    # For the heads that replace a convolution, at the end of a run with convolutions.
    problem.alphas = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 32.0, 100.0)

    # The network.
    config.model = model = ml_collections.ConfigDict()
    model.width = 16  # channels
    model.parameters = 0  # choose the width with about this many; 0 keeps it
    model.depth = 3  # layers
    model.layer = 'attention'  # attention, convolution
    model.heads = 9  # of attention
    # learnt: initially from N(0, 2); fixed: not trained, nor is α; grid: learned, initially
    # the offsets of a kernel.
    model.centres = 'learnt'
    model.alpha = 1.0  # of all heads, at first
    model.kernel = 3  # of convolution

    # How it is trained.
    train = config.train
    train.steps = 1200
    train.batch = 32
    train.log_every = 100
    train.eval_every = 200
    train.save_every = 600

    config.optim.learning_rate = 1e-2
    return config.lock()
