"""The analytic model of many chips: a toy cluster by hand, and counted work against formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cluster, compiled, measurements, scaling, workloads
from benchmarks.cluster import Chip, Job, Work
from configs import lm as lm_configs
from configs import rl as rl_configs
from mi.counting import Product
from mi.lm import factory as lm
from mi.rl import envs
from mi.rl import factory as rl
from mi.rl.envs.host import dmlab30

CHIP = Chip('toy', 1e12, 5e11, 1e9, 1e11, link=1e10, node=4, network=1e9, cores=2, source='')
WORK = Work([Product(2 * 10**9, 10**8, 3), Product(10**6, 10**8, 2)], activations=7)


def job(parameters=10**6, work=lambda rows: WORK):
    return Job('toy', parameters, units=5, total=1e6, work=lambda rows, platform: work(rows))


def test_a_step_of_one_chip_by_hand():
    step = cluster.estimate_step(job(), CHIP, chips=1, rows=8, share=0.5)
    np.testing.assert_allclose(step.arithmetic, 3 * 2e-3 / 0.5)  # 2 GFLOP at 1 TFLOP/s, not 1 ms
    np.testing.assert_allclose(step.reading, 2 * 1e-3 / 0.5)  # 100 MB at 100 GB/s
    np.testing.assert_allclose(step.optimizer, 8 * 4e6 / 1e11)
    assert (step.traffic, step.network) == (0, 0)
    assert step.memory == 16 * 10**6 + 7
    assert step.bottleneck == 'arithmetic'
    np.testing.assert_allclose(
        cluster.estimate_hours(job(), step), 1e6 / (40 / step.seconds) / 3600
    )


def test_traffic_of_a_ring_by_hand():
    assert cluster.compute_traffic(1000, replicas=4, fsdp=1) == (0, 2 * 3 / 4 * 4000)
    # gathered twice and scattered once in the group; a quarter of the gradient between two groups
    assert cluster.compute_traffic(1000, replicas=2, fsdp=4) == (
        3 * 3 / 4 * 4000,
        2 * 1 / 2 * 4000 / 4,
    )


def test_a_ring_over_nodes_uses_all_network_cards():
    step = cluster.estimate_step(job(), CHIP, chips=8, rows=8)
    np.testing.assert_allclose(step.traffic, 2 * 7 / 8 * 4e6)
    np.testing.assert_allclose(step.network, 7e6 / 4e9 + 14 * cluster.LATENCY)
    inside = cluster.estimate_step(job(), CHIP, chips=4, rows=8)
    np.testing.assert_allclose(inside.network, 6e6 / 1e10 + 6 * cluster.LATENCY)


def test_splitting_parameters_divides_memory_and_optimizer_time():
    replicated, split = (cluster.estimate_step(job(), CHIP, 8, 8, fsdp) for fsdp in (1, 4))
    assert split.memory - 7 == (replicated.memory - 7) / 4
    np.testing.assert_allclose(split.optimizer, replicated.optimizer / 4)
    np.testing.assert_allclose(
        split.network, 9e6 / 1e10 + 1e6 / 4e9 + (3 * 3 + 2 * 1) * cluster.LATENCY
    )


def test_the_bottleneck_moves_to_the_network():
    small = job(10**8, lambda rows: Work([Product(rows * 10**10, 10**6, 1)], 0))
    bounds = [cluster.estimate_step(small, CHIP, n, 64).bottleneck for n in (1, 4, 64)]
    assert bounds == ['arithmetic', 'arithmetic', 'network']
    with pytest.raises(ValueError, match='rows = 8, chips = 3'):
        cluster.estimate_step(small, CHIP, 3, 8)


def test_saved_bytes_are_the_inputs_of_products():
    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(params, x):
        return jnp.sum(x @ params['p'] @ params['q'])

    # x and x p; q too, which is a parameter and there anyway
    saved = workloads.saved_bytes(loss, {'p': floats(3, 5), 'q': floats(5, 2)}, floats(7, 3))
    assert saved == 4 * (7 * 3 + 7 * 5)


def test_a_training_step_of_a_language_model_has_three_times_the_products_of_a_pass():
    config = lm_configs.get_config('tiny')
    work = workloads.lm_work(config, 256, 4, 'cpu')
    total = sum(p.flops * p.times for p in work.products)
    tokens = config.train.length * 4
    forward = tokens * lm.compute_costs(config, 256)['flops_per_token']['model']
    assert 2.5 < total / forward < 3.2
    twice = workloads.lm_work(config, 256, 8, 'cpu')
    assert sum(p.flops * p.times for p in twice.products) == 2 * total
    assert (
        1.5 < twice.activations / work.activations <= 2
    )  # activations made of weights do not double


def test_an_update_of_an_agent_has_three_times_the_products_of_a_pass():
    config, spec = rl_configs.get_config('tiny'), envs.make('catch').spec
    total = sum(p.flops * p.times for p in workloads.rl_work(config, spec, 8, 'cpu').products)
    costs = rl.compute_costs(rl.build_agent(config, spec), 8, config.train.length)
    rows = 8 * (config.train.length + 1)  # the last one bootstraps
    assert 2.3 < total / (rows * costs['flops_per_step']['model']) < 3.2


def test_a_chip_has_the_convolutions_of_its_platform():
    """Of the learner of DMLab-30: on CPU, each of the nine taps is a product of its own."""
    config, spec = workloads.dmlab_config(), dmlab30.make_spec()
    gpu, cpu = (workloads.rl_work(config, spec, 8, platform) for platform in ('gpu', 'cpu'))
    assert len(gpu.products) < len(cpu.products)
    flops = [sum(p.flops * p.times for p in work.products) for work in (gpu, cpu)]
    assert 0.8 < flops[0] / flops[1] <= 1.01
    assert gpu.activations < cpu.activations


def test_the_share_of_a_bound_is_measured_over_bound():
    config = lm_configs.get_config().unlock()
    config.model.update({'embed': 64, 'hidden': 256, 'site': 'none', 'tied': False})
    config.train.update({'length': 64, 'batch': 32})
    flops = sum(p.flops * p.times for p in workloads.lm_work(config, 1024, 32, 'cpu').products)
    seconds = 4 * flops / 1e12  # a quarter of 1 TFLOP/s
    figure = {'set': 'lstm', 'side': 'mi', 'size': 'quickstart'}
    record = {'figures': [figure | {'tokens_per_second': 64 * 32 / seconds}]}
    at_peak = lambda products: sum(p.flops * p.times for p in products) / 1e12  # noqa: E731
    share = measurements.lstm_share(record, at_peak)
    np.testing.assert_allclose(share, 0.25, rtol=1e-6)


def record(chips, **changes):
    """64 rows that take 6.4 TFLOP on one chip of v5e; on more, 8 MB of gradients are summed."""
    sent = 2 * (chips - 1) / chips * 8e6
    reduction = {'kind': 'all-reduce', 'count': 4, 'bytes': 8e6, 'group': chips}
    return {
        'job': 'lstm', 'family': 'v5e', 'chips': chips, 'used': chips, 'rows': 64,
        'parameters': 2e6, 'flops': 6.4e12 / chips, 'whole': 7e12, 'bytes_accessed': 1e9,
        'peak': 3e9, 'limit': 16e9, 'fits': True, 'bytes_sent': sent, 'updates': 4,
        'collectives': [reduction] if chips > 1 else [], 'seconds': 0.4 / chips, 'error': '',
    } | changes  # fmt: skip


def columns(table):
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def test_a_program_that_divides_its_work_has_a_share_of_one():
    rows = columns(compiled.programs_table([record(1), record(8), record(64)], 'lstm'))
    assert [row['× chips / whole'] for row in rows] == ['1.000'] * 3
    assert [row['rows'] for row in rows] == ['64', '8', '1']
    assert [row['MB sent'] for row in rows] == ['0.0', '14.0', '15.8']
    assert [row['by'] for row in rows] == ['nothing', '1 all-reduce', '1 all-reduce']
    undivided = columns(compiled.programs_table([record(1), record(8, flops=6.4e12)], 'lstm'))
    assert undivided[1]['× chips / whole'] == '8.000'
    # Twice the rows on a chip are twice the work of the whole.
    weak = [record(1), record(8, rows=512, flops=6.4e12)]
    assert columns(compiled.programs_table(weak, 'lstm'))[1]['× chips / whole'] == '1.000'


def test_a_program_too_large_for_one_chip_is_compared_with_the_model(monkeypatch):
    products = [Product(7e12 / 8, 0, 1)]
    monkeypatch.setattr(compiled, 'compute_work', lambda *args: Work(products, 0))
    refused = dict.fromkeys(('flops', 'peak', 'bytes_sent', 'seconds'))
    records = [record(1, **refused, fits=False, error='Ran out of memory'), record(8)]
    rows = columns(compiled.programs_table(records, 'lstm'))
    assert (rows[0]['fits'], rows[0]['GFLOP']) == ('no', '')
    assert rows[1]['× chips / whole'] == f'{6.4 / 7:.3f}'


def test_times_are_estimates_and_links():
    chip = cluster.CHIPS['TPU v5 lite']
    computing, sending = compiled.estimate_seconds(record(8))
    assert (computing, sending) == (0.05, pytest.approx(14e6 / chip.link))
    gpu = record(8, family='h100', seconds=None, bytes_accessed=1e12)
    assert compiled.estimate_seconds(gpu)[0] == 1e12 / cluster.CHIPS['H100'].bandwidth
    gpu['bytes_accessed'] = 1.0
    assert compiled.estimate_seconds(gpu)[0] == 0.8e12 / cluster.CHIPS['H100'].flops
    single, eight = columns(compiled.times_table([record(8), record(1)]))
    assert (single['of linear'], single['rows/s']) == ('1.00', '160')
    assert float(eight['of linear']) == pytest.approx(0.05 / (0.05 + sending), abs=0.005)


def test_a_tenth_between_paper_and_program_is_marked():
    assert compiled.format_ratio(1.09, 1) == '1.09' and compiled.format_ratio(1.2, 1) == '1.20*'
    assert compiled.format_ratio(0.8, 1) == '0.80*' and compiled.format_ratio(0, 0) == '0 and 0'


def test_the_batch_of_a_job_has_its_rows():
    for name, job in compiled.JOBS.items():
        for chips in compiled.NUMBERS:
            assert job.config(chips).train.batch == job.rows(chips), name
            assert job.rows(chips) % chips == 0


def test_every_chip_has_a_source():
    assert all(chip.source and chip.name == name for name, chip in cluster.CHIPS.items())


def test_the_written_tables_are_those_of_the_code():
    written = json.loads((measurements.RESULTS / 'scaling.json').read_text())
    chip = cluster.CHIPS[written['chip']]
    remake = 'run python -m benchmarks.scaling --write=benchmarks/results/scaling.json'
    assert written['tables']['check']['rows'] == scaling.check_table(), remake
    prices = scaling.Prices(written['price'], written['core_price'])
    table = scaling.rl_table(chip, scaling.ROOFLINE_SHARE, prices)
    assert written['tables']['dmlab']['rows'] == table, remake
