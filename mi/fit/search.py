"""Find the smallest width at which a network reaches a target error, by bisection, for each seed.

A search repeats for every value of one number of the config, such as the problem's dimension.
Widths come from a geometric grid. At each width that is tried, every seed trains with each learning
rate; its error is the lowest at any evaluation with any of them, and it reaches the target if that
error is not above it. Training at a width ends early once all seeds have reached the target.

Noisy training need not be monotone in the width: the result is a width that reaches the target next
to one that does not.
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

Bracket = tuple[int, int]  # places in the grid: a width that fails, and one that reaches the target
Probes = dict[int, list[logger.Record]]  # place in the grid → a record of each seed


def make_grid(largest: int, per_octave: int) -> list[int]:
    """Return the integers 2^(i / per_octave), i = 0, 1, …, up to `largest`, and `largest`."""
    sizes = {1, largest}
    i = 0
    while (size := round(2 ** (i / per_octave))) <= largest:
        sizes.add(size)
        i += 1
    return sorted(sizes)


def find_brackets(reached: dict[int, list[bool]], seeds: int, sizes: int) -> list[Bracket]:
    """Return (low, high] for each seed, which contains its smallest place in the grid.

    Args:
      reached: place → whether each seed reached the target there.
      seeds: number of seeds.
      sizes: number of places; `high` is `sizes` if no place is known to reach the target.
    """
    brackets = []
    for seed in range(seeds):
        high = min((p for p, hits in reached.items() if hits[seed]), default=sizes)
        misses = (p for p, hits in reached.items() if p < high and not hits[seed])
        brackets.append((max(misses, default=-1), high))
    return brackets


def next_place(brackets: list[Bracket], sizes: int, guess: int, octave: int) -> int | None:
    """Return the place to try next; None when every bracket is closed.

    The first is the guess. From there the search goes up or down in octaves, as a width that is too
    large costs most, and then to the middle of the widest bracket once that has two ends.
    """
    low, high = max(brackets, key=lambda bracket: bracket[1] - bracket[0])
    if high - low <= 1:
        return None
    if low < 0 and high == sizes:
        return min(guess, sizes - 1)
    if high == sizes:
        return min(low + octave, sizes - 1)
    if low < 0:
        return max(high - octave, 0)
    return (low + high) // 2


def fit_exponent(values: Sequence[float], parameters: Sequence[float]) -> float | None:
    """Fit p of parameters = a · valueᵖ, by least squares of logarithms; None under two values."""
    if len(values) < 2:
        return None
    return float(np.polynomial.polynomial.polyfit(np.log(values), np.log(parameters), 1)[1])


def search(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Search and write a run directory; resume it if there is one.

    metrics.jsonl has a record 'probe' of each seed, value and width tried, and at the end an 'eval'
    of each seed: `parameters/VALUE`, `width/VALUE`, `mse/VALUE` and `learning_rate/VALUE` of the
    smallest network that reached the target, if one did, and the `exponent` of their growth over
    the values that all seeds of the run reached, if these are two or more.
    """
    factory.validate(config)
    grids = {}
    for value in config.search.at:
        with progress.Work(f'sizing the networks of {config.search.over} {value}'):
            largest = factory.largest_width(_set_value(config, value))
        grids[value] = make_grid(largest, config.search.per_octave)
    with run_dir.open_run(workdir, config) as run:
        _Search(config, grids, run).run()


def _set_value(config: ml_collections.ConfigDict, value: int) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({config.search.over: value})
    return config


class _Search:
    """The search of a run; its probes are saved after each one, and read again on a resume."""

    def __init__(
        self, config: ml_collections.ConfigDict, grids: dict[int, list[int]], run: run_dir.Run
    ):
        self._config, self._grids, self._run = config, grids, run
        self._probes: dict[int, Probes] = {}  # by value
        file = run.path / 'probes.json'
        if file.exists():
            self._probes = {
                int(value): {int(place): records for place, records in probes.items()}
                for value, probes in json.loads(file.read_text()).items()
            }

    def run(self) -> None:
        """Search at every value, then write the summary of each seed."""
        config, run = self._config, self._run
        run.write('cost.json', {'steps': len(self._grids)})
        smallest: dict[int, list[logger.Record | None]] = {}  # by value, of each seed
        highest: list[int] = []  # for each value, the place where all seeds reach the target
        with run.open_logger(len(self._grids), 0) as log:
            for step, (value, sizes) in enumerate(self._grids.items()):
                brackets = self._search_value(log, step, value, _guess(highest))
                probes = self._probes[value]
                smallest[value] = [
                    probes[high][seed] if high < len(sizes) else None
                    for seed, (_, high) in enumerate(brackets)
                ]
                highest.append(max(high for _, high in brackets))
                run.step = step + 1
            fitted = [
                value
                for value, records in smallest.items()
                if value >= config.search.fit_from and all(records)
            ]
            for i, seed in enumerate(config.seeds):
                records = {v: record for v, r in smallest.items() if (record := r[i]) is not None}
                log.write(run.step, seed, 'eval', _summarize(records, fitted))

    def _search_value(
        self, log: logger.RunLogger, step: int, value: int, guess: int
    ) -> list[Bracket]:
        """Train at one width after the other until the bracket of every seed is closed."""
        config, run, sizes = self._config, self._run, self._grids[value]
        probes = self._probes.setdefault(value, {})
        seconds = 0.0  # sum over all probes of the value; the last record of a step is what counts
        for records in probes.values():
            _write_probe(log, step, config.seeds, value, records)
        while True:
            brackets = _brackets_of_probes(config, probes, len(sizes))
            place = next_place(brackets, len(sizes), guess, config.search.per_octave)
            if place is None:
                return brackets

            # Train all seeds at this width.
            start_time = time.perf_counter()
            title = f'{config.search.over} {value}, width {sizes[place]}'
            with progress.Work(f'training {title}'):
                records = probe(_set_value(config, value), sizes[place])

            # Save the probe before its record is written, so that a resume writes it again.
            probes[place] = records
            run.write('probes.json', {str(v): saved for v, saved in self._probes.items()})
            _write_probe(log, step, config.seeds, value, records)
            seconds += time.perf_counter() - start_time
            log.write_timing(step, {'seconds': seconds})
            errors = sorted(record['mse'] for record in records)
            log.show_progress(step, f'{title}: mse {errors[0]:.4g} … {errors[-1]:.4g}', '')
            if run.should_stop(recorded=True):
                run.exit_preempted()


def _guess(highest: list[int]) -> int:
    """Guess a place: as far above that of the last value as that was above its predecessor."""
    if len(highest) < 2:
        return highest[-1] if highest else 0
    return max(0, 2 * highest[-1] - highest[-2])


def _brackets_of_probes(
    config: ml_collections.ConfigDict, probes: Probes, sizes: int
) -> list[Bracket]:
    reached = {
        place: [record['mse'] <= config.search.target for record in records]
        for place, records in probes.items()
    }
    return find_brackets(reached, len(config.seeds), sizes)


def _summarize(records: dict[int, logger.Record], fitted: list[int]) -> logger.Record:
    """Summarize one seed: its smallest network at each value, and the law of those `fitted`."""
    law = fit_exponent(fitted, [records[value]['parameters'] for value in fitted])
    summary: logger.Record = {'exponent': law}
    for name in ('parameters', 'width', 'mse', 'learning_rate'):
        summary |= {f'{name}/{value}': record[name] for value, record in records.items()}
    return summary


def probe(config: ml_collections.ConfigDict, width: int) -> list[logger.Record]:
    """Train all seeds at a width with every learning rate; return what the best gave each seed.

    Pairs of a seed and a rate are placed over the devices and know nothing of each other. They
    train until all seeds have reached the target. As every device has to see the errors of all for
    that, the loop over evaluations is on the host. Were each device to end on its own pairs, the
    lowest error of a seed would depend on what else is on its device, and so on their number.

    An error that is not finite, of a learning rate that is too high, counts as infinite.
    """
    problem = factory.make_problem(factory.set_width(config, width))
    total, eval_every = config.train.steps, config.train.eval_every
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
    init = functools.partial(train.init_train_state, problem, optimizer)
    state = sharding.jit_once(placement.shard_map_seeds(init, mesh), seeds)

    def advance(
        state: train.TrainState, seed: Array, scale: Array
    ) -> tuple[train.TrainState, Array]:
        state, _ = train.train_steps(problem, optimizer, eval_every, state, seed, scale)
        return state, train.evaluate(problem, state.params, seed)['eval']['mse']

    program = placement.shard_map_seeds(advance, mesh)
    compiled = sharding.compile_fast(program, state, seeds, scales, level=1, donate_argnums=0)

    # The lowest error of each pair at any evaluation so far.
    errors = np.full(grid_shape, np.finfo(np.float64).max)
    for _ in range(total // eval_every):
        state, latest = compiled(state, seeds, scales)
        latest = placement.gather_seeds(latest, pairs).reshape(grid_shape)
        errors = np.fmin(errors, np.where(np.isfinite(latest), latest, np.inf))
        if (errors.min(1) <= config.search.target).all():
            break
    return [
        {
            'width': width,
            'parameters': factory.count_parameters(problem),
            'mse': float(np.min(seed_errors)),
            'learning_rate': float(rates[np.argmin(seed_errors)]),
        }
        for seed_errors in errors
    ]


def _write_probe(
    log: logger.RunLogger, step: int, seeds: Sequence[int], value: Any, records: list[logger.Record]
) -> None:
    for seed, record in zip(seeds, records, strict=True):
        log.write(step, seed, 'probe', {'value': value, **record})
