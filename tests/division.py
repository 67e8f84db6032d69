"""Prints what programs compute and send on each of 1, 2, 4 and 8 devices, as JSON.

A program of its own, because the number of devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.division lm/lstm rl/fused

Nothing is run: states and batches are shapes.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import lm, rl
from mi.estimate import costs, program
from mi.lm import config as lm_keys
from mi.lm import evaluate, factory
from mi.lm.trainer import Trainer
from mi.rl import evaluate as rl_evaluate
from mi.rl import factory as rl_setup
from mi.rl.actors import loop as actors_loop
from mi.rl.fused import loop as fused
from mi.training import optim, sharding

V = 64


def lm_config(word='', **changes):
    config = lm.get_config(f'{word},tiny' if word else 'tiny').unlock()
    config.model.update({'embed': 16, 'hidden': 32, 'context': 8, 'ffn': 64, 'layers': 1})
    config.train.update({'batch': 16, 'length': 8})
    config.update_from_flattened_dict(changes)
    return config.lock()


def lm_parts(config, count):
    """Return model, mesh, shapes of the state and of the seeds, on this number of devices."""
    lm_keys.validate(config)
    trainer = Trainer(
        factory.build_model(config, V),
        optim.make_optimizer(config.optim, 10),
        config.train.batch,
        config.train.accumulate,
    )
    seeds, batch = np.asarray(config.seeds, np.int32), config.train.batch
    fsdp = count if config.train.fsdp > 1 else 1
    mesh = sharding.make_mesh(len(seeds), batch, fsdp, config.train.mesh, jax.devices()[:count])
    return trainer, mesh, seeds, trainer.shapes(seeds, mesh)


def lm_step(config, count):
    trainer, mesh, seeds, state = lm_parts(config, count)
    batch = trainer.batch_shapes(seeds, config.train.length, mesh)
    return trainer.compile(state, batch, mesh), state.params


def lm_evaluation(config, count):
    trainer, mesh, seeds, state = lm_parts(config, count)
    model = trainer.model
    carry = jax.eval_shape(
        jax.vmap(lambda _: model.initial_carry(config.train.batch)), jnp.zeros(len(seeds))
    )
    rows = sharding.batch_sharding(mesh, 1)
    shape = config.train.length, config.train.batch
    tokens, mask = (jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in ('int32', 'bool'))
    segment = evaluate.segment_program(model, mesh)
    return segment.lower(state.params, carry, tokens, tokens, mask, None).compile(), state.params


def rl_parts(count, **changes):
    config = rl.get_config('tiny,env=catch').unlock()
    config.train.update({'batch': 16, 'length': 4, 'log_every': 2, 'eval_every': 2})
    config.train.save_every = 2
    config.update_from_flattened_dict({'loss.popart': 0.01, **changes})
    devices = jax.devices()[:count]
    mesh = sharding.make_mesh(len(config.seeds), config.train.batch, devices=devices)
    return config.lock(), costs.make_rl_setup(config), mesh


def rl_fused(count, **changes):
    config, (environment, agent, optimizer, *_), mesh = rl_parts(count, **changes)
    state = fused.get_state_shapes(config, environment, agent, optimizer, mesh)
    update = fused.make_update(config, environment, agent, optimizer)
    return fused.compile_updates(update, state, 2, mesh), state.learner.params


def rl_learner(count):
    config, (_, agent, optimizer, state, trajectory), mesh = rl_parts(
        count, **{'train.topology': 'threads', 'actors.batch': 16}
    )
    update = actors_loop.jit_update(agent, optimizer, rl_setup.get_hyperparameters(config), mesh)
    return actors_loop.lower_update(update, state, trajectory, mesh).compile(), state.params


def rl_evaluation(count, **changes):
    config, (environment, agent, optimizer, *_), mesh = rl_parts(count, **changes)
    state = fused.get_state_shapes(config, environment, agent, optimizer, mesh)
    by_seed = sharding.seed_sharding(mesh)
    keys = jax.ShapeDtypeStruct((len(config.seeds), 2), jnp.int32, sharding=by_seed)
    simulation = rl_evaluate.Simulation(environment, agent, mesh)
    play = rl_evaluate.make_program(simulation, 16, False)
    return play.lower(state.learner.params, keys).compile(), state.learner.params


EIGHT = tuple(range(8))
TRANSFORMER = 'core=transformer'
LM = {
    'lstm': {},
    'mlstm': {'model.core': 'mlstm'},
    'mi_lstm': {'model.core': 'mi_lstm'},
    'mogrifier': {'model.core': 'mogrifier'},
    'hyper_lstm': {'model.core': 'hyper_lstm'},
    'state': {'model.source': 'state'},
    'adaptive': {'model.cutoffs': (16, 32)},
    'blocks': {'model.cutoffs': (16, 32), 'loss.chunk': 96},
    'chunk': {'loss.chunk': 96},
    'dropout': {'dropout.input': 0.1, 'dropout.word': 0.1, 'dropout.state': 0.1},
    'accumulate': {'train.accumulate': 2},
    'transformer': {},
    'memory': {'model.memory': 8, 'model.positions': 'relative', 'model.site': 'attention'},
}


MAIN = ('lstm', 'transformer')


def lm_cases(name, changes):
    word = TRANSFORMER if name in ('transformer', 'memory') else ''
    step = functools.partial(lm_config, word, **changes)
    yield f'lm/{name}', lambda count: lm_step(step(), count)
    if name in (*MAIN, 'adaptive', 'memory'):
        yield f'lm/{name}/evaluation', lambda count: lm_evaluation(step(), count)
    if name in (*MAIN, 'adaptive'):
        larger = {'model.hidden': 64, 'model.embed': 64, 'train.fsdp': 2}
        split = functools.partial(lm_config, word, **changes, **larger)
        yield f'fsdp/{name}', lambda count: lm_step(split(), count)
        yield f'fsdp/{name}/evaluation', lambda count: lm_evaluation(split(), count)
    if name in MAIN:
        seeds = functools.partial(lm_config, word, **changes, seeds=EIGHT)
        yield f'seeds/{name}', lambda count: lm_step(seeds(), count)
        yield f'seeds/{name}/evaluation', lambda count: lm_evaluation(seeds(), count)


CASES = dict(case for name, changes in LM.items() for case in lm_cases(name, changes)) | {
    'rl/fused': rl_fused,
    'rl/transformer': lambda count: rl_fused(
        count, **{'model.core': 'transformer', 'train.batch': 64}
    ),
    'rl/learner': rl_learner,
    'rl/evaluation': rl_evaluation,
    'seeds/fused': lambda count: rl_fused(count, seeds=EIGHT),
    'seeds/rl_evaluation': lambda count: rl_evaluation(count, seeds=EIGHT),
}


# One of each way to divide: a step by its batch, parameters, seeds, an agent's update by its batch.
FIRST = ('lm/chunk', 'fsdp/transformer', 'seeds/transformer/evaluation', 'rl/learner')
OTHERS = tuple(case for case in CASES if case not in FIRST)

WHOLE = {'lm/lstm', 'fsdp/lstm', 'seeds/fused', 'rl/fused'}
COUNTS = {case: (1, 2, 4, 8) if case in WHOLE else (1, 8) for case in CASES}


def measure(case):
    rows = {}
    for count in COUNTS[case]:
        compiled, params = CASES[case](count)
        read = program.analyze(compiled)
        rows[count] = {
            'flops': read.flops,
            'sent': read.bytes_sent,
            'collectives': [dataclasses.asdict(each) for each in read.collectives],
            'params': sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params)),
            'temporaries': compiled.memory_analysis().temp_size_in_bytes,
        }
    return rows


if __name__ == '__main__':
    print(json.dumps({case: measure(case) for case in sys.argv[1:] or CASES}))
