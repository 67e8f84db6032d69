"""Training steps on WikiText-103, XLand-30 and DMLab-30, compiled for 1 to 256 absent chips.

    pip install -e '.[sweep,tpu]' && python -m benchmarks.compiled --families=v5e,v6e
    python -m benchmarks.compiled --tables

No chip is needed. XLA compiles the training step of each job for a description of the chips
(`mi.estimate.topologies`), and `mi.estimate.program` reads the FLOPs of products, the memory and
the bytes sent per chip from the program, which is never run. The first command writes a record for
each program as soon as it is compiled, and compiles only missing programs when it is repeated. The
second prints tables of calculated times and a comparison with the analytic model
(`benchmarks.cluster`).
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from benchmarks import cluster, options, scaling, workloads
from benchmarks.cluster import CHIPS, Work
from benchmarks.scaling import Table
from configs import lm_wikitext103, rl
from mi.estimate import costs, deployment, memory, topologies
from mi.kernels.linear import Platform
from mi.rl.envs.host import dmlab30

RESULTS = pathlib.Path(__file__).parent / 'results/compiled.json'
FAMILIES = flags.DEFINE_list(
    'families', ['v5e', 'v6e'], 'Chips of mi.estimate.topologies: v5e, v6e, h100.'
)
JOBS_FLAG = flags.DEFINE_list('jobs', [], 'Names of jobs; all by default.')
NUMBERS_FLAG = flags.DEFINE_list('chips', [], 'Numbers of chips; all by default.')
RECORDS = flags.DEFINE_string('records', str(RESULTS), 'JSON file with the records.')
TABLES = flags.DEFINE_bool('tables', False, 'Print the tables of the records; compile nothing.')

NUMBERS = (1, 8, 64, 256)
SLICES = {1: '1x1', 8: '2x4', 64: '8x8', 256: '16x16'}  # of v5e and v6e
# Family → the chip of `benchmarks.cluster` with its peak, bandwidth and links.
CHIP_OF = {'v5e': 'TPU v5 lite', 'v6e': 'TPU v6 lite', 'h100': 'H100'}
TOLERANCE = 0.1  # relative difference between model and program that the page has to explain

Record = dict[str, Any]


class Job(NamedTuple):
    """A training run to compile.

    Attributes:
      title: title for tables.
      config: function from the number of chips to the config.
      rows: function from the number of chips to the number of rows in the batch, over all chips.
      paper: function from the config, the rows on a chip and its platform to the chip's work in
        the analytic model, or None if the model does not cover the job.
    """

    title: str
    config: Callable[[int], ml_collections.ConfigDict]
    rows: Callable[[int], int]
    paper: Callable[[ml_collections.ConfigDict, int, Platform], Work] | None


def wikitext(core: str, num_chips: int) -> ml_collections.ConfigDict:
    """Return the config of a language model, with 256 rows for any number of chips."""
    config = lm_wikitext103.get_config(core).unlock()
    config.train.batch = 256
    return config.lock()


def xland(num_chips: int) -> ml_collections.ConfigDict:
    """Return the config of XLand-30, with 1,024 environments for any number of chips."""
    config = rl.get_config().unlock()
    config.train.batch = 1024
    return config.lock()


def dmlab(num_chips: int) -> ml_collections.ConfigDict:
    """Return the config of DMLab-30, with 60 rows per chip."""
    config = workloads.dmlab_config().unlock()
    config.train.batch *= num_chips
    return config.lock()


def lm_paper(config: ml_collections.ConfigDict, rows: int, platform: Platform) -> Work:
    """Return the work of a chip for a language model, in the analytic model."""
    return workloads.lm_work(config, config.data.vocabulary, rows, platform)


def rl_paper(config: ml_collections.ConfigDict, rows: int, platform: Platform) -> Work:
    """Return the work of a chip for DMLab-30, in the analytic model."""
    return workloads.rl_work(config, dmlab30.make_spec(), rows, platform)


JOBS = {
    'lstm': Job(
        'WikiText-103, LSTM, 256 rows',
        functools.partial(wikitext, 'lstm'),
        lambda chips: 256,
        lm_paper,
    ),
    'transformer': Job(
        'WikiText-103, Transformer, 256 rows',
        functools.partial(wikitext, 'transformer'),
        lambda chips: 256,
        lm_paper,
    ),
    'xland': Job('XLand-30, fused, 1,024 environments', xland, lambda chips: 1024, None),
    'dmlab': Job('DMLab-30, learner, 60 rows a chip', dmlab, lambda chips: 60 * chips, rl_paper),
}


def topology_name(family: str, num_chips: int) -> str:
    """Return the name of a number of chips in `mi.estimate.topologies`."""
    return f'{family}:{num_chips if family == "h100" else SLICES[num_chips]}'


def compile_record(job_name: str, family: str, num_chips: int) -> Record:
    """Compile the training step of a job and return a record of its costs per chip and update."""
    config = JOBS[job_name].config(num_chips)
    devices = topologies.describe(topology_name(family, num_chips))
    memory_limit = topologies.get_memory(devices[0])
    start_time = time.monotonic()
    programs = memory.make_programs(config, devices)
    measurement = deployment.measure(programs.compile, devices[0], memory_limit)
    parameter_bytes = memory.count_bytes(programs.state['parameters']) // len(config.seeds)

    def per_update(figure_name: str) -> float | None:
        figure = measurement[figure_name]
        return None if figure is None else figure / programs.updates

    return {
        'job': job_name,
        'family': family,
        'chips': num_chips,
        'used': programs.mesh.size,
        'rows': JOBS[job_name].rows(num_chips),
        'parameters': parameter_bytes // cluster.FLOAT_BYTES,
        'flops': per_update('flops'),
        # Of the batch, from the jaxpr, acting included.
        'whole': costs.estimate_costs(config)['flops'],
        'bytes_accessed': per_update('bytes_accessed'),
        'peak': measurement['peak'],
        'limit': memory_limit,
        'fits': measurement['fits'],
        'bytes_sent': per_update('bytes_sent'),
        'collectives': measurement['collectives'],
        'updates': programs.updates,
        'seconds': per_update('seconds'),
        'error': measurement.get('error', ''),
        'compiled_in': round(time.monotonic() - start_time),
    }


def read_records(path: pathlib.Path) -> list[Record]:
    """Return the records in a file, or [] if it does not exist."""
    return json.loads(path.read_text())['records'] if path.exists() else []


def write_records(path: pathlib.Path, records: Sequence[Record], tables: Mapping[str, Any]) -> None:
    """Write sorted records and tables to a file."""
    contents = {'records': sorted(records, key=_sort_key), 'tables': tables}
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + '\n')


def _sort_key(record: Record) -> tuple[int, int, int]:
    jobs, families = list(JOBS), list(CHIP_OF)
    return jobs.index(record['job']), families.index(record['family']), record['chips']


def record_key(record: Record) -> tuple[str, str, int]:
    """Return the job, the family and the number of chips of a record."""
    return record['job'], record['family'], record['chips']


def estimate_seconds(record: Record) -> tuple[float, float]:
    """Estimate the seconds per update for computing and for sending.

    For a TPU, the time for computing is XLA's estimate for its kernels. For other chips it is the
    maximum of FLOPs over peak and bytes over bandwidth. The time for sending is the number of bytes
    over the bandwidth of a ring.
    """
    chip = CHIPS[CHIP_OF[record['family']]]
    compute_seconds = record['seconds']
    if compute_seconds is None:
        read_seconds = record['bytes_accessed'] / chip.bandwidth
        compute_seconds = max(record['flops'] / chip.flops, read_seconds)
    return compute_seconds, record['bytes_sent'] / cluster.ring_bandwidth(chip, record['chips'])


def batch_flops(record: Record, records: Mapping[tuple[str, str, int], Record]) -> float:
    """Return the FLOPs per update of the whole batch.

    They come from the program for one chip, otherwise from the analytic model or the jaxpr.
    """
    single_record = records.get((record['job'], record['family'], 1))
    if single_record is not None and single_record['flops'] is not None:
        return single_record['flops'] * record['rows'] / single_record['rows']
    platform = CHIPS[CHIP_OF[record['family']]].platform
    work = compute_work(record['job'], record['chips'], platform)
    if work is None:
        return record['whole']
    return record['chips'] * sum(product.flops * product.times for product in work.products)


def programs_table(records: Sequence[Record], job_name: str) -> Table:
    """Return a table of FLOPs, memory and bytes sent per chip for a job's compiled programs."""
    records_by_key = {record_key(record): record for record in records}
    table_rows = [
        ['chip', 'chips', 'rows', 'GFLOP', '× chips / whole', 'GB', 'fits', 'MB sent', 'by']
    ]
    for record in records:
        if record['job'] != job_name:
            continue
        chip_cells = [
            record['family'],
            str(record['chips']),
            f'{record["rows"] / record["chips"]:g}',
        ]
        if record['flops'] is None:
            table_rows.append([*chip_cells, '', '', '', 'no', '', ''])
            continue
        total_flops = batch_flops(record, records_by_key)
        table_rows.append(
            [
                *chip_cells,
                f'{record["flops"] / 1e9:,.1f}',
                f'{record["flops"] * record["chips"] / total_flops:.3f}',
                f'{record["peak"] / 1e9:.2f}',
                'yes' if record['fits'] else 'no',
                f'{record["bytes_sent"] / 1e6:,.1f}',
                summarize_collectives(record),
            ]
        )
    return table_rows


def summarize_collectives(record: Record) -> str:
    """Return the number of collectives of each kind per update, as text."""
    kind_counts: dict[str, float] = {}
    for collective in record['collectives']:
        kind = collective['kind']
        kind_counts[kind] = kind_counts.get(kind, 0) + collective['count'] / record['updates']
    return ', '.join(f'{count:g} {kind}' for kind, count in kind_counts.items()) or 'nothing'


def times_table(records: Sequence[Record]) -> Table:
    """Return a table of the milliseconds per update if nothing overlaps, and the speed-up."""
    table_rows = [['job', 'chip', 'chips', 'computing', 'sending', 'sum', 'rows/s', 'of linear']]
    single_rates: dict[tuple[str, str], float] = {}  # rows/s per chip with the fewest chips
    for record in sorted(records, key=_sort_key):
        if not record['fits']:
            continue
        compute_seconds, send_seconds = estimate_seconds(record)
        rows_per_second = record['rows'] / (compute_seconds + send_seconds)
        job_family = record['job'], record['family']
        single_rate = single_rates.setdefault(job_family, rows_per_second / record['chips'])
        table_rows.append(
            [
                record['job'],
                record['family'],
                str(record['chips']),
                f'{1e3 * compute_seconds:,.2f}',
                f'{1e3 * send_seconds:,.3f}',
                f'{1e3 * (compute_seconds + send_seconds):,.2f}',
                f'{rows_per_second:,.0f}',
                f'{rows_per_second / (single_rate * record["chips"]):.2f}',
            ]
        )
    return table_rows


def paper_table(records: Sequence[Record]) -> Table:
    """Return a table of ratios of the analytic model to the compiled program, per chip.

    A * marks ratios that differ from 1 by more than a tenth.
    """
    table_rows = [['job', 'chip', 'chips', 'FLOPs', 'memory', 'bytes sent']]
    for record in records:
        platform = CHIPS[CHIP_OF[record['family']]].platform
        work = compute_work(record['job'], record['chips'], platform)
        if record['flops'] is None or work is None:
            continue
        flops = sum(product.flops * product.times for product in work.products)
        stored_bytes = cluster.STORED_COPIES * cluster.FLOAT_BYTES * record['parameters']
        analytic = {
            'flops': flops,
            'peak': stored_bytes + work.activations,
            'bytes_sent': sum(cluster.compute_traffic(record['parameters'], record['chips'], 1)),
        }
        table_rows.append(
            [
                record['job'],
                record['family'],
                str(record['chips']),
                *(format_ratio(figure, record[name]) for name, figure in analytic.items()),
            ]
        )
    return table_rows


@functools.cache
def compute_work(job_name: str, num_chips: int, platform: Platform) -> Work | None:
    """Return the work per chip in the analytic model, or None if it does not cover the job."""
    job = JOBS[job_name]
    if job.paper is None:
        return None
    return job.paper(job.config(num_chips), job.rows(num_chips) // num_chips, platform)


def format_ratio(analytic: float, compiled: float) -> str:
    """Format the ratio of model to program, with * if it differs from 1 by more than a tenth."""
    if not analytic and not compiled:
        return '0 and 0'
    if not compiled:
        return 'only on paper'
    mark = '*' if abs(analytic / compiled - 1) > TOLERANCE else ''
    return f'{analytic / compiled:.2f}{mark}'


def tables(records: Sequence[Record]) -> Iterator[tuple[str, str, Table]]:
    """Yield the name, the heading and the rows of each table."""
    for job_name, job in JOBS.items():
        if not any(record['job'] == job_name for record in records):
            continue
        heading = (
            f'{job.title}; rows, FLOPs of products, memory and bytes sent of a chip, an update'
        )
        yield f'compiled_{job_name}', heading, programs_table(records, job_name)
    yield 'compiled_times', 'Milliseconds of an update, by arithmetic', times_table(records)
    yield 'compiled_paper', 'Model on paper over compiled program, of a chip', paper_table(records)


def main(argv: Sequence[str]) -> None:
    """Compile the programs without a record, or print and write the tables."""
    del argv
    path = pathlib.Path(RECORDS.value)
    if TABLES.value:
        written_tables = {}
        for table_name, heading, table in tables(read_records(path)):
            written_tables[table_name] = {'heading': heading, 'rows': table}
            scaling.print_table(heading, table)
        write_records(path, read_records(path), written_tables)
        return

    # Compile what has no record yet, and write each record as soon as it is compiled.
    topologies.prepare_process()
    chip_counts = [int(number) for number in NUMBERS_FLAG.value] or NUMBERS
    for num_chips in chip_counts:
        for family in FAMILIES.value:
            for job_name in options.select(JOBS_FLAG, JOBS):
                if (job_name, family, num_chips) in map(record_key, read_records(path)):
                    continue
                record = compile_record(job_name, family, num_chips)
                write_records(path, [*read_records(path), record], {})
                print(json.dumps(record), flush=True)


if __name__ == '__main__':
    options.run(main)
