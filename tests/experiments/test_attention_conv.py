"""Heads that stand for a convolution, and networks of both that learn to read digits."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.attention_conv import config as attention_conv
from experiments.attention_conv import network as vision
from experiments.attention_conv import problem as digits
from mi.config import UserError
from mi.fit import factory, train
from tests import prng
from tests.fit.runs import edited, finals


def config(**changes):
    return edited(attention_conv.get_config(), **changes)


def noise(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_edge_convolution_matches_lax_on_an_edge_padded_image():
    for K in (3, 4):
        x, module = noise(0, 2, 6, 5, 3), vision.EdgeConvolution(K, 4)
        y, variables = jax.jit(module.init_with_output)(prng.key(K), x)
        sides = (K - 1) // 2, K // 2
        padded = jnp.pad(x, [(0, 0), sides, sides, (0, 0)], mode='edge')
        expected = jax.lax.conv_general_dilated(
            padded,
            variables['params']['V'],
            (1, 1),
            'VALID',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def construction():
    """What is measured of a network of convolutions with random weights, on images of noise."""
    model = config(**{'model.layer': 'convolution', 'model.width': 6, 'model.depth': 2}).model
    alphas = (2.0, 4.0, 5.0, 6.0, 30.0)
    images = noise(1, 8, 24, 24, 1)
    params = jax.jit(vision.make(model, digits.NUM_CLASSES).init)(prng.key(0), images)
    compare = jax.jit(functools.partial(digits.compare_construction, model=model, alphas=alphas))
    return alphas, compare(params, images=images, labels=jnp.zeros(8, int))


def test_error_of_heads_in_place_of_a_convolution_falls_as_exp_of_minus_alpha(construction):
    """A head has 1 − 4 e^−α of its weight on its pixel and e^−α on each of four neighbours, so that
    on noise the squared error is (16 + 4) e^−2α of the square, but for edges and e^−2α."""
    alphas, errors = construction
    for alpha_index, alpha in enumerate(alphas[1:4], 1):
        first_layer_error = errors['layer_error'][0, alpha_index, 0]
        assert first_layer_error == pytest.approx(math.sqrt(20) * math.exp(-alpha), rel=0.25)


def test_heads_with_a_large_alpha_equal_the_convolution_up_to_rounding(construction):
    _, errors = construction
    f32, bf16 = errors['layer_error'][:, -1]
    assert np.all(f32 < 1e-6) and errors['logit_error'][0, -1] < 1e-5
    assert np.all(bf16 < 2**-7) and np.all(bf16 > 2**-12)
    assert errors['accuracy'][0, -1] == errors['own_accuracy']
    assert np.all(np.diff(errors['layer_error'][0, :4, :], axis=0) < 0)


def test_a_grid_of_sharp_heads_is_a_convolution():
    changes = {'model.centres': 'grid', 'model.alpha': 50.0, 'model.depth': 1, 'model.width': 3}
    x = noise(2, 2, 8, 8, 1)
    attention = vision.make(config(**changes).model, 10)
    params = jax.jit(attention.init)(prng.key(0), x)
    convolution = vision.make(config(**changes | {'model.layer': 'convolution'}).model, 10)
    layer, out = params['params']['layer_0'], params['params']['out']
    kernel = {'V': layer['V'].reshape(3, 3, 1, 3), 'b': layer['b']}
    expected = convolution.apply({'params': {'layer_0': kernel, 'out': out}}, x)
    np.testing.assert_allclose(attention.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_each_seed_splits_the_digits_and_fixed_centers_have_no_gradient():
    images, labels = digits.load_images()
    assert images.shape == (digits.NUM_IMAGES, 8, 8, 1) and labels.shape == (digits.NUM_IMAGES,)
    assert abs(images.mean()) < 1e-5 and images.std() == pytest.approx(1, abs=1e-5)
    problem = factory.make_problem(config(**SMALL | {'model.centres': 'fixed'}))
    worlds = [problem.draw_world(prng.key(seed)) for seed in (0, 1)]
    orders = [np.asarray(world.image_ids) for world in worlds]
    assert all(sorted(order) == list(range(digits.NUM_IMAGES)) for order in orders)
    assert np.mean(orders[0] == orders[1]) < 0.01

    @jax.jit
    def compute_gradient(key):
        params = problem.init_params(key, worlds[0])
        return jax.grad(lambda p: problem.loss(p, worlds[0], key)[0])(params)

    layer = compute_gradient(prng.key(2))['params']['layer_0']
    assert not np.any(layer['Delta']) and not np.any(layer['alpha']) and np.any(layer['V'])


SMALL = {
    'model.depth': 1, 'model.heads': 4, 'model.width': 16, 'seeds': (0, 1), 'train.steps': 200,
    'train.log_every': 50, 'train.eval_every': 200, 'train.save_every': 200, 'train.batch': 16,
    'optim.warmup_steps': 5, 'optim.learning_rate': 2e-2, 'problem.train': 1600,
}  # fmt: skip


@pytest.mark.slow
def test_a_network_learns_digits_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    train.train(config(**SMALL), str(tmp_path / 'whole'))
    with monkeypatch.context() as patch:
        patch.setattr('mi.training.run_dir.Run.should_stop', lambda this, recorded: this.step == 50)
        with pytest.raises(SystemExit):
            train.train(config(**SMALL), str(tmp_path / 'stopped'))
    assert os.listdir(tmp_path / 'stopped/checkpoints') == ['00000050']
    train.train(config(**SMALL), str(tmp_path / 'stopped'))
    for file_name in ('metrics.jsonl', 'artefacts.npz'):
        whole, stopped = (
            (tmp_path / run_name / file_name).read_bytes() for run_name in ('whole', 'stopped')
        )
        assert whole == stopped
    accuracies = finals(tmp_path / 'whole', 'accuracy', 'eval')
    assert set(accuracies) == {0, 1} and min(accuracies.values()) > 0.3  # of ten classes
    artifacts = np.load(tmp_path / 'whole/artefacts.npz')
    assert artifacts['Delta'].shape == (2, 1, 4, 2) and np.all(artifacts['alpha_before'] == 1)
    moved_distance = np.linalg.norm(artifacts['Delta'] - artifacts['Delta_before'], axis=-1)
    assert np.all(moved_distance > 1e-3)
    assert np.any(artifacts['Delta_before'][0] != artifacts['Delta_before'][1])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'model.centres': 'grid', 'model.heads': 8},
            r'model\.heads = 8: expected a square number',
        ),
        ({'model.layer': 'convolutions'}, r"model\.layer.*did you mean 'convolution'"),
        ({'problem.alphas': (1.0, -1.0)}, r'problem\.alphas.*positive numbers'),
        ({'problem.train': 1797}, r'problem\.train = 1797: .*at most 1796'),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        factory.make_problem(config(**changes))
