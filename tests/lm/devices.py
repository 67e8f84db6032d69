"""Prints what a few steps and an evaluation measure on one device and on four, as JSON.

A program of its own, because the number of devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.lm.devices lstm TEXTS
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType

from configs import lm
from mi import optim, parallel
from mi.lm import setup, train
from mi.lm.data import Stream, load
from mi.lm.evaluate import evaluate

MESHES = {  # devices [data, fsdp], parts of the batch
    'one': ((1, 1), 1),
    'four': ((4, 1), 1),
    'split': ((2, 2), 1),
    'parts': ((1, 2), 2),
}


def measure(config, corpus, shape, parts):
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, parallel.ROWS, (AxisType.Auto,) * 2, devices=devices)
    model, optimiser = setup.build(config, *corpus.sizes), optim.optimiser(config.optim, 10)
    seeds, B = np.asarray(config.seeds, np.int32), config.train.batch
    state = train.start(model, optimiser, seeds, B, mesh)
    streams = [Stream(corpus.tokens['train'], B, config.train.length, seed) for seed in seeds]

    def batch(step):
        return parallel.split(np.stack([stream[step] for stream in streams]), mesh, axis=2)

    compiled = train.compile_step(model, optimiser, parts, state, seeds, batch(0), None, mesh)
    nats = []
    for step in range(4):
        state, measured = compiled(state, seeds, np.int32(step), batch(step), None)
        nats.append(np.asarray(measured['nats_per_token']).tolist())
    reading = setup.reading(config)
    scores = evaluate(model, state.params, corpus, 'valid', reading, 1000, mesh)
    nats.append([score['nats_per_token'] for score in scores])
    leaves = jax.tree.leaves(state.params)
    return {'nats': nats, 'split': sum(not a.is_fully_replicated for a in leaves)}


def main(core, texts):
    config = lm.get_config(f'core={core},tiny').unlock()
    config.seeds = (0, 1)
    config.dropout.update({'input': 0.0, 'layer': 0.0, 'output': 0.0})
    if core == 'transformer':
        config.model.update({'memory': 8, 'source': 'summary', 'site': 'attention', 'layers': 1})
    corpus = load(texts, 'byte', 256)
    print(json.dumps({name: measure(config, corpus, *how) for name, how in MESHES.items()}))


if __name__ == '__main__':
    main(*sys.argv[1:])
