"""The smallest width at which a network reaches a target, by bisection, for each seed.

At every value of one number of the config, as the problem's dimension. Widths are those of a
geometric grid. At a width that is tried, every seed trains with each learning rate, and its error
is the lowest that it has with any of them, at any of the evaluations; a seed reaches the target if
that is not above it. A width that all seeds have reached the target with is trained no further.
Reaching is not monotone in the width where training is noisy: what is found is a width that reaches
the target next to one that does not.
"""

import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from jax import Array

from mi.fit import factory, train
from mi.training import (
    logger,
    optim,
    placement,
    progress,
    run_dir,
    sharding,
)

Bracket = tuple[int, int]  # the places, in the grid, of a width that fails and one that reaches
Probes = dict[int, list[logger.Record]]  # place in the grid → a record of each seed


def grid(largest: int, per_octave: int) -> list[int]:
    """1, … in steps of a factor 2^(1/per_octave), as far as they are integers; and `largest`."""
    sizes = {1, largest}
    i = 0
    while (size := round(2 ** (i / per_octave))) <= largest:
        sizes.add(size)
        i += 1
    return sorted(sizes)


def brackets(reached: dict[int, list[bool]], seeds: int, sizes: int) -> list[Bracket]:
    """Where the smallest place in the grid lies, for each seed: in (low, high].

    Args:
      reached: place → of each seed, whether it reached the target there.
      seeds, sizes: how many there are; `high` is `sizes` where no place is known to reach it.
    """
    found = []
    for seed in range(seeds):
        high = min((p for p, of in reached.items() if of[seed]), default=sizes)
        low = max((p for p, of in reached.items() if p < high and not of[seed]), default=-1)
        found.append((low, high))
    return found


def next_place(found: list[Bracket], sizes: int, guess: int, octave: int) -> int | None:
    """What to try next, None when every bracket is closed.

    The guess first; from there up or down in octaves, as a width that is too large costs most; the
    middle of the widest bracket once it has two ends.
    """
    low, high = max(found, key=lambda bracket: bracket[1] - bracket[0])
    if high - low <= 1:
        return None
    if low < 0 and high == sizes:
        return min(guess, sizes - 1)
    if high == sizes:
        return min(low + octave, sizes - 1)
    if low < 0:
        return max(high - octave, 0)
    return (low + high) // 2


def exponent(values: Sequence[float], parameters: Sequence[float]) -> float | None:
    """p of the law parameters = a · valueᵖ, by least squares of logarithms; None of under two."""
    if len(values) < 2:
        return None
    return float(np.polynomial.polynomial.polyfit(np.log(values), np.log(parameters), 1)[1])


def search(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Searches and leaves a run directory; continues it where there is one.

    metrics.jsonl has a record 'probe' of each seed, value and width tried, and at the end an 'eval'
    of each seed: `parameters/VALUE`, `width/VALUE`, `mse/VALUE` and `learning_rate/VALUE` of the
    smallest network that reached the target, where one did, and the `exponent` of their growth over
    the values that all seeds of the run reached, where these are two or more.
    """
    factory.validate(config)
    grids = {}
    for value in config.search.at:
        with progress.Work(f'sizing the networks of {config.search.over} {value}'):
            largest = factory.largest_width(_at(config, value))
        grids[value] = grid(largest, config.search.per_octave)
    with run_dir.open_run(workdir, config) as run:
        _search(config, grids, run)


def _at(config: ml_collections.ConfigDict, value: int) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({config.search.over: value})
    return config


def _search(
    config: ml_collections.ConfigDict, grids: dict[int, list[int]], run: run_dir.Run
) -> None:
    memory = run.path / 'probes.json'
    probes: dict[int, Probes] = {}  # value →
    if memory.exists():
        probes = {
            int(value): {int(place): records for place, records in of.items()}
            for value, of in json.loads(memory.read_text()).items()
        }
    run.write('cost.json', {'steps': len(grids)})
    found: dict[int, list[logger.Record | None]] = {}
    highest: list[int] = []  # of each value, the place where all seeds reach the target
    with run.open_logger(len(grids), 0) as log:
        for i, (value, sizes) in enumerate(grids.items()):
            tried = probes.setdefault(value, {})
            seconds = 0.0  # of all probes of the value; the last record of a step is what counts
            for records in tried.values():
                _write(log, i, config.seeds, value, records)
            while True:
                places = _brackets(config, tried, len(sizes))
                place = next_place(places, len(sizes), _guess(highest), config.search.per_octave)
                if place is None:
                    break
                began = time.perf_counter()
                where = f'{config.search.over} {value}, width {sizes[place]}'
                with progress.Work(f'training {where}'):
                    tried[place] = records = probe(_at(config, value), sizes[place])
                run.write('probes.json', {str(value): of for value, of in probes.items()})
                _write(log, i, config.seeds, value, records)
                seconds += time.perf_counter() - began
                log.write_timing(i, {'seconds': seconds})
                best = sorted(r['mse'] for r in records)
                log.show_progress(i, f'{where}: mse {best[0]:.4g} … {best[-1]:.4g}', '')
                if run.should_stop(recorded=True):
                    run.exit_preempted()
            found[value] = [
                tried[high][seed] if high < len(sizes) else None
                for seed, (_, high) in enumerate(places)
            ]
            highest.append(max(high for _, high in places))
            run.step = i + 1
        fitted = [
            value for value, of in found.items() if value >= config.search.fit_from and all(of)
        ]
        for seed, number in enumerate(config.seeds):
            of_seed = {value: r for value, of in found.items() if (r := of[seed]) is not None}
            log.write(run.step, number, 'eval', _summary(of_seed, fitted))


def _guess(highest: list[int]) -> int:
    """Where to try first: as far above the place of the last value as that was above its own."""
    if len(highest) < 2:
        return highest[-1] if highest else 0
    return max(0, 2 * highest[-1] - highest[-2])


def _brackets(config: ml_collections.ConfigDict, tried: Probes, sizes: int) -> list[Bracket]:
    reached = {
        place: [r['mse'] <= config.search.target for r in records]
        for place, records in tried.items()
    }
    return brackets(reached, len(config.seeds), sizes)


def _summary(found: dict[int, logger.Record], fitted: list[int]) -> logger.Record:
    """Of one seed, from the smallest network at each value; the law is that of those `fitted`."""
    law = exponent(fitted, [found[value]['parameters'] for value in fitted])
    summary: logger.Record = {'exponent': law}
    for name in ('parameters', 'width', 'mse', 'learning_rate'):
        summary |= {f'{name}/{value}': record[name] for value, record in found.items()}
    return summary


def probe(config: ml_collections.ConfigDict, width: int) -> list[logger.Record]:
    """Train all seeds at a width with every learning rate; return what the best gave each seed.

    Pairs of a seed and a rate are placed over the devices and know nothing of each other. They
    train until all seeds have reached the target. As every device has to see the errors of all for
    that, the loop over evaluations is on the host. Were each device to end on its own pairs, the
    lowest error of a seed would depend on what else is on its device, and so on their number.

    An error that is not finite, of a learning rate that is too high, counts as infinite.
    """
    problem = factory.problem(factory.of_width(config, width))
    total, every = config.train.steps, config.train.eval_every
    optimizer = optim.make_optimizer(config.optim, total)
    rates = np.asarray(config.search.rates, np.float32)
    grid_shape = len(config.seeds), len(rates)
    pairs = len(config.seeds) * len(rates)

    # Every seed with every rate, [pairs], placed over the devices.
    mesh = placement.seed_mesh(pairs)
    seeds, scales = placement.shard_seeds(
        (
            np.repeat(np.asarray(config.seeds, np.int32), len(rates)),
            np.tile(rates / config.optim.learning_rate, len(config.seeds)),
        ),
        mesh,
    )
    init = functools.partial(train.start, problem, optimizer)
    state = sharding.jit_once(placement.shard_map_seeds(init, mesh), seeds)

    def advance(state: train.State, seed: Array, scale: Array) -> tuple[train.State, Array]:
        state, _ = train.steps(problem, optimizer, every, state, seed, scale)
        return state, train.evaluate(problem, state.params, seed)['eval']['mse']

    program = placement.shard_map_seeds(advance, mesh)
    compiled = sharding.compile_fast(program, state, seeds, scales, level=1, donate_argnums=0)

    # The lowest error of each pair at any evaluation so far.
    errors = np.full(grid_shape, np.finfo(np.float64).max)
    for _ in range(total // every):
        state, latest = compiled(state, seeds, scales)
        latest = placement.gather_seeds(latest, pairs).reshape(grid_shape)
        errors = np.fmin(errors, np.where(np.isfinite(latest), latest, np.inf))
        if (errors.min(1) <= config.search.target).all():
            break
    return [
        {
            'width': width,
            'parameters': factory.parameters(problem),
            'mse': float(seed_errors.min()),
            'learning_rate': float(rates[seed_errors.argmin()]),
        }
        for seed_errors in errors
    ]


def _write(
    log: logger.RunLogger, step: int, seeds: Sequence[int], value: Any, records: list[logger.Record]
) -> None:
    for seed, record in zip(seeds, records, strict=True):
        log.write(step, seed, 'probe', {'value': value, **record})
