"""Search for the smallest width at which a network reaches a target error, for each seed.

The search is repeated for every value of one config key, such as the problem's dimension. It
bisects a geometric grid of widths. At each width, every seed is trained with each learning rate,
and its error is the lowest at any evaluation with any of these rates. The seed reaches the target
if this error is at most the target. Training at a width ends early once all seeds have reached the
target.

Since training is noisy, the error need not be monotone in the width. The result is a width that
reaches the target, while the next smaller width in the grid does not.
"""

import functools
import json
import time
from collections.abc import Sequence

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


def make_grid(max_width: int, per_octave: int) -> list[int]:
    """Return the rounded 2^(i / per_octave) up to `max_width`, and `max_width` itself."""
    widths = {1, max_width}
    i = 0
    while (width := round(2 ** (i / per_octave))) <= max_width:
        widths.add(width)
        i += 1
    return sorted(widths)


def find_brackets(reached: dict[int, list[bool]], num_seeds: int, num_places: int) -> list[Bracket]:
    """Return an interval (lower, upper] for each seed that contains its smallest place in the grid.

    Args:
      reached: whether each seed reached the target, by place in the grid.
      num_seeds: number of seeds.
      num_places: number of places, which is the upper end if no place is known to reach the target.
    """
    brackets = []
    for seed in range(num_seeds):
        hits = [place for place, is_reached in reached.items() if is_reached[seed]]
        upper_place = min(hits, default=num_places)
        misses = [place for place in reached if place < upper_place and place not in hits]
        brackets.append((max(misses, default=-1), upper_place))
    return brackets


def next_place(brackets: list[Bracket], num_places: int, guess: int, octave: int) -> int | None:
    """Return the place to try next, or None if every bracket is closed.

    The search starts from the guess and moves up or down in octaves, because a width that is too
    large is expensive. Once the widest bracket has two ends, the next place is in its middle.
    """
    lower_place, upper_place = max(brackets, key=lambda bracket: bracket[1] - bracket[0])
    if upper_place - lower_place <= 1:
        return None
    if lower_place < 0 and upper_place == num_places:
        return min(guess, num_places - 1)
    if upper_place == num_places:
        return min(lower_place + octave, num_places - 1)
    if lower_place < 0:
        return max(upper_place - octave, 0)
    return (lower_place + upper_place) // 2


def fit_exponent(values: Sequence[float], parameters: Sequence[float]) -> float | None:
    """Fit p in parameters = a · valueᵖ by log-log regression, or return None below two values."""
    if len(values) < 2:
        return None
    return float(np.polynomial.polynomial.polyfit(np.log(values), np.log(parameters), 1)[1])


def search(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Run a search in a run directory, resuming it if it exists.

    metrics.jsonl gets a record 'probe' for each seed, value and width, and finally a record 'eval'
    for each seed. The latter has `parameters/VALUE`, `width/VALUE`, `mse/VALUE` and
    `learning_rate/VALUE` of the smallest network that reached the target, if there is one. It also
    has the `exponent` with which the parameters grow, fitted if all seeds reached the target at two
    or more values.
    """
    factory.validate(config)
    grids = {}
    for config_value in config.search.at:
        with progress.Work(f'sizing the networks of {config.search.over} {config_value}'):
            max_width = factory.largest_width(_set_value(config, config_value))
        grids[config_value] = make_grid(max_width, config.search.per_octave)
    with run_dir.open_run(workdir, config) as run:
        _Search(config, grids, run).run()


def _set_value(config: ml_collections.ConfigDict, config_value: int) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({config.search.over: config_value})
    return config


class _Search:
    """A run's search, which saves its probes after each one and reads them when it resumes."""

    def __init__(
        self, config: ml_collections.ConfigDict, grids: dict[int, list[int]], run: run_dir.Run
    ):
        self._config, self._grids, self._run = config, grids, run
        self._probes: dict[int, Probes] = {}  # by value
        probes_file = run.path / 'probes.json'
        if probes_file.exists():
            self._probes = {
                int(config_value): {int(place): records for place, records in probes.items()}
                for config_value, probes in json.loads(probes_file.read_text()).items()
            }

    def run(self) -> None:
        """Search at each value in `config.search.at`, then write a summary for each seed."""
        config, run = self._config, self._run
        run.write('cost.json', {'steps': len(self._grids)})
        smallest_records: dict[int, list[logger.Record | None]] = {}  # by value, of each seed
        highest_places: list[int] = []  # for each value, the place where all seeds reach the target
        with run.open_logger(len(self._grids), 0) as log:
            for step, (config_value, widths) in enumerate(self._grids.items()):
                brackets = self._search_value(log, step, config_value, _guess(highest_places))
                probes = self._probes[config_value]
                smallest_records[config_value] = [
                    probes[upper_place][seed] if upper_place < len(widths) else None
                    for seed, (_, upper_place) in enumerate(brackets)
                ]
                highest_places.append(max(upper_place for _, upper_place in brackets))
                run.step = step + 1
            fitted = [
                config_value
                for config_value, records in smallest_records.items()
                if config_value >= config.search.fit_from and all(records)
            ]
            for seed_index, seed in enumerate(config.seeds):
                seed_records = {
                    config_value: record
                    for config_value, records in smallest_records.items()
                    if (record := records[seed_index]) is not None
                }
                log.write(run.step, seed, 'eval', _summarize(seed_records, fitted))

    def _search_value(
        self, log: logger.RunLogger, step: int, config_value: int, guess: int
    ) -> list[Bracket]:
        """Train at one width after another until the bracket of every seed is closed."""
        config, run, widths = self._config, self._run, self._grids[config_value]
        probes = self._probes.setdefault(config_value, {})
        # The sum over all probes of the value, because the last record of a step is what counts.
        seconds = self._read_seconds(step) if probes else 0.0
        for records in probes.values():
            _write_probe(log, step, config.seeds, config_value, records)
        while True:
            brackets = _brackets_of_probes(config, probes, len(widths))
            place = next_place(brackets, len(widths), guess, config.search.per_octave)
            if place is None:
                return brackets

            # Train all seeds at this width.
            start_time = time.perf_counter()
            probe_title = f'{config.search.over} {config_value}, width {widths[place]}'
            with progress.Work(f'training {probe_title}'):
                records = probe(_set_value(config, config_value), widths[place])

            # Save the probe before its record is written, so that a resume writes it again.
            probes[place] = records
            run.write('probes.json', {str(key): saved for key, saved in self._probes.items()})
            _write_probe(log, step, config.seeds, config_value, records)
            seconds += time.perf_counter() - start_time
            log.write_timing(step, {'seconds': seconds})
            seed_errors = sorted(record['mse'] for record in records)
            error_range = f'{seed_errors[0]:.4g} … {seed_errors[-1]:.4g}'
            log.show_progress(step, f'{probe_title}: mse {error_range}', '')
            if run.should_stop(recorded=True):
                run.exit_preempted()

    def _read_seconds(self, step: int) -> float:
        """Return the seconds that the probes of a step took before the run was resumed."""
        timings = logger.read_records(self._run.path / 'timing.jsonl')
        return next(
            (float(record['seconds']) for record in reversed(timings) if record['step'] == step),
            0.0,
        )


def _guess(highest_places: list[int]) -> int:
    """Guess the next place by linear extrapolation from the places of the last two values."""
    if len(highest_places) < 2:
        return highest_places[-1] if highest_places else 0
    return max(0, 2 * highest_places[-1] - highest_places[-2])


def _brackets_of_probes(
    config: ml_collections.ConfigDict, probes: Probes, num_places: int
) -> list[Bracket]:
    reached = {
        place: [record['mse'] <= config.search.target for record in records]
        for place, records in probes.items()
    }
    return find_brackets(reached, len(config.seeds), num_places)


def _summarize(records: dict[int, logger.Record], fitted: list[int]) -> logger.Record:
    """Summarize a seed: its smallest network at each value, and the exponent over `fitted`."""
    exponent = fit_exponent(fitted, [records[value]['parameters'] for value in fitted])
    summary: logger.Record = {'exponent': exponent}
    for field_name in ('parameters', 'width', 'mse', 'learning_rate'):
        summary |= {
            f'{field_name}/{value}': record[field_name] for value, record in records.items()
        }
    return summary


def probe(config: ml_collections.ConfigDict, width: int) -> list[logger.Record]:
    """Train all seeds at a width with every learning rate, and return each seed's best result.

    Pairs of a seed and a rate are distributed over the devices and are independent. They train
    until all seeds have reached the target. This requires the errors of all pairs, so the loop over
    evaluations runs on the host. If each device stopped on its own, the lowest error of a seed
    would depend on the other pairs on its device, and thus on the number of devices.

    A non-finite error, as from a learning rate that is too high, counts as infinite.
    """
    problem = factory.make_problem(factory.set_width(config, width))
    num_steps, eval_every = config.train.steps, config.train.eval_every
    optimizer = optim.make_optimizer(config.optim, num_steps)
    learning_rates = np.asarray(config.search.rates, np.float32)
    grid_shape = len(config.seeds), len(learning_rates)
    num_pairs = len(config.seeds) * len(learning_rates)

    # Every seed with every rate, [pairs], placed over the devices.
    mesh = placement.seed_mesh(num_pairs)
    seeds, update_scales = placement.shard_seeds(
        (
            np.repeat(np.asarray(config.seeds, np.int32), len(learning_rates)),
            np.tile(learning_rates / config.optim.learning_rate, len(config.seeds)),
        ),
        mesh,
    )
    init_pair = functools.partial(train.init_train_state, problem, optimizer)
    train_state = sharding.jit_once(placement.shard_map_seeds(init_pair, mesh), seeds)

    def advance(
        train_state: train.TrainState, seed: Array, update_scale: Array
    ) -> tuple[train.TrainState, Array]:
        train_state, _ = train.train_steps(
            problem, optimizer, eval_every, train_state, seed, update_scale
        )
        return train_state, train.evaluate(problem, train_state.params, seed)['eval']['mse']

    sharded_advance = placement.shard_map_seeds(advance, mesh)
    compiled = sharding.compile_fast(
        sharded_advance, train_state, seeds, update_scales, level=1, donate_argnums=0
    )

    num_parameters = factory.count_parameters(problem)

    # The lowest error of each pair at any evaluation so far.
    lowest_errors = np.full(grid_shape, np.finfo(np.float64).max)
    for _ in range(num_steps // eval_every):
        train_state, latest_errors = compiled(train_state, seeds, update_scales)
        latest_errors = placement.gather_seeds(latest_errors, num_pairs).reshape(grid_shape)
        latest_errors = np.where(np.isfinite(latest_errors), latest_errors, np.inf)
        lowest_errors = np.fmin(lowest_errors, latest_errors)
        if (lowest_errors.min(1) <= config.search.target).all():
            break
    return [
        {
            'width': width,
            'parameters': num_parameters,
            'mse': float(np.min(seed_errors)),
            'learning_rate': float(learning_rates[np.argmin(seed_errors)]),
        }
        for seed_errors in lowest_errors
    ]


def _write_probe(
    log: logger.RunLogger,
    step: int,
    seeds: Sequence[int],
    config_value: int,
    records: list[logger.Record],
) -> None:
    for seed, record in zip(seeds, records, strict=True):
        log.write(step, seed, 'probe', {'value': config_value, **record})
