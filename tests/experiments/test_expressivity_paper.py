"""The protocol of the paper: bilinear targets, networks that have them exactly, and the laws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.expressivity import config as expressivity
from experiments.expressivity import problem as products
from experiments.expressivity import sweep_paper as experiment
from mi.fit import factory, search
from mi.training import optim
from tests import prng
from tests.fit.runs import edited, records

BARE = {'model.fusion.name': 'mi', 'model.depth': 0}


def config(**changes):
    return edited(expressivity.get_config('paper'), **changes)


def draw(target, dimension, seed=0, **changes):
    """The problem and its world of a seed, as NumPy arrays."""
    problem = products.make(
        config(**{'problem.target': target, 'problem.dimension': dimension} | changes)
    )
    return problem, jax.tree.map(np.asarray, problem.draw_world(prng.key(seed)))


def test_a_bilinear_target_is_that_of_numpy_with_a_matrix_of_its_seed():
    problem, world = draw('bilinear', 5)
    x, z = np.random.default_rng(0).normal(size=(2, 7, 5))
    y = problem.compute_target(world, jnp.asarray(x), jnp.asarray(z))
    expected = [sum(x[i, a] * world['W'][a, b] * z[i, b] for a in range(5) for b in range(5))
                for i in range(7)]  # fmt: skip
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    _, other_world = draw('bilinear', 5, seed=1)
    assert np.abs(world['W'] - other_world['W']).min() > 1e-4


@pytest.mark.parametrize('dimension', [1, 4, 16])
def test_the_variance_of_both_targets_is_the_dimension(dimension):
    x, z = np.random.default_rng(1).normal(size=(2, 200_000, dimension)).astype('f')
    for target in ('product', 'bilinear'):
        problem, world = draw(target, dimension)
        y = np.asarray(problem.compute_target(world, x, z), np.float64)
        assert np.var(y) == pytest.approx(dimension, rel=0.03)
        assert np.mean(y) == pytest.approx(0, abs=0.01 * dimension)
    assert np.sum(world['W'] ** 2) == pytest.approx(dimension, rel=1e-5)


def test_one_unit_of_mi_with_the_matrix_of_the_target_has_no_error():
    """W of the layer is [m, n, k], context first: the transpose of the target's."""
    problem, world = draw('bilinear', 6, **BARE)
    params = jax.tree.map(jnp.zeros_like, problem.init_params(prng.key(0), world))
    params['params']['fusion_0']['W'] = jnp.asarray(world['W'].T[..., None])
    assert problem.evaluate(params, world, prng.key(1))['eval']['mse'] < 1e-9
    params['params']['fusion_0']['W'] = jnp.asarray(world['W'][..., None])
    assert problem.evaluate(params, world, prng.key(1))['eval']['mse'] > 1


def test_an_mi_with_a_read_out_has_a_bilinear_form_above_minus_its_bias():
    """relu(xᵀWz + b) − b = xᵀWz wherever that is above −b."""
    problem, world = draw('bilinear', 6, **{'model.fusion.name': 'mi', 'model.width': 1})
    params = jax.tree.map(jnp.zeros_like, problem.init_params(prng.key(0), world))
    layer, read_out = params['params']['fusion_0'], params['params']['affine_1']
    layer['W'] = jnp.asarray(world['W'].T[..., None])
    read_out['kernel'] = jnp.ones((1, 1))
    for bias, is_exact in ((64.0, True), (1.0, False)):
        layer['b'], read_out['bias'] = jnp.full(1, bias), jnp.full(1, -bias)
        mse = problem.evaluate(params, world, prng.key(1))['eval']['mse']
        assert (mse < 1e-9) == is_exact


@pytest.mark.parametrize('dimension', range(1, 21))
def test_numbers_of_parameters(dimension):
    def count(width, **changes):
        changes = {'problem.dimension': dimension, 'model.width': width} | changes
        return factory.count_parameters(products.make(config(**changes)))

    assert count(1, **BARE) == (dimension + 1) ** 2
    assert count(1, **{'model.fusion.name': 'mi'}) == dimension**2 + 2 * dimension + 3
    assert count(9) == 9 * (2 * dimension + 2) + 1


def test_the_optimizer_of_the_protocol_is_adam_at_a_constant_rate():
    cfg = config()
    assert (cfg.train.steps, cfg.train.batch, cfg.search.target) == (6000, 100, 0.1)
    rates = optim.schedule(cfg.optim, cfg.train.steps)
    assert {float(rates(step)) for step in (0, 1, 3000, 5999)} == {cfg.optim.learning_rate}
    # It is optax.adam, without clipping: a gradient of norm 1, then one of norm 1,000.
    params = {'kernel': jnp.zeros(2)}
    updates = {}
    for name, optimizer in (
        ('ours', optim.make_optimizer(cfg.optim, cfg.train.steps)),
        ('optax', optax.adam(cfg.optim.learning_rate)),
    ):
        state = optimizer.init(params)
        for norm in (1.0, 1000.0):
            gradient = {'kernel': norm * jnp.array([0.6, -0.8])}
            updates[name], state = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(updates['ours']['kernel'], updates['optax']['kernel'], rtol=1e-6)


TOY = {
    'search.at': (1, 2), 'train.steps': 600, 'train.log_every': 200, 'train.eval_every': 200,
    'train.save_every': 600, 'problem.examples': 1000, 'problem.target': 'bilinear',
    'seeds': (0, 1), 'search.rates': (3e-2, 3e-3),
}  # fmt: skip


@pytest.mark.slow
def test_a_search_tries_a_network_of_one_size_once(tmp_path):
    """One unit of MI reaches the error with (d + 1)² parameters, and one affine map does not."""
    search.search(config(**TOY | BARE), str(tmp_path / 'mi'))
    assert len(records(tmp_path / 'mi', 'probe')) == 4  # dimensions and seeds
    for record in records(tmp_path / 'mi', 'eval'):
        assert (record['parameters/1'], record['parameters/2']) == (4, 9)
        assert max(record['mse/1'], record['mse/2']) <= 0.1
    concat = {'model.fusion.name': 'concat', 'search.at': (2,)}
    search.search(config(**TOY | BARE | concat), str(tmp_path / 'concat'))
    (probe, _), evals = (records(tmp_path / 'concat', split) for split in ('probe', 'eval'))
    assert probe['mse'] == pytest.approx(2, rel=0.3)  # the variance of the target
    assert not any('parameters/2' in record for record in evals)


@pytest.mark.slow
def test_an_mlp_needs_more_parameters_for_a_bilinear_form_than_mi(tmp_path):
    changes = {'search.at': (2,), 'train.steps': 2000, 'search.per_octave': 1}
    for name in ('mi', 'concat'):
        search.search(config(**TOY | changes, **{'model.fusion.name': name}), str(tmp_path / name))
    mi, concat = (records(tmp_path / name, 'eval') for name in ('mi', 'concat'))
    for mi_record, concat_record in zip(mi, concat, strict=True):
        assert mi_record['parameters/2'] == 11
        assert concat_record['parameters/2'] > 2 * 11


def test_the_law_that_made_a_curve_is_the_nearer_one():
    power = experiment.fit_laws({d: 7 * d**2.5 for d in range(1, 8)})
    assert (power.exponent, power.power_error) == pytest.approx((2.5, 0), abs=1e-9)
    assert power.exponential_error > 0.1
    exponential = experiment.fit_laws({d: 3 * 1.9**d for d in range(1, 8)})
    assert (exponential.rate, exponential.exponential_error) == pytest.approx((1.9, 0), abs=1e-9)
    assert exponential.power_error > 0.1
    # ln P is ln 2 · (1, −1, −1, 1): symmetric, so that a line in d has the slope 0.
    symmetric = experiment.fit_laws({1: 2, 2: 0.5, 3: 0.5, 4: 2})
    assert (symmetric.rate, symmetric.exponential_error) == pytest.approx((1, np.log(2)))
    assert experiment.fit_laws({1: 4, 2: 9}) is None


def test_the_digitised_curves_are_those_of_the_slide():
    curves = experiment.read_paper_curves()
    assert curves == {
        'inner_product': {1: 30, 2: 82, 3: 180, 4: 505, 5: 735, 6: 1420, 7: 2250},
        'bilinear': {1: 30, 2: 82, 3: 180, 4: 530, 5: 1450},
    }
    assert set(experiment.PAPER_TARGETS.values()) == curves.keys()
    header = experiment.PAPER_CURVES.read_text().splitlines()[:3]
    assert all(line.startswith('#') for line in header)


def write_sweep(path):
    """A power, 20 d², in the first draw of seeds, and an exponential, 15 · 2ᵈ, in the second."""
    members = []
    for target in experiment.TARGETS:
        for (fusion, depth), network in experiment.NETWORKS.items():
            for seeds in ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)):
                name = f'{target}, {fusion}, {depth}, {seeds[0]}'
                (path / name).mkdir()
                run_config = {'seeds': seeds, 'search': {'at': [1, 2, 3, 4], 'parameters': 2500}}
                (path / name / 'config.json').write_text(json.dumps(run_config))
                (path / name / 'status.json').write_text('{"state": "done", "step": 4}')

                def get_smallest(d, seed, network=network):
                    if network != experiment.MLP:
                        return (d + 1) ** 2
                    return 20 * d**2 if seed < 5 else 15 * 2**d

                metrics = [
                    {f'parameters/{d}': get_smallest(d, seed) for d in (1, 2, 3, 4)
                     if d < 4 or network != experiment.MLP or (target != 'product' and seed != 7)}
                    | {'step': 4, 'seed': seed, 'split': 'eval'} for seed in seeds
                ]  # fmt: skip
                contents = ''.join(json.dumps(line) + '\n' for line in metrics)
                (path / name / 'metrics.jsonl').write_text(contents)
                overrides = {'problem.target': target, 'model.fusion.name': fusion,
                             'model.depth': depth}  # fmt: skip
                label = f'{target}, {fusion}, {depth}'
                members.append({'name': name, 'label': label, 'overrides': overrides})
    description = {'name': 'a', 'metric': 'parameters/4', 'split': 'eval', 'lower_is_better': True}
    (path / 'sweep.json').write_text(json.dumps(description | {'members': members}))


def test_the_report_tells_medians_missed_seeds_and_the_nearer_law_of_each_draw(tmp_path):
    write_sweep(tmp_path)
    experiment.report(tmp_path, tmp_path)
    sections = (tmp_path / 'expressivity_paper.md').read_text().split('**')
    tables = {
        title: [
            [cell.strip() for cell in line.strip('|').split('|')]
            for line in body.splitlines()
            if line.startswith('|')
        ]
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
    }
    product, bilinear = (
        {row[0]: row[1:] for row in tables[experiment.TARGETS[target]]}
        for target in ('product', 'bilinear')
    )
    columns = ['MLP', 'MI', 'bare', 'paper']
    # Medians of 20 d² and 15 · 2ᵈ, five seeds each.
    assert dict(zip(columns, product['3'], strict=True)) == {
        'MLP': '150', 'MI': '16', 'bare': '16', 'paper': '180',
    }  # fmt: skip
    assert product['4'] == ['not reached', '25', '25', '505']
    assert bilinear['4'] == ['320 (9 of 10 seeds)', '25', '25', '530']
    laws = {row[0]: row[1:] for row in tables['Laws of the growth']}
    first, second = (laws[f'ours, ⟨x, z⟩, seeds {draw}'] for draw in ('0 to 4', '5 to 9'))
    assert first[:3] == ['1 to 3', '2.00 [2.00, 2.00]', '0.00'] and first[-1] == '5 of 5'
    assert second[3:] == ['2.00 [2.00, 2.00]', '0.00', '0 of 5']
    assert laws['paper, ⟨x, z⟩'][0] == '1 to 7' and laws['paper, xᵀWz'][0] == '1 to 5'
    assert (tmp_path / 'expressivity_paper.png').stat().st_size > 0


def test_every_member_of_the_sweep_is_a_search_within_the_plot_of_the_paper():
    members = experiment.sweep()
    assert len(members) == 2 * 3 * len(experiment.SEEDS)
    for member in members:
        cfg = config(**member)
        factory.validate(cfg)
        network = member['model.fusion.name'], member['model.depth']
        assert network in experiment.NETWORKS
        if network == ('mi', 0):
            assert factory.largest_width(edited(cfg, **{'problem.dimension': 20})) == 1
