"""Many chips on paper: a toy cluster by hand, and work that is counted against the formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cluster, scaling
from benchmarks.cluster import Chip, Job, Work
from configs import lm as configs_lm
from configs import rl as configs_rl
from mi.cost import Product
from mi.lm import setup as lm
from mi.rl import envs
from mi.rl import setup as rl

CHIP = Chip('toy', 1e12, 5e11, 1e9, 1e11, link=1e10, node=4, network=1e9, cores=2, source='')
WORK = Work([Product(2 * 10**9, 10**8, 3), Product(10**6, 10**8, 2)], activations=7)


def job(parameters=10**6, work=lambda rows: WORK):
    return Job('toy', parameters, units=5, total=1e6, work=work)


def test_a_step_of_one_chip_by_hand():
    step = cluster.step(job(), CHIP, chips=1, rows=8, share=0.5)
    np.testing.assert_allclose(step.arithmetic, 3 * 2e-3 / 0.5)  # 2 GFLOP at 1 TFLOP/s, not 1 ms
    np.testing.assert_allclose(step.reading, 2 * 1e-3 / 0.5)  # 100 MB at 100 GB/s
    np.testing.assert_allclose(step.optimiser, 8 * 4e6 / 1e11)
    assert (step.traffic, step.network) == (0, 0)
    assert step.memory == 16 * 10**6 + 7
    assert step.bottleneck == 'arithmetic'
    np.testing.assert_allclose(cluster.hours(job(), step), 1e6 / (40 / step.seconds) / 3600)


def test_a_ring_sends_what_it_has_to():
    assert cluster.exchange(1000, replicas=4, fsdp=1) == (0, 2 * 3 / 4 * 4000)
    # gathered twice and scattered once in the group; a quarter of the gradient between two groups
    assert cluster.exchange(1000, replicas=2, fsdp=4) == (3 * 3 / 4 * 4000, 2 * 1 / 2 * 4000 / 4)


def test_nodes_are_left_by_all_their_network_cards():
    step = cluster.step(job(), CHIP, chips=8, rows=8)
    np.testing.assert_allclose(step.traffic, 2 * 7 / 8 * 4e6)
    np.testing.assert_allclose(step.network, 7e6 / 4e9 + 14 * cluster.LATENCY)
    inside = cluster.step(job(), CHIP, chips=4, rows=8)
    np.testing.assert_allclose(inside.network, 6e6 / 1e10 + 6 * cluster.LATENCY)


def test_splitting_parameters_divides_memory_and_the_optimisers_time():
    whole, split = (cluster.step(job(), CHIP, 8, 8, fsdp) for fsdp in (1, 4))
    assert split.memory - 7 == (whole.memory - 7) / 4
    np.testing.assert_allclose(split.optimiser, whole.optimiser / 4)
    np.testing.assert_allclose(
        split.network, 9e6 / 1e10 + 1e6 / 4e9 + (3 * 3 + 2 * 1) * cluster.LATENCY
    )


def test_the_bottleneck_moves_to_the_network():
    small = job(10**8, lambda rows: Work([Product(rows * 10**10, 10**6, 1)], 0))
    bounds = [cluster.step(small, CHIP, n, 64).bottleneck for n in (1, 4, 64)]
    assert bounds == ['arithmetic', 'arithmetic', 'network']
    with pytest.raises(ValueError, match='8 rows on 3 chips'):
        cluster.step(small, CHIP, 3, 8)


def test_what_the_backward_pass_keeps():
    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(params, x):
        return jnp.sum(x @ params['p'] @ params['q'])

    # x and x p; q too, which is a parameter and there anyway
    kept = scaling.kept(loss, {'p': of(3, 5), 'q': of(5, 2)}, of(7, 3))
    assert kept == 4 * (7 * 3 + 7 * 5)


def test_a_training_step_of_a_language_model_has_three_times_the_products_of_a_pass():
    config = configs_lm.get_config('tiny')
    work = scaling.lm_work(config, 256, 4)
    total = sum(p.flops * p.times for p in work.products)
    tokens = config.train.length * 4
    forward = tokens * lm.costs(config, 256)['flops_per_token']['model']
    assert 2.5 < total / forward < 3.2
    twice = scaling.lm_work(config, 256, 8)
    assert sum(p.flops * p.times for p in twice.products) == 2 * total
    assert 1.5 < twice.activations / work.activations <= 2  # what is made of weights is there once


def test_an_update_of_an_agent_has_three_times_the_products_of_a_pass():
    config, spec = configs_rl.get_config('tiny'), envs.make('catch').spec
    total = sum(p.flops * p.times for p in scaling.rl_work(config, spec, 8).products)
    costs = rl.costs(rl.agent(config, spec), 8, config.train.length)
    rows = 8 * (config.train.length + 1)  # the last one bootstraps
    assert 2.3 < total / (rows * costs['flops_per_step']['model']) < 3.2


def test_the_share_of_a_bound_is_what_was_measured_over_it():
    config = configs_lm.get_config().unlock()
    config.model.update({'embed': 64, 'hidden': 256, 'site': 'none', 'tied': False})
    config.train.update({'length': 64, 'batch': 32})
    flops = sum(p.flops * p.times for p in scaling.lm_work(config, 1024, 32).products)
    seconds = 4 * flops / 1e12  # a quarter of 1 TFLOP/s
    figure = {'set': 'lstm', 'side': 'mi', 'size': 'quickstart'}
    record = {'figures': [figure | {'tokens_per_second': 64 * 32 / seconds}]}
    at_peak = lambda products: sum(p.flops * p.times for p in products) / 1e12  # noqa: E731
    share = scaling.lm_share(record, 'lstm', scaling.LSTM_CPU, at_peak)
    np.testing.assert_allclose(share, 0.25, rtol=1e-6)


def test_every_chip_says_where_its_figures_come_from():
    assert all(chip.source and chip.name == name for name, chip in cluster.CHIPS.items())


@pytest.mark.slow
def test_the_written_tables_are_those_of_the_code():
    written = json.loads((scaling.RESULTS / 'scaling.json').read_text())
    chip = cluster.CHIPS[written['chip']]
    remake = 'run python -m benchmarks.scaling --write=benchmarks/results/scaling.json'
    assert written['tables']['check']['rows'] == scaling.check_table(), remake
    share = scaling.shares(chip)['agent'][0]
    made = scaling.rl_table(chip, share, written['price'], written['core_price'])
    assert written['tables']['dmlab']['rows'] == made, remake
