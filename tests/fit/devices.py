"""Prints what fit problems and a search do on 1, 2, 4 and 8 devices, as JSON.

A program of its own, because the number of devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.fit.devices DIRECTORY
"""

import contextlib
import functools
import json
import pathlib
import sys
from unittest import mock

import jax

from experiments.expressivity import config as expressivity
from mi.estimate import program
from mi.fit import factory, search, train
from mi.training import optim, placement
from tests.fit.runs import edited, records

DEVICES = jax.devices()
COUNTS = (1, 2, 4, 8)
MOVES = ((2, 4), (4, 1))  # devices before and after
COMPILATION = '/jax/core/compile/backend_compile_duration'
SMALL = {
    'train.steps': 40, 'train.log_every': 20, 'train.eval_every': 20, 'train.save_every': 20,
    'train.batch': 64, 'problem.examples': 64,
}  # fmt: skip


def config(word, **changes):
    return edited(expressivity.get_config(word), **SMALL | {'problem.dimension': 1} | changes)


def programs(config, devices):
    """Return FLOPs and collectives of the training steps and the evaluation on some devices."""
    problem, count = factory.make_problem(config), len(config.seeds)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    mesh = placement.seed_mesh(count, devices)
    state, seeds = train.shapes(problem, optimizer, count, mesh)
    measure = placement.shard_map_seeds(functools.partial(train.evaluate, problem), mesh)
    compiled = {
        'train': train.compile_steps(problem, optimizer, 20, mesh, state, seeds),
        'eval': jax.jit(measure).lower(state.params, seeds).compile(),
    }
    analyzed = {name: program.analyze(each) for name, each in compiled.items()}
    return {name: (p.flops, len(p.collectives)) for name, p in analyzed.items()}


def compilations(function, *args):
    """Return the result of a call and the names of the programs that it compiled."""
    names = []

    def listen(event, duration, fun_name='', **rest):
        if event == COMPILATION:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    result = function(*args)
    jax.monitoring.unregister_event_duration_listener(listen)
    return result, names


@contextlib.contextmanager
def only(count):
    """Within, jax has the first of its devices."""
    with mock.patch('jax.devices', lambda: DEVICES[:count]):
        yield


def move(config, path, before, after):
    """Train half of a run on some devices, and the rest on others."""
    with (
        only(before),
        mock.patch('mi.training.run_dir.Run.should_stop', lambda self, recorded: self.step == 20),
        contextlib.suppress(SystemExit),
    ):
        train.train(config, path)
    assert [each.name for each in (path / 'checkpoints').iterdir()] == ['00000020']
    with only(after):
        train.train(config, path)


def main(directory):
    path = pathlib.Path(directory)
    fit, odd = config('fit', seeds=tuple(range(8))), config('fit', seeds=(0, 1, 2))
    rates = {'seeds': (0, 1, 2, 3, 4), 'search.rates': (1e-3, 1e-2, 3e-2), 'search.target': 0.1}
    measured = {}
    for count in COUNTS:
        with only(count):
            _, trained = compilations(train.train, fit, path / str(count))
            errors, probed = compilations(search.probe, config('search', **rates), 8)
        measured[count] = {
            'programs': programs(fit, DEVICES[:count]),
            'compiled': [trained, probed],
            'records': records(path / str(count), 'train') + records(path / str(count), 'eval'),
            'probe': errors,
        }
    with only(1):
        train.train(odd, path / 'whole')
    for before, after in MOVES:
        move(odd, path / f'{before} to {after}', before, after)
    moved = [path / 'whole', *(path / f'{before} to {after}' for before, after in MOVES)]
    print(json.dumps({'counts': measured, 'moved': [records(each, 'eval') for each in moved]}))


if __name__ == '__main__':
    main(*sys.argv[1:])
