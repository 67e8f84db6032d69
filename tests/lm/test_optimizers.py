"""Optimizers of optax train, continue to the same bits, and are divided as the parameters are."""

import json

import jax
import numpy as np
import optax
import pytest
from optax import contrib

from configs import lm as configs
from mi.config import UserError
from mi.lm import assess, factory, train
from mi.lm.restore import restore
from mi.training import averaging, checkpoint, optim
from tests.conftest import printed_on_devices
from tests.lm.test_resume import restored

LEARNING_RATES = {
    'optax:lion': 1e-2,
    'optax.contrib:muon': 3e-2,
    'optax.contrib:schedule_free_adamw': 3e-2,
}


def tiny(texts, **changes):
    config = configs.get_config('tiny').unlock()
    config.update_from_flattened_dict({'data.source': texts, 'seeds': (3, 4), **changes})
    return config.lock()


def records(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def train_in_two_parts(config, path):
    """End right after the checkpoint of step 10, and continue."""
    save = checkpoint.Checkpoints.save

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        if step == 10:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Checkpoints, 'save', save_and_die)
        train.train(config, str(path))
    train.train(config, str(path))


def assert_same_bits(path, other):
    assert (path / 'metrics.jsonl').read_bytes() == (other / 'metrics.jsonl').read_bytes()
    arrays, expected = (restored(run / 'checkpoints/00000020/state') for run in (path, other))
    assert arrays == expected


@pytest.mark.slow
@pytest.mark.parametrize('name', LEARNING_RATES)
def test_an_optimizer_of_optax_learns_and_continues_to_the_same_bits(name, tmp_path, texts):
    settings = {'optim.name': name, 'optim.learning_rate': LEARNING_RATES[name]}
    config = tiny(texts, **settings, **{'optim.schedule': 'constant', 'train.log_every': 1})
    train.train(config, str(tmp_path / 'whole'))
    train_in_two_parts(config, tmp_path / 'cut')
    assert_same_bits(tmp_path / 'cut', tmp_path / 'whole')
    for seed in config.seeds:
        losses = [
            r['nats_per_token']
            for r in records(tmp_path / 'whole')
            if r['split'] == 'train' and r['seed'] == seed
        ]
        assert losses[0] == pytest.approx(np.log(256), rel=0.02) and losses[-1] < 4.8


@pytest.mark.slow
@pytest.mark.parametrize('settings', [*({'name': name} for name in LEARNING_RATES), {'ema': 0.5}])
def test_the_state_of_an_optimizer_is_divided_by_fsdp(settings, texts):
    """Two devices that share the parameters learn what one does, and divide its large arrays."""
    changes = {'name': 'adam', 'learning_rate': 0.01, **settings}
    arguments = 'lstm', texts, json.dumps(changes), 'one', 'split'
    printed = printed_on_devices(4, 'tests.lm.devices', *arguments)
    one, split = printed['one'], printed['split']
    assert one['share'] == 1 and split['share'] < 0.8  # small arrays are on both devices
    assert split['split'] > 0
    np.testing.assert_allclose(split['nats'], one['nats'], rtol=2e-3)
    assert not np.allclose(one['nats'][0], one['nats'][-1], rtol=1e-2)


@pytest.mark.slow
def test_a_schedule_free_optimizer_is_evaluated_at_x(tmp_path, texts):
    """The records and --mode=eval are of x = (y − (1 − b₁) z) / b₁, and not of the trained y."""
    settings = {'optim.name': 'optax.contrib:schedule_free_adamw', 'optim.options': {'b1': 0.8}}
    config = tiny(texts, **settings, **{'optim.learning_rate': 0.03})
    train.train(config, str(tmp_path))
    assess.assess(config, str(tmp_path))
    assessed = json.loads((tmp_path / 'evaluation.json').read_text())['valid']
    final = {str(r['seed']): r for r in records(tmp_path) if r['split'] == 'valid_whole'}
    for seed in ('3', '4'):
        assert assessed[seed]['nats_per_token'] == final[seed]['nats_per_token']

    trained = restore(config, str(tmp_path))
    shapes = factory.build_trainer(config, *trained.corpus.sizes).shapes(
        np.array(config.seeds, np.int32), trained.mesh
    )
    state, _ = checkpoint.Checkpoints(tmp_path / 'checkpoints').restore(shapes)
    z, b1 = state.opt_state[1].z, np.float32(0.8)
    for x, y, z_leaf in zip(*map(jax.tree.leaves, (trained.params, state.params, z)), strict=True):
        expected = (np.asarray(y) - (1 - b1) * np.asarray(z_leaf)) / b1
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(x, y, rtol=1e-3, atol=1e-5)


def test_parameters_to_evaluate_are_found_in_a_chain():
    params = {'w': np.full((2, 3), 5.0, np.float32)}
    chain = optax.chain(optax.clip(1.0), contrib.schedule_free_sgd(0.1, b1=0.5))
    state = chain.init(params)
    state = (state[0], state[1]._replace(z={'w': np.full((2, 3), 9.0, np.float32)}))
    assert averaging.has_eval_params(state)
    np.testing.assert_allclose(averaging.get_eval_params(state, params)['w'], 1.0)  # y = (z + x)/2

    adam = optax.adam(0.1).init(params)
    assert not averaging.has_eval_params(adam)
    assert averaging.get_eval_params(adam, params) is params


def test_an_affine_function_of_all_copies_is_that_of_x():
    rng = np.random.default_rng(0)
    params = {'w': rng.normal(size=(2, 3)).astype(np.float32)}
    state = contrib.schedule_free_sgd(0.1, b1=0.7).init(params)
    state = state._replace(z={'w': rng.normal(size=(2, 3)).astype(np.float32)})

    def move(params):
        return {'w': 3 * params['w'] - 2}

    moved = averaging.get_eval_params(averaging.map_copies(move, state), move(params))
    expected = move(averaging.get_eval_params(state, params))
    np.testing.assert_allclose(moved['w'], expected['w'], rtol=1e-5)
    adam = optax.adam(0.1).init(params)
    assert jax.tree.leaves(averaging.map_copies(move, adam)) == jax.tree.leaves(adam)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('optax.contrib:momo', 'update also needs value'),
        ('optax.contrib:sophia', r'only needs gradients and parameters \(obj_fn must be'),
        ('optax.contrib:dpsgd', 'expected values for l2_norm_clip and noise_multiplier and seed'),
        ('optax.contrib:schedule_free', 'expected values for base_optimizer'),
    ],
)
def test_an_optimizer_that_needs_more_is_refused(name, message):
    config = optim.get_config()
    config.name = name
    with pytest.raises(UserError, match=message):
        optim.validate(config, 100)


@pytest.mark.slow
def test_a_run_is_evaluated_at_the_average_of_its_parameters(tmp_path, texts):
    """That of all checkpoints by the recursion in NumPy; a continued run has the same bits."""
    settings = {'optim.ema': 0.8, 'optim.learning_rate': 0.01, 'train.save_every': 1}
    config = tiny(texts, **settings, **{'train.keep': 100})
    train.train(config, str(tmp_path / 'whole'))
    train_in_two_parts(config, tmp_path / 'cut')
    assert_same_bits(tmp_path / 'cut', tmp_path / 'whole')

    # The recursion over the parameters after each update.
    checkpoints = tmp_path / 'whole/checkpoints'
    e, prefix = {}, "['params']"
    for n in range(1, 21):
        arrays = restored(checkpoints / f'{n:08d}/state')
        for name in (name for name in arrays if name.startswith(prefix)):
            p = np.frombuffer(arrays[name], np.float32).astype(np.float64)
            e[name] = 0.8 * e.get(name, 0) + (1 - 0.8) * p
    ema = {name: array for name, array in arrays.items() if "['ema']" in name}
    assert len(ema) == len(e) > 5
    for name, value in e.items():
        saved = ema[name.replace(prefix, "['opt_state']['ema']")]
        expected = value / (1 - 0.8**20)
        np.testing.assert_allclose(np.frombuffer(saved, np.float32), expected, rtol=1e-4, atol=1e-6)

    # The final record and --mode=eval are of the average.
    trained = restore(config, str(tmp_path / 'whole'))
    leaves, _ = jax.tree.flatten_with_path(trained.params)
    for path, leaf in leaves:
        name = "['opt_state']['ema']" + jax.tree_util.keystr(path)
        assert np.asarray(leaf).tobytes() == ema[name]
    assess.assess(config, str(tmp_path / 'whole'))
    assessed = json.loads((tmp_path / 'whole/evaluation.json').read_text())['test']
    final = {str(r['seed']): r for r in records(tmp_path / 'whole') if r['split'] == 'test'}
    for seed in ('3', '4'):
        assert assessed[seed]['nats_per_token'] == final[seed]['nats_per_token']


@pytest.mark.slow
def test_training_does_not_depend_on_the_average(tmp_path, texts):
    """But for the rounding of another program; evaluations do."""
    for name, ema in (('without', 0.0), ('with', 0.9)):
        train.train(tiny(texts, **{'optim.ema': ema}), str(tmp_path / name))
    without, averaged = (records(tmp_path / name) for name in ('without', 'with'))
    splits = [record['split'] for record in without]
    assert splits == [record['split'] for record in averaged] and {'train', 'test'} < {*splits}
    for record, other in zip(without, averaged, strict=True):
        is_equal = record['nats_per_token'] == pytest.approx(other['nats_per_token'], rel=1e-5)
        assert is_equal is (record['split'] == 'train'), record
