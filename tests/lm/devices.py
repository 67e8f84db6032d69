"""Prints what a few steps and an evaluation measure on one device and on four, as JSON.

A program of its own, because the number of devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.lm.devices lstm TEXTS

A third argument has keys of `optim` as JSON; those after it name the meshes, of all otherwise.
"""

import json
import math
import sys

import jax
import numpy as np

from configs import lm
from mi.lm import config as lm_config
from mi.lm import factory
from mi.lm.data.batches import BatchLoader
from mi.lm.data.streams import Stream
from mi.lm.data.token_store import Recipe, load
from mi.lm.evaluate import Excerpt, evaluate
from mi.lm.trainer import Trainer
from mi.training import averaging, optim, sharding

MESHES = {  # devices [seed, data, fsdp], parts of the batch
    'one': ((1, 1, 1), 1),
    'four': ((1, 4, 1), 1),
    'seeds': ((2, 2, 1), 1),
    'split': ((1, 2, 2), 1),
    'all': ((2, 1, 2), 1),
    'parts': ((1, 1, 2), 2),
}


def measure(config, corpus, shape, parts):
    devices = jax.devices()[: math.prod(shape)]
    mesh = sharding.make_mesh(len(config.seeds), config.train.batch, shape=shape, devices=devices)
    seeds, B = np.asarray(config.seeds, np.int32), config.train.batch
    trainer = Trainer(
        factory.build_model(config, *corpus.sizes), optim.make_optimizer(config.optim, 10), B, parts
    )
    state = trainer.init_seeds(seeds, mesh)
    streams = [Stream(corpus.tokens['train'], B, config.train.length, seed) for seed in seeds]
    loader = BatchLoader(corpus, streams, seeds, False, mesh)
    compiled = trainer.compile(state, loader.load(0), mesh)
    nats, norms = [], []
    for step in range(4):
        state, metrics = compiled(state, loader.load(step))
        nats.append(np.asarray(metrics['nats_per_token']).tolist())
        norms.append(np.asarray(metrics['gradient_norm']).tolist())
    reading = lm_config.get_reading(config)
    excerpt = Excerpt(corpus, 'valid', 1000)
    params = averaging.get_seeds_eval_params(state.opt_state, state.params)
    scores = evaluate(trainer.model, params, excerpt, reading, mesh)
    nats.append([score['nats_per_token'] for score in scores])
    leaves = jax.tree.leaves(state.params)
    split = sum(not a.is_fully_replicated for a in leaves)
    # Entries of the optimizer on one device, as a share of all: those of its seeds at most.
    opt_leaves = jax.tree.leaves(state.opt_state)
    local = sum(math.prod(a.sharding.shard_shape(a.shape)) for a in opt_leaves)
    share = local / sum(a.size for a in opt_leaves)
    return {'nats': nats, 'norms': norms, 'split': split, 'share': share}


def main(core, texts, changes='{}', *meshes):
    config = lm.get_config(f'core={core},tiny').unlock()
    config.seeds = (0, 1)
    # Adam and a clipped norm would hide a gradient of the wrong size.
    config.optim.update({'name': 'sgd', 'learning_rate': 0.5, 'clip_norm': 0.0})
    config.optim.update(json.loads(changes))
    config.dropout.update({'word': 0.2, 'input': 0.2, 'layer': 0.2, 'state': 0.2, 'output': 0.2})
    if core == 'transformer':
        config.dropout.update({'state': 0.0, 'attention': 0.2})
        config.model.update({'memory': 8, 'source': 'summary', 'site': 'attention', 'layers': 1})
    corpus = load(Recipe(texts, 'byte', 256))
    printed = {name: measure(config, corpus, *MESHES[name]) for name in meshes or MESHES}
    print(json.dumps(printed))


if __name__ == '__main__':
    main(*sys.argv[1:])
