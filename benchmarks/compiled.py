"""WikiText-103, XLand-30 and DMLab-30's learner, compiled for 1 to 256 chips that are not here.

    python -m benchmarks.compiled --families=v5e,v6e
    python -m benchmarks.compiled --tables

The training step of each job is compiled by XLA's own compiler for those chips
(`mi.estimate.topologies`) and read (`mi.estimate.program`): FLOPs of products, memory and bytes
sent of each chip. Nothing is run. The first command writes each record when it is there, and
compiles what is missing when it is run again. The second makes the tables: times by arithmetic, and
a comparison with the model on paper (`benchmarks.cluster`).
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import app, flags

from benchmarks import cluster, scaling
from benchmarks.cluster import CHIPS, Work
from configs import lm_wikitext103, rl, rl_dmlab30
from mi.estimate import (
    costs,
    deployment,
    memory,
    topologies,
)
from mi.rl.envs.host import dmlab30

RESULTS = pathlib.Path(__file__).parent / 'results/compiled.json'
FAMILIES = flags.DEFINE_list(
    'families', ['v5e', 'v6e'], 'Of mi.estimate.topologies: v5e, v6e, h100.'
)
JOBS_FLAG = flags.DEFINE_list('jobs', [], 'Of the jobs; all if left out.')
NUMBERS_FLAG = flags.DEFINE_list('chips', [], 'Of the numbers of chips; all if left out.')
RECORDS = flags.DEFINE_string('records', str(RESULTS), 'Where the records are, and are added.')
TABLES = flags.DEFINE_bool('tables', False, 'Print the tables of the records; compile nothing.')

NUMBERS = (1, 8, 64, 256)
SLICES = {1: '1x1', 8: '2x4', 64: '8x8', 256: '16x16'}  # of v5e and v6e
# Family → the chip of `benchmarks.cluster` with its peak, bandwidth and links.
CHIP_OF = {'v5e': 'TPU v5 lite', 'v6e': 'TPU v6 lite', 'h100': 'H100'}
UNLIKE = 0.1  # relative difference between paper and program that the page has to explain

Record = dict[str, Any]
Table = list[list[str]]


class Job(NamedTuple):
    """What is compiled.

    Attributes:
      title: in words.
      config: number of chips → the config.
      rows: number of chips → rows of the batch of all chips.
      paper: config and rows of a chip → its products and activations by the model on paper; None
        where that has no model.
    """

    title: str
    config: Callable[[int], ml_collections.ConfigDict]
    rows: Callable[[int], int]
    paper: Callable[[ml_collections.ConfigDict, int], Work] | None


def wikitext(core: str, chips: int) -> ml_collections.ConfigDict:
    config = lm_wikitext103.get_config(core).unlock()
    config.train.batch = 256
    return config.lock()


def xland(chips: int) -> ml_collections.ConfigDict:
    config = rl.get_config().unlock()
    config.train.batch = 1024
    return config.lock()


def dmlab(chips: int) -> ml_collections.ConfigDict:
    config = rl_dmlab30.get_config().unlock()
    config.train.batch *= chips
    return config.lock()


def lm_paper(config: ml_collections.ConfigDict, rows: int) -> Work:
    return scaling.lm_work(config, config.data.vocabulary, rows)


def rl_paper(config: ml_collections.ConfigDict, rows: int) -> Work:
    return scaling.rl_work(config, dmlab30.spec_of(), rows)


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


def topology(family: str, chips: int) -> str:
    """Return the name of so many chips for `mi.estimate.topologies`."""
    return f'{family}:{chips if family == "h100" else SLICES[chips]}'


def compile_record(name: str, family: str, chips: int) -> Record:
    """Compile the training step of a job and return what it does on each chip, of one update."""
    config = JOBS[name].config(chips)
    devices = topologies.describe(topology(family, chips))
    limit = topologies.memory_of(devices[0])
    began = time.monotonic()
    training = memory.training_of(config, devices)
    measured = deployment.measure(training.compile, devices[0], limit)
    parameters = memory.size(training.state['parameters']) // len(config.seeds) // cluster.FLOAT

    def of_update(key: str) -> float | None:
        return None if measured[key] is None else measured[key] / training.updates

    return {
        'job': name,
        'family': family,
        'chips': chips,
        'used': training.mesh.size,
        'rows': JOBS[name].rows(chips),
        'parameters': parameters,
        'flops': of_update('flops'),
        'whole': costs.of_config(config)['flops'],  # of the batch before XLA, acting included
        'bytes_accessed': of_update('bytes_accessed'),
        'peak': measured['peak'],
        'limit': limit,
        'fits': measured['fits'],
        'bytes_sent': of_update('bytes_sent'),
        'collectives': measured['collectives'],
        'updates': training.updates,
        'seconds': of_update('seconds'),
        'error': measured.get('error', ''),
        'compiled_in': round(time.monotonic() - began),
    }


def read(path: pathlib.Path) -> list[Record]:
    return json.loads(path.read_text())['records'] if path.exists() else []


def write(path: pathlib.Path, records: Sequence[Record], tables: Mapping[str, Any]) -> None:
    content = {'records': sorted(records, key=_order), 'tables': tables}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n')


def _order(record: Record) -> tuple[int, int, int]:
    jobs, families = list(JOBS), list(CHIP_OF)
    return jobs.index(record['job']), families.index(record['family']), record['chips']


def key(record: Record) -> tuple[str, str, int]:
    return record['job'], record['family'], record['chips']


def seconds(record: Record) -> tuple[float, float]:
    """Return seconds of computing and of sending of one update, by arithmetic.

    Computing is what XLA estimates for the kernels of a TPU; of other chips it is the longer of
    FLOPs over peak and bytes over bandwidth. Sending is bytes over the slowest link of a ring.
    """
    chip = CHIPS[CHIP_OF[record['family']]]
    computing = record['seconds']
    if computing is None:
        computing = max(record['flops'] / chip.flops, record['bytes_accessed'] / chip.bandwidth)
    return computing, record['bytes_sent'] / cluster.bandwidth(chip, record['chips'])


def whole_flops(record: Record, records: Mapping[tuple[str, str, int], Record]) -> float:
    """Return the FLOPs of an update of the whole batch on one chip, if need be before XLA."""
    one = records.get((record['job'], record['family'], 1))
    if one is not None and one['flops'] is not None:
        return one['flops'] * record['rows'] / one['rows']
    work = on_paper(record['job'], record['chips'])
    if work is None:
        return record['whole']
    return record['chips'] * sum(p.flops * p.times for p in work.products)


def programs_table(records: Sequence[Record], name: str) -> Table:
    """Share, memory and bytes sent of each chip, of the compiled programs of a job."""
    found = {key(r): r for r in records}
    table = [['chip', 'chips', 'rows', 'GFLOP', '× chips / whole', 'GB', 'fits', 'MB sent', 'by']]
    for record in (r for r in records if r['job'] == name):
        place = [record['family'], str(record['chips']), f'{record["rows"] / record["chips"]:g}']
        if record['flops'] is None:
            table.append([*place, '', '', '', 'no', '', ''])
            continue
        whole = whole_flops(record, found)
        table.append(
            [
                *place,
                f'{record["flops"] / 1e9:,.1f}',
                f'{record["flops"] * record["chips"] / whole:.3f}',
                f'{record["peak"] / 1e9:.2f}',
                'yes' if record['fits'] else 'no',
                f'{record["bytes_sent"] / 1e6:,.1f}',
                kinds(record),
            ]
        )
    return table


def kinds(record: Record) -> str:
    """Return the collectives of a program in words, of one update."""
    counts: dict[str, float] = {}
    for collective in record['collectives']:
        kind = collective['kind']
        counts[kind] = counts.get(kind, 0) + collective['count'] / record['updates']
    return ', '.join(f'{count:g} {kind}' for kind, count in counts.items()) or 'nothing'


def times_table(records: Sequence[Record]) -> Table:
    """Milliseconds of an update by arithmetic, where nothing overlaps, and the speed-up."""
    table = [['job', 'chip', 'chips', 'computing', 'sending', 'sum', 'rows/s', 'of linear']]
    fastest: dict[tuple[str, str], float] = {}  # rows/s of a chip where the fewest are used
    for record in sorted(records, key=_order):
        if not record['fits']:
            continue
        computing, sending = seconds(record)
        rate = record['rows'] / (computing + sending)
        alone = fastest.setdefault((record['job'], record['family']), rate / record['chips'])
        table.append(
            [
                record['job'],
                record['family'],
                str(record['chips']),
                f'{1e3 * computing:,.2f}',
                f'{1e3 * sending:,.3f}',
                f'{1e3 * (computing + sending):,.2f}',
                f'{rate:,.0f}',
                f'{rate / (alone * record["chips"]):.2f}',
            ]
        )
    return table


def paper_table(records: Sequence[Record]) -> Table:
    """The model on paper over the compiled program, of a chip; * where they differ by a tenth."""
    table = [['job', 'chip', 'chips', 'FLOPs', 'memory', 'bytes sent']]
    for record in records:
        work = on_paper(record['job'], record['chips'])
        if record['flops'] is None or work is None:
            continue
        flops = sum(p.flops * p.times for p in work.products)
        stored = cluster.STORED * cluster.FLOAT * record['parameters'] + work.activations
        sent = sum(cluster.exchange(record['parameters'], record['chips'], 1))
        table.append(
            [
                record['job'],
                record['family'],
                str(record['chips']),
                *(
                    ratio(paper, record[name])
                    for name, paper in (('flops', flops), ('peak', stored), ('bytes_sent', sent))
                ),
            ]
        )
    return table


@functools.cache
def on_paper(name: str, chips: int) -> Work | None:
    """Return the work of a chip by the model on paper; None if it has no model of the job."""
    job = JOBS[name]
    return job.paper(job.config(chips), job.rows(chips) // chips) if job.paper else None


def ratio(paper: float, program: float) -> str:
    if not paper and not program:
        return '0 and 0'
    if not program:
        return 'only on paper'
    return f'{paper / program:.2f}' + '*' * (abs(paper / program - 1) > UNLIKE)


def tables(records: Sequence[Record]) -> Iterator[tuple[str, str, Table]]:
    """Name, heading and rows of every table."""
    for name, job in JOBS.items():
        if not any(record['job'] == name for record in records):
            continue
        heading = (
            f'{job.title}; rows, FLOPs of products, memory and bytes sent of a chip, an update'
        )
        yield f'compiled_{name}', heading, programs_table(records, name)
    yield 'compiled_times', 'Milliseconds of an update, by arithmetic', times_table(records)
    yield 'compiled_paper', 'Model on paper over compiled program, of a chip', paper_table(records)


def main(argv: Sequence[str]) -> None:
    del argv
    path = pathlib.Path(RECORDS.value)
    if TABLES.value:
        written = {}
        for name, heading, table in tables(read(path)):
            written[name] = {'heading': heading, 'rows': table}
            print(f'\n{heading}')
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for row in table:
                print('  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
        write(path, read(path), written)
        return
    topologies.prepare_process()
    numbers = [int(n) for n in NUMBERS_FLAG.value] or NUMBERS
    for chips in numbers:
        for family in FAMILIES.value:
            for name in JOBS_FLAG.value or JOBS:
                if (name, family, chips) in map(key, read(path)):
                    continue
                record = compile_record(name, family, chips)
                write(path, [*read(path), record], {})
                print(json.dumps(record), flush=True)


if __name__ == '__main__':
    app.run(main)
