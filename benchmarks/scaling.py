"""Estimates for WikiText-103 and DMLab-30 on 1, 8, 64 and 512 chips, the tables of docs/scaling.md.

    pip install -e '.[sweep]' && python -m benchmarks.scaling
    python -m benchmarks.scaling --chip='TPU v5p' --price=4 --core_price=0.03

Measured speeds of a CPU come from benchmarks/results. Products on a chip are assumed to reach its
roofline, and the table marks this as a bound. All other inputs are constants with sources, in this
module and in `benchmarks.cluster`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import flags

from benchmarks import cluster, measurements, options, pipeline, workloads
from benchmarks.cluster import CHIPS, Chip, Job, Step
from configs import lm_wikitext103
from mi import counting
from mi.rl.envs.host import dmlab30

CHIP = flags.DEFINE_enum('chip', 'H100', sorted(CHIPS), 'Name in benchmarks.cluster.CHIPS.')
PRICE = flags.DEFINE_float('price', 3.0, 'Price per chip and hour; an assumption, any currency.')
CORE_PRICE = flags.DEFINE_float('core_price', 0.04, 'Price per processor core and hour; likewise.')
WRITE = flags.DEFINE_string('write', None, 'JSON file to write the tables to.')

NUMBERS = (1, 8, 64, 512)

# WikiText-103: 20 passes over its training text. The Transformer's batch of 60 is not divisible by
# 8.
WIKITEXT_BATCH = 64
WIKITEXT_TOKENS = 20 * 103_227_021

ROOFLINE_SHARE = 1.0  # of products on a chip; not measured, so the tables are bounds

# Frames of DMLab per core and second: 49,679 on a machine with 36 cores, simulation alone, an
# action for four frames (Petrenko et al., 2020, Sample Factory, table of peak throughputs;
# recalled).
CORE_FRAMES = 49_679 / 36
# Assumed: how much steps differ, and that a new episode takes half a second with its map in the
# cache, after 1,800 steps (two minutes at 60 frames a second).
ENGINE = pipeline.Engine(
    step=dmlab30.REPEAT / CORE_FRAMES, spread=0.3, reset=0.5, episode_length=1800
)

Table = list[list[str]]  # the first row is the head


class Prices(NamedTuple):
    """Prices per hour, in any currency.

    Attributes:
      chip: price of a chip.
      core: price of a processor core beyond those of the chips' hosts.
    """

    chip: float
    core: float


class System(NamedTuple):
    """A set of actors for one learner.

    Attributes:
      topology: 'threads' or 'ray'.
      rows: number of environments per group.
      cores: number of cores per group.
      batch: number of rows per update.
      actors: number of actors.
    """

    topology: str
    rows: int
    cores: int
    batch: int
    actors: int


SYSTEMS = (
    *(System('threads', 30, 6, 60, actors) for actors in (1, 4, 8, 16)),
    *(System('threads', 120, 24, 240, actors) for actors in (1, 4, 8)),
    *(System('ray', 30, 6, 60, actors) for actors in (4, 16, 64)),
    *(System('ray', 30, 6, 480, actors) for actors in (16, 64, 256)),
)


def lm_table(job: Job, chip: Chip, share: float, price: float, is_weak: bool) -> Table:
    """Return a table with a row for each number of chips and of FSDP shards.

    The batch has the same size on all numbers of chips, or the same rows per chip if `is_weak` is
    True.
    """
    head = ['chips', 'FSDP', 'rows', 'GB', 'products', 'optimizer', 'MB', 'network', 'step']
    table_rows = [[*head, 'bound by', 'k tokens/s', 'of linear', 'updates', 'hours', 'cost']]
    single_rate = cluster.estimate_step(job, chip, 1, WIKITEXT_BATCH, share=share).rate
    for num_chips in NUMBERS:
        rows = WIKITEXT_BATCH * (num_chips if is_weak else 1)
        if rows % num_chips:
            continue
        for fsdp in (1, 8) if num_chips > 1 else (1,):
            step = cluster.estimate_step(job, chip, num_chips, rows, fsdp, share)
            efficiency = step.rate / (num_chips * single_rate)
            table_rows.append(_lm_row(job, step, fsdp, efficiency, price))
    return table_rows


def _lm_row(job: Job, step: Step, fsdp: int, efficiency: float, price: float) -> list[str]:
    hours = cluster.estimate_hours(job, step)
    return [
        str(step.chips),
        str(fsdp),
        str(step.rows // step.chips),
        f'{step.memory / 1e9:.1f}',
        f'{1e3 * (step.arithmetic + step.reading):.2f}',
        f'{1e3 * step.optimizer:.2f}',
        f'{step.traffic / 1e6:,.0f}',
        f'{1e3 * step.network:.2f}',
        f'{1e3 * step.seconds:.2f}',
        step.bottleneck,
        f'{step.rate / 1e3:,.0f}',
        f'{efficiency:.2f}',
        f'{job.total / step.units:,.0f}',
        f'{hours:.2f}',
        f'{hours * step.chips * price:,.0f}',
    ]


def core_seconds(has_policy: bool) -> float:
    """Return the core seconds per environment step of the engine, and of the policy if included."""
    engine_seconds = ENGINE.step + ENGINE.reset / ENGINE.episode_length
    if not has_policy:
        return engine_seconds
    return engine_seconds + workloads.policy_flops() / measurements.core_flops()


def rl_table(chip: Chip, share: float, prices: Prices) -> Table:
    """Return a table of the learner's rate and the cores that supply it, by number of chips."""
    head = ['chips', 'GB', 'update', 'network', 'learner steps/s', 'MB/s', 'cores it wants']
    table_rows = [[*head, 'cores', 'bound by', 'steps/s', 'updates', 'hours', 'cost']]
    job, step_bytes = workloads.dmlab_job(), workloads.trajectory_bytes()
    rows = workloads.dmlab_config().train.batch
    step_core_seconds = core_seconds(has_policy=True)
    for num_chips in NUMBERS:
        step = cluster.estimate_step(job, chip, num_chips, rows * num_chips, share=share)
        needed_cores = step.rate * step_core_seconds
        for num_cores in (num_chips * chip.cores, math.ceil(needed_cores)):
            # The slowest of learner, network and simulators sets the rate.
            rates = {
                step.bottleneck: step.rate,
                'network in': num_chips * chip.network / step_bytes,
                'simulators': num_cores / step_core_seconds,
            }
            bottleneck = min(rates, key=lambda stage: rates[stage])
            hours = job.total / rates[bottleneck] / 3600
            extra_cores = max(0, num_cores - num_chips * chip.cores)
            cost = hours * (num_chips * prices.chip + extra_cores * prices.core)
            table_rows.append(
                [
                    str(num_chips),
                    f'{step.memory / 1e9:.1f}',
                    f'{1e3 * step.seconds:.1f}',
                    f'{1e3 * step.network:.2f}',
                    f'{step.rate:,.0f}',
                    f'{step_bytes * rates[bottleneck] / num_chips / 1e6:,.0f}',
                    f'{needed_cores:,.0f}',
                    f'{num_cores:,}',
                    bottleneck,
                    f'{rates[bottleneck]:,.0f}',
                    f'{job.total / step.units:,.0f}',
                    f'{hours:,.1f}',
                    f'{cost:,.0f}',
                ]
            )
    return table_rows


def actors_table(chip: Chip, share: float) -> Table:
    """Return a table of simulated systems of actors, for one learner on one chip.

    Threads share the chip and the interpreter's lock with the learner. Ray's actors act on the
    cores of their engines, and their learner waits for each update because it has to send the
    parameters.
    """
    head = ['topology', 'actors', 'rows of a group', 'of an update', 'cores', 'steps/s']
    table_rows = [[*head, 'learner busy', 'lag', 'largest', 'dropped', 'hours']]
    job = workloads.dmlab_job()
    groups = workloads.dmlab_config().actors.groups
    for system in SYSTEMS:
        topology, stages = _make_topology(system), _make_stages(system, job, chip, share)
        # Simulate long enough that every actor's trajectories arrive several times.
        cycle_updates = max(8, system.actors * groups * system.rows // system.batch)
        num_updates, warmup = 8 * cycle_updates, 3 * cycle_updates
        outcome = pipeline.simulate(topology, stages, num_updates, warmup)
        num_learned = (num_updates - warmup) * system.batch // system.rows
        num_trajectories = outcome.dropped + num_learned
        table_rows.append(
            [
                system.topology,
                str(system.actors),
                str(system.rows),
                str(system.batch),
                f'{system.actors * groups * system.cores:,}',
                f'{outcome.steps_per_second:,.0f}',
                f'{outcome.utilization:.2f}',
                f'{outcome.lag:.1f}',
                str(outcome.lag_max),
                f'{outcome.dropped / num_trajectories:.0%}',
                f'{job.total / outcome.steps_per_second / 3600:,.1f}',
            ]
        )
    return table_rows


def _make_topology(system: System) -> pipeline.Topology:
    config = workloads.dmlab_config()
    has_threads = system.topology == 'threads'
    return pipeline.Topology(
        actors=system.actors,
        groups=config.actors.groups,
        rows=system.rows,
        batch=system.batch,
        length=config.train.length,
        queue=config.actors.queue,
        max_lag=config.actors.max_lag,
        max_in_flight=32 if has_threads else 0,
        one_device=has_threads,
    )


def _make_stages(system: System, job: Job, chip: Chip, share: float) -> pipeline.Stages:
    config, spec = workloads.dmlab_config(), dmlab30.make_spec()
    if system.topology == 'threads':
        products = workloads.policy_products(config, spec, system.rows, chip.platform)
        policy_seconds = sum(cluster.estimate_roofline(products, chip)) / share
    else:
        actor_flops = config.actors.groups * system.cores * measurements.core_flops()
        policy_seconds = system.rows * workloads.policy_flops() / actor_flops
    act_time = pipeline.constant(measurements.policy_call_seconds() + policy_seconds)
    update_step = cluster.estimate_step(job, chip, 1, system.batch, share=share)
    return pipeline.Stages(
        simulate=pipeline.engine_group(system.rows, system.cores, ENGINE),
        act=act_time,
        first_act=act_time,
        pack=pipeline.constant(0.0),
        join=pipeline.constant(0.0),
        update=pipeline.constant(update_step.seconds),
    )


def check_table() -> Table:
    """Return a table that compares simulations with real runs, from actors_cpu.json."""
    record = measurements.read_record('actors_cpu.json')
    table_rows = [['set', 'actors', '', 'steps/s', 'learner busy', 'lag', 'largest', 'actor waits']]
    for figure in record['figures']:
        for source in ('measured', 'model'):
            outcome = figure[source]
            table_rows.append(
                [
                    figure['set'] if source == 'measured' else '',
                    str(figure['actors']) if source == 'measured' else '',
                    source,
                    f'{outcome["steps_per_second"]:,.0f}',
                    f'{outcome["utilization"]:.2f}',
                    f'{outcome["lag"]:.2f}',
                    str(outcome['lag_max']),
                    f'{1e3 * outcome["actor_wait"]:.1f}',
                ]
            )
    return table_rows


def wikitext_jobs() -> dict[str, Job]:
    """Return name of the model → job on WikiText-103."""
    jobs = {}
    for model_name in ('lstm', 'transformer'):
        config = lm_wikitext103.get_config(model_name).unlock()
        config.train.batch = WIKITEXT_BATCH
        jobs[model_name] = workloads.lm_job(f'WikiText-103, {model_name}', config, WIKITEXT_TOKENS)
    return jobs


def inputs_table(chip: Chip) -> Table:
    """Return a table of the measured and derived inputs of the other tables."""
    cpu_record = measurements.read_record('lm_cpu.json')
    num_cores, core_peak = measurements.count_cores(cpu_record), measurements.core_flops()

    def seconds(products: Sequence[counting.Product]) -> float:
        return sum(product.flops * product.times for product in products) / (num_cores * core_peak)

    lstm_share = measurements.lstm_share(cpu_record, seconds)
    policy_milliseconds = 1e3 * measurements.policy_call_seconds()
    policy_flops = workloads.policy_flops()
    table_rows = [
        ('f32 products of one core', f'{core_peak / 1e9:.0f} GFLOP/s', 'layers_cpu.json'),
        ('share of it in LSTM training steps', f'{lstm_share:.2f}', 'lm_cpu.json'),
        ('host, for one call of a policy', f'{policy_milliseconds:.2f} ms', 'actors_cpu.json'),
        *(
            (
                f'share of {chip.name}’s roofline, {model_kind}',
                f'{ROOFLINE_SHARE:.2f}',
                f'not measured on {chip.name}: datasheet roofline, a bound',
            )
            for model_kind in ('lstm', 'transformer', 'agent')
        ),
        ('DMLab, a core', f'{1 / ENGINE.step:.0f} steps/s', 'Petrenko et al. (2020), recalled'),
        ('policy of DMLab-30, forward', f'{policy_flops / 1e6:.0f} MFLOP a step', 'mi.counting'),
        ('the same on a core', f'{1e3 * policy_flops / core_peak:.1f} ms', 'of the two'),
        (
            'a step from actor to learner',
            f'{workloads.trajectory_bytes() / 1e3:.1f} kB',
            'its shapes',
        ),
    ]
    return [['', 'value', 'from'], *map(list, table_rows)]


def tables(chip: Chip, prices: Prices) -> Iterator[tuple[str, str, Table]]:
    """Yield the name, the heading and the rows of each table."""
    yield 'inputs', 'Inputs', inputs_table(chip)
    for model_name, job in wikitext_jobs().items():
        model_title = f'{job.name}, {job.parameters / 1e6:.0f} M parameters, {chip.name}'
        for is_weak in (False, True):
            batch_kind = 'rows a chip' if is_weak else 'rows in all'
            yield (
                f'{model_name}_{"weak" if is_weak else "strong"}',
                f'{model_title}: {WIKITEXT_BATCH} {batch_kind}; rows, GB, MB sent and ms of a chip',
                lm_table(job, chip, ROOFLINE_SHARE, prices.chip, is_weak),
            )
    title = f'DMLab-30, {chip.name}; GB, ms and MB received of a chip'
    yield 'dmlab', title, rl_table(chip, ROOFLINE_SHARE, prices)
    yield 'actors', 'Actors for one learner', actors_table(chip, ROOFLINE_SHARE)
    yield 'check', 'Model and topology; waits in ms', check_table()


def print_table(heading: str, table: Table) -> None:
    """Print a table with aligned columns."""
    print(f'\n{heading}')
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for table_row in table:
        print('  '.join(cell.rjust(width) for cell, width in zip(table_row, widths, strict=True)))


def main(argv: Sequence[str]) -> None:
    """Print every table, and write them to the file given by --write."""
    del argv
    chip = CHIPS[CHIP.value]
    print(f'{chip.name}: {chip.source}')
    written_tables = {}
    for table_name, heading, table in tables(chip, Prices(PRICE.value, CORE_PRICE.value)):
        written_tables[table_name] = {'heading': heading, 'rows': table}
        print_table(heading, table)
    if WRITE.value:
        record = {'chip': chip.name, 'price': PRICE.value, 'core_price': CORE_PRICE.value}
        with open(WRITE.value, 'w') as json_file:
            json.dump(record | {'tables': written_tables}, json_file, indent=1, ensure_ascii=False)
            json_file.write('\n')


if __name__ == '__main__':
    options.run(main)
