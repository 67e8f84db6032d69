"""The smallest width at which a network reaches a target, by bisection, for each seed.

Widths are those of a geometric grid. At a width that is tried, every seed trains with each learning
rate, and its error is that of the best one; a seed reaches the target if it is not above it.
Reaching is not monotone in the width where training is noisy: what is found is a width that reaches
the target next to one that does not.
"""

import json
import time
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from jax import Array

from mi import metrics, optim, run
from mi.fit import setup, train

Bracket = tuple[int, int]  # the places, in the grid, of a width that fails and one that reaches


def grid(largest: int, per_octave: int) -> list[int]:
    """1, …, largest in steps of a factor 2^(1/per_octave), as far as they are integers."""
    sizes: set[int] = set()
    i = 0
    while (size := round(2 ** (i / per_octave))) < largest:
        sizes.add(size)
        i += 1
    return sorted(sizes | {largest})


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


def next_place(found: list[Bracket], sizes: int, octave: int) -> int | None:
    """What to try next, None when every bracket is closed.

    An octave up where nothing has reached the target yet, for small widths are cheap; the middle of
    the widest bracket otherwise.
    """
    low, high = max(found, key=lambda bracket: bracket[1] - bracket[0])
    if high - low <= 1:
        return None
    if high == sizes:
        return 0 if low < 0 else min(low + octave, sizes - 1)
    return (low + high) // 2


def search(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Searches and leaves a run directory; continues it where there is one.

    metrics.jsonl has a record 'probe' of each seed and width tried, and at the end an 'eval' with
    the smallest one: width, parameters, error and the learning rate that gave it. Its 'reached' is
    0 and its width the largest of the grid for a seed that never reached the target.
    """
    setup.validate(config)
    with run.start(workdir, config) as this:
        _search(config, this)


def _search(config: ml_collections.ConfigDict, this: run.Run) -> None:
    sizes = grid(config.search.largest, config.search.per_octave)
    memory = this.path / 'probes.json'
    probes: dict[int, list[metrics.Record]] = {}  # place in the grid → a record of each seed
    if memory.exists():
        probes = {int(place): of for place, of in json.loads(memory.read_text()).items()}
    this.step = len(probes)
    this.write('cost.json', {'steps': len(sizes)})
    with this.log(len(sizes), 0) as log:
        for step, records in enumerate(probes.values(), 1):
            _write(log, step, config.seeds, 'probe', records)
        while True:
            reached = {
                place: [r['mse'] <= config.search.target for r in records]
                for place, records in probes.items()
            }
            found = brackets(reached, len(config.seeds), len(sizes))
            place = next_place(found, len(sizes), config.search.per_octave)
            if place is None:
                break
            began = time.perf_counter()
            probes[place] = records = probe(config, sizes[place])
            this.step = len(probes)
            this.write('probes.json', {str(place): records for place, records in probes.items()})
            _write(log, this.step, config.seeds, 'probe', records)
            log.timing(this.step, {'seconds': time.perf_counter() - began})
            best = sorted(r['mse'] for r in records)
            log.progress(this.step, f'width {sizes[place]}: mse {best[0]:.4g} … {best[-1]:.4g}', '')
            if this.stops(recorded=True):
                this.preempted()
        smallest = [
            probes[min(high, len(sizes) - 1)][i] | {'reached': float(high < len(sizes))}
            for i, (_, high) in enumerate(found)
        ]
        _write(log, this.step, config.seeds, 'eval', smallest)


def probe(config: ml_collections.ConfigDict, width: int) -> list[metrics.Record]:
    """Trains all seeds at a width with every learning rate; of each seed, what its best one gave.

    An error that is not finite, of a learning rate that is too high, counts as infinite.
    """
    problem = setup.problem(setup.of_width(config, width))
    optimiser = optim.optimiser(config.optim, config.train.steps)

    def error(seed: Array, scale: Array) -> Array:
        state = train.start(problem, optimiser, seed)
        state, _ = train.steps(problem, optimiser, config.train.steps, state, seed, scale)
        return train.evaluate(problem, state.params, seed)['eval']['mse']

    seeds = np.asarray(config.seeds, np.int32)
    rates = np.asarray(config.search.rates, np.float32)
    scales = rates / config.optim.learning_rate
    every = jax.jit(jax.vmap(jax.vmap(error, in_axes=(None, 0)), in_axes=(0, None)))
    errors = np.asarray(every(seeds, scales), np.float64)  # [S, rates]
    errors = np.where(np.isfinite(errors), errors, np.finfo(np.float64).max)
    return [
        {
            'width': width,
            'parameters': problem.costs['parameters']['model'],
            'flops': problem.costs['flops_per_example']['model'],
            'mse': float(of_seed.min()),
            'learning_rate': float(rates[of_seed.argmin()]),
        }
        for of_seed in errors
    ]


def _write(
    log: metrics.Log, step: int, seeds: Sequence[int], split: str, records: list[metrics.Record]
) -> None:
    for seed, record in zip(seeds, records, strict=True):
        log.write(step, seed, split, record)
