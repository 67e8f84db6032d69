"""What networks of ReLU layers and fusions can represent, and the search for the smallest one."""

import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from experiments.expressivity import config as expressivity
from experiments.expressivity import problem as products
from experiments.expressivity import sweep as experiment
from mi.config import UserError
from mi.fit import (
    factory,
    network,
    search,
    train,
)
from mi.report import runs
from mi.training.run_state import PREEMPTED
from tests import prng
from tests.fit.runs import edited, finals, records


def config(word='search', **changes):
    return edited(expressivity.get_config(word), **changes)


def model(**changes):
    return network.make(config(**changes).model, features=1, context='dense')


def test_targets_have_mean_0_and_variance_d():
    def moment(power):
        return integrate.quad(
            lambda a: float(products.centered_abs(jnp.float32(a))) ** power * stats.norm.pdf(a),
            0,
            8,
        )[0]

    assert 2 * moment(1) == pytest.approx(0, abs=1e-5)
    assert 2 * moment(2) == pytest.approx(1, abs=1e-5)
    x, z = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])
    u = [(abs(a) - 0.7978846) / 0.6028103 for a in (1.0, -2.0, 3.0, 0.5)]  # √(2/π), √(1 − 2/π)
    assert products.TARGETS['product'](x, z) == pytest.approx(2.0)
    assert products.TARGETS['additive'](x, z) == pytest.approx(sum(u) / 2**0.5, rel=1e-5)
    assert products.TARGETS['x_only'](x, z) == pytest.approx(u[0] + u[1], rel=1e-5)


@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('site', ['first', 'last', 'all'])
@pytest.mark.parametrize('word', ['concat', 'none'])
def test_an_mi_network_is_any_relu_network_if_W_is_0(word, site, depth):
    """With its U, V and b an MI network is a ReLU network of the concatenation, and with U = 0 too
    one of x alone: the same function, bit for bit."""
    shape = {'model.depth': depth, 'model.width': 7, 'model.site': site}
    relu_network = model(**shape, **{'model.fusion.name': word})
    mi_network = model(**shape, **{'model.fusion.name': 'mi'})
    x, z = jax.random.normal(prng.key(0), (2, 50, 5))
    relu_params = jax.eval_shape(relu_network.init, jax.random.key(1), x, z)
    fused_layers = {'first': [0], 'last': [depth], 'all': [*range(depth + 1)]}[site]
    fused = [name for name in relu_params['params'] if name.startswith('fusion')]
    assert sorted(fused) == [f'fusion_{layer_index}' for layer_index in fused_layers]
    rng = np.random.default_rng(2)  # biases are 0 at the start
    relu_params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype('f'), relu_params)
    shapes = jax.eval_shape(mi_network.init, jax.random.key(2), x, z)
    mi_params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for name, relu_layer in relu_params['params'].items():
        is_fused = name.startswith('fusion')
        mi_only = {'concat': {'W'}, 'none': {'W', 'U'}}[word] if is_fused else set()
        assert set(mi_params['params'][name]) - set(relu_layer) == mi_only
        mi_params['params'][name] |= relu_layer
    expected = relu_network.apply(relu_params, x, z)
    np.testing.assert_array_equal(mi_network.apply(mi_params, x, z), expected)
    hidden = np.asarray(x, np.float64)  # and that function is an MLP
    for layer_index in range(depth + 1):
        fused = relu_params['params'].get(f'fusion_{layer_index}')
        if fused is None:
            affine = relu_params['params'][f'affine_{layer_index}']
            A, a = affine['kernel'], affine['bias']
        elif word == 'concat':
            hidden = np.concatenate([hidden, z], -1)
            A, a = np.concatenate([fused['V'], fused['U']]), fused['b']
        else:
            A, a = fused['V'], fused['b']
        hidden = hidden @ np.asarray(A, np.float64) + np.asarray(a, np.float64)
        hidden = np.maximum(hidden, 0) if layer_index < depth else hidden
    np.testing.assert_allclose(expected, hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('d', [1, 3, 64])
def test_an_mi_with_the_identity_for_W_is_the_product(d):
    layer = model(**{'model.depth': 0, 'model.fusion.name': 'mi'})
    x, z = jax.random.normal(prng.key(0), (2, 1000, d))
    params = jax.tree.map(jnp.zeros_like, layer.init(prng.key(1), x, z))
    params['params']['fusion_0']['W'] = jnp.eye(d)[..., None]
    exact = np.sum(np.asarray(x, np.float64) * np.asarray(z, np.float64), -1)
    scale = np.sum(np.abs(np.asarray(x) * np.asarray(z)), -1).max()
    error = np.abs(layer.apply(params, x, z)[:, 0] - exact)
    assert error.max() <= 4 * np.finfo(np.float32).eps * scale


LENGTH, POINTS = 4.0, 2000  # of an interval of the diagonal x = z
DIAGONAL = ((np.arange(POINTS) + 0.5) / POINTS - 0.5)[:, None] * LENGTH


@functools.partial(jax.jit, static_argnums=0)
def apply_on_diagonal(network, params):
    return network.apply(params, DIAGONAL, DIAGONAL)


def evaluate_on_diagonal(network, params):
    with jax.enable_x64(True):
        outputs = np.asarray(apply_on_diagonal(network, params))[:, 0]
    assert outputs.dtype == np.float64
    return outputs


def parabola_error(network, params):
    """The mean squared error on the diagonal, where the product is a parabola."""
    return np.mean((evaluate_on_diagonal(network, params) - DIAGONAL[:, 0] ** 2) ** 2)


@pytest.mark.parametrize('seed', range(10))
def test_on_a_line_a_relu_network_has_one_kink_per_unit_and_an_mi_is_curved(seed):
    width, rng = 8, np.random.default_rng(seed)
    is_curved = {}
    for name in ('concat', 'mi'):
        fused_network = model(**{'model.width': width, 'model.fusion.name': name})
        shapes = jax.eval_shape(fused_network.init, jax.random.key(0), DIAGONAL, DIAGONAL)
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
        is_curved[name] = np.abs(np.diff(evaluate_on_diagonal(fused_network, params), 2)) > 1e-9
    # Each kink lies between two points, and shows at one of them or both.
    kinks = np.sum(np.diff(is_curved['concat'], prepend=False) & is_curved['concat'])
    assert 2 <= kinks <= width and np.sum(is_curved['concat']) <= 2 * width
    assert np.sum(is_curved['mi']) > 2 * width


@pytest.mark.parametrize('w', [2, 4, 8])
def test_relu_networks_on_a_line_have_the_error_of_their_pieces_as_a_tight_bound(w):
    """On the diagonal x = z a product is a parabola, and a ReLU network of w units has at most
    n = w + 1 straight pieces there, if the maps that meet z are concatenations. The least mean
    squared error of those is L⁴/(180 n⁴) on an interval of length L: each is affine on a length l,
    where that of t² is l⁴/180, and equal lengths are best."""
    n = w + 1
    points = POINTS / n  # of a piece; the mean over these is a little less than that of the length
    bound = (LENGTH / n) ** 4 / 180 * (1 - 1 / points**2) * (1 - 4 / points**2)
    relu_network = model(**{'model.width': w})

    def fit_last_layer(kinks, signs):
        """The error of the network with these units, by least squares of its last map."""
        rows = np.maximum(signs * (DIAGONAL - kinks), 0)
        last_layer, *_ = np.linalg.lstsq(np.c_[rows, np.ones(POINTS)], DIAGONAL**2, rcond=None)
        half = signs[None] / 2
        params = {
            'fusion_0': {'U': half, 'V': half, 'b': -signs * kinks},
            'affine_1': {'kernel': last_layer[:-1], 'bias': last_layer[-1]},
        }
        return parabola_error(relu_network, {'params': params})

    rng = np.random.default_rng(w)
    equal_kinks = np.linspace(-LENGTH / 2, LENGTH / 2, n + 1)[1:-1]
    for spread in np.repeat([0.01, 0.1, 1], 30):
        kinks = equal_kinks + spread * rng.normal(size=w)
        assert fit_last_layer(kinks, rng.choice([-1, 1], w)) >= bound * (1 - 1e-9)
    assert fit_last_layer(equal_kinks, np.sign(equal_kinks)) == pytest.approx(bound, rel=1e-3)
    mi_network = model(**{'model.depth': 0, 'model.fusion.name': 'mi'})
    params = jax.tree.map(jnp.zeros_like, mi_network.init(prng.key(0), DIAGONAL, DIAGONAL))
    params['params']['fusion_0']['W'] = jnp.ones((1, 1, 1))
    assert parabola_error(mi_network, params) < 1e-9 * bound


@pytest.mark.parametrize('seed', range(20))
def test_bisection_finds_what_trying_every_width_finds(seed):
    rng = np.random.default_rng(seed)
    sizes, seeds = int(rng.integers(1, 30)), int(rng.integers(1, 6))
    first_places = rng.integers(0, sizes + 3, seeds)  # from where on a seed reaches the target
    reached = {}
    while True:
        brackets = search.find_brackets(reached, seeds, sizes)
        place = search.next_place(brackets, sizes, int(rng.integers(0, 30)), 4)
        if place is None:
            break
        assert place not in reached
        reached[place] = [bool(place >= first) for first in first_places]
    assert [high for _, high in brackets] == [min(first, sizes) for first in first_places]


def test_widths_and_growth():
    assert search.make_grid(16, 2) == [1, 2, 3, 4, 6, 8, 11, 16]
    assert search.make_grid(15, 2) == [1, 2, 3, 4, 6, 8, 11, 15]  # the largest too
    assert search.fit_exponent([4, 8, 16], [3 * d**2.5 for d in (4, 8, 16)]) == pytest.approx(2.5)
    assert search.fit_exponent([4], [10]) is None
    assert [search._guess(highest) for highest in ([], [3], [3, 5], [7, 2])] == [0, 3, 7, 0]
    cfg = config(**{'search.parameters': 73, 'problem.dimension': 2})
    assert factory.largest_width(cfg) == 12  # 2·12·2 + 12 + 12 + 1
    cfg.search.parameters = 72
    assert factory.largest_width(cfg) == 11


@pytest.mark.slow
def test_a_low_rank_interaction_needs_fewer_parameters_than_a_relu_network_for_a_product(tmp_path):
    changes = {
        'search.at': (2,), 'search.rates': (3e-2,), 'seeds': (0, 1), 'problem.examples': 2000,
        'train.steps': 1000, 'search.per_octave': 1, 'optim.warmup_steps': 20,
    }  # fmt: skip
    for name in ('mi_low_rank', 'concat'):
        search.search(config(**changes, **{'model.fusion.name': name}), str(tmp_path / name))
    low_rank_records, concat_records = (
        records(tmp_path / name, 'eval') for name in ('mi_low_rank', 'concat')
    )
    for low_rank, concat in zip(low_rank_records, concat_records, strict=True):
        assert low_rank['mse/2'] <= 0.1 and concat['mse/2'] <= 0.1
        assert low_rank['parameters/2'] < concat['parameters/2']


@pytest.mark.parametrize('rates', [(1e-9, 1e-2), (1e-2, 1e-9)])
def test_a_probe_reports_the_rate_that_reached_its_error(rates):
    changes = {
        'search.rates': rates, 'train.steps': 40, 'train.log_every': 20, 'train.eval_every': 20,
        'train.save_every': 20, 'train.batch': 64,
        'problem.dimension': 1, 'problem.examples': 64, 'seeds': (0, 1), 'search.target': 1e-9,
    }  # fmt: skip
    two_rates = search.probe(config(**changes), 4)
    one_rate = search.probe(config(**changes | {'search.rates': (1e-2,)}), 4)
    assert [record['learning_rate'] for record in two_rates] == pytest.approx([1e-2, 1e-2])
    errors, expected = ([record['mse'] for record in rates] for rates in (two_rates, one_rate))
    assert errors == pytest.approx(expected, rel=1e-4)


def test_a_stopped_search_resumes_and_tries_no_width_twice(tmp_path, monkeypatch):
    """Where a seed reaches the target from width 3 d² + seed on."""
    probed = []

    def probe(config, width):
        probed.append((config.problem.dimension, width))
        reached = [width >= 3 * config.problem.dimension**2 + seed for seed in config.seeds]
        return [
            {'width': width, 'parameters': width, 'mse': 0.1 if hit else 0.11, 'learning_rate': 1}
            for hit in reached
        ]

    monkeypatch.setattr(search, 'probe', probe)
    monkeypatch.setattr('mi.fit.factory.largest_width', lambda config: 300)
    changes = {'search.at': (2, 4, 8), 'search.fit_from': 2, 'search.per_octave': 32}
    ticks = itertools.count()
    monkeypatch.setattr(search.time, 'perf_counter', lambda: float(next(ticks)))

    def count_seconds(run_name):
        return runs.read_sweep(tmp_path / run_name).arms[0].training_seconds()[1][-1]

    search.search(config(**changes), str(tmp_path / 'whole'))
    assert count_seconds('whole') >= len(probed)  # a probe is a tick at least
    num_probes, probed[:] = len(probed), []
    monkeypatch.setattr('mi.training.run_dir.Run.should_stop', lambda this, recorded: True)
    for _ in range(num_probes):
        with pytest.raises(SystemExit) as stopped:
            search.search(config(**changes), str(tmp_path / 'stopped'))
        assert stopped.value.code == PREEMPTED
    search.search(config(**changes), str(tmp_path / 'stopped'))
    assert len(probed) == len(set(probed)) == num_probes
    assert count_seconds('stopped') >= num_probes
    whole, stopped = (
        (tmp_path / run_name / 'metrics.jsonl').read_bytes() for run_name in ('whole', 'stopped')
    )
    assert whole == stopped
    for record in records(tmp_path / 'whole', 'eval'):
        for d in (2, 4, 8):
            smallest_width = 3 * d * d + record['seed']
            next_width = max(smallest_width + 1, 1.05 * smallest_width)
            assert smallest_width <= record[f'width/{d}'] <= next_width
        assert record['exponent'] == pytest.approx(2, abs=0.2)


def test_a_seed_that_missed_the_target_counts_as_the_largest(tmp_path):
    """Medians and laws of the report, of an arm with 2 d², one that 4 of 10 seeds lose at d = 8."""
    members = []
    for fusion, missing_seeds in ('mi', ()), ('concat', (0, 3, 5, 6)), ('film', range(10)):
        for seeds in experiment.SEEDS:
            name = f'{fusion}, {seeds[0]}'
            (tmp_path / name).mkdir()
            search_config = {'at': [2, 4, 8], 'fit_from': 2, 'parameters': 200}
            run_config = {'seeds': seeds, 'search': search_config}
            (tmp_path / name / 'config.json').write_text(json.dumps(run_config))
            (tmp_path / name / 'status.json').write_text('{"state": "done", "step": 3}')
            metrics = [
                {f'parameters/{d}': (2 + 0.1 * seed) * d * d for d in (2, 4, 8)
                 if d < 8 or seed not in missing_seeds} | {'step': 3, 'seed': seed, 'split': 'eval'}
                for seed in seeds
            ]  # fmt: skip
            contents = ''.join(json.dumps(line) + '\n' for line in metrics)
            (tmp_path / name / 'metrics.jsonl').write_text(contents)
            members.append({'name': name, 'label': f'product, {fusion}, 1'})
    description = {'name': 'a', 'metric': 'parameters/4', 'split': 'eval', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(description | {'members': members}))
    experiment.report(tmp_path, tmp_path)
    table = {
        line.split('|')[1].strip(): [cell.strip() for cell in line.split('|')[2:-1]]
        for line in (tmp_path / 'expressivity.md').read_text().splitlines()
        if line.startswith('|')
    }
    # Of concat 1, 2, 4, 7, 8, 9 are left at d = 8: the middle of ten is between the 5th and 6th.
    assert table['mi'][:4] == ['10', '39', '157', '2, 4, 8']
    assert table['concat'][:4] == ['10', '39', '182 (6 of 10 seeds)', '2, 4']
    assert table['film'][:4] == ['10', '39', 'not reached', '2, 4']
    assert [table[name][4] for name in ('mi', 'concat')] == ['2.00 [2.00, 2.00]'] * 2


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    """Networks of about 60 parameters on the product of two numbers, and where they are."""
    path = tmp_path_factory.mktemp('fitted')
    for name in ('concat', 'mi'):
        changes = {'model.fusion.name': name, 'model.parameters': 61, 'problem.dimension': 1}
        changes |= {'optim.learning_rate': 3e-2, 'seeds': (0, 1)}
        train.train(config('fit', **changes), str(path / name))
    return path


@pytest.mark.slow
def test_an_mi_fits_a_product_better_than_concat_with_equal_parameters(fitted):
    mi_errors, concat_errors = (finals(fitted / name, 'mse', 'eval') for name in ('mi', 'concat'))
    for seed in (0, 1):
        assert mi_errors[seed] < concat_errors[seed] / 10
    costs = [json.loads((fitted / name / 'cost.json').read_text()) for name in ('mi', 'concat')]
    assert [cost['parameters']['model'] for cost in costs] == [61, 61]


def test_the_surface_is_the_error_at_each_point(fitted):
    surface = np.load(fitted / 'concat/artefacts.npz')['surface']
    assert surface.shape == (2, products.POINTS, products.POINTS)
    cfg = config('fit', **{'problem.dimension': 1, 'model.width': 5})
    problem = products.make(cfg)
    params = problem.init_params(prng.key(3), {})
    surface = problem.artifacts(params, {}, prng.key(4))['surface']
    x, z = 1.5, -0.75  # three quarters and three eighths of the way
    prediction = network.make(cfg.model, 1, 'dense').apply(params, jnp.array([x]), jnp.array([z]))[
        0
    ]
    assert surface[45, 90] == pytest.approx(float(prediction) - x * z, abs=1e-6)
    assert abs(surface[45, 90] - surface[90, 45]) > 1e-3


def test_a_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    changes = {'seeds': (0, 1), 'train.steps': 40, 'train.log_every': 10, 'train.eval_every': 20,
               'train.save_every': 40, 'problem.dimension': 1}  # fmt: skip
    train.train(config('fit', **changes), str(tmp_path / 'whole'))
    with monkeypatch.context() as patch:
        patch.setattr('mi.training.run_dir.Run.should_stop', lambda this, recorded: this.step == 10)
        with pytest.raises(SystemExit):
            train.train(config('fit', **changes), str(tmp_path / 'stopped'))
    assert os.listdir(tmp_path / 'stopped/checkpoints') == ['00000010']
    train.train(config('fit', **changes), str(tmp_path / 'stopped'))
    for name in ('metrics.jsonl', 'artefacts.npz', 'cost.json'):
        whole, stopped = (
            (tmp_path / run_name / name).read_bytes() for run_name in ('whole', 'stopped')
        )
        assert whole == stopped


@pytest.mark.parametrize(
    ('word', 'changes', 'message'),
    [
        ('search', {'problem.name': 'product'}, r"problem\.name = 'product': expected a module"),
        ('search', {'problem.target': 'sum'}, r"problem\.target = 'sum'"),
        ('search', {'problem.dimension': 0}, r'problem\.dimension = 0'),
        ('search', {'search.rates': ()}, r'search\.rates.*non-empty tuple of positive numbers'),
        ('search', {'search.at': (1, 0)}, r'search\.at.*tuple of positive integers'),
        ('search', {'search.over': 'model.width'}, r'search\.over'),
        ('search', {'model.parameters': 100}, r'= 100: expected 0, because .*search\.parameters'),
        ('search', {'train.eval_every': 333}, r'expected a multiple of config\.train\.log_every'),
        ('search', {'train.steps': 1100}, r'train\.steps = 1100: expected a multiple of .* 250'),
        (
            'fit',
            {'model.parameters': 3},
            r'model\.parameters = 3: the smallest size, 1, .* Try a larger value',
        ),
        (
            'fit',
            {'model.parameters': 10**14},
            r'model\.parameters = 10+: no size up to .* Try a lower value',
        ),
        (
            'fit',
            {'model.parameters': 100, 'model.depth': 0, 'model.fusion.name': 'mi'},
            r'= 100: expected 0, or a model .* always has 25 parameters',
        ),
    ],
)
def test_bad_values_are_refused(word, changes, message, tmp_path):
    task = search.search if word == 'search' else train.train
    with pytest.raises(UserError, match=message):
        task(config(word, **changes), str(tmp_path / 'run'))
    assert not (tmp_path / 'run/metrics.jsonl').exists()
