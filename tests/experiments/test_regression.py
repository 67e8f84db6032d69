"""Many regression tasks: the context of a task, and its value for new tasks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.regression import config as configs
from experiments.regression import problem as regression
from experiments.regression import sweep as experiment
from mi.config import UserError
from mi.fit import factory, train
from mi.report.arms import Arm
from mi.training import sharding
from tests import prng
from tests.fit.runs import edited, finals


def config(**changes):
    return edited(configs.get_config(), **changes)


def draw_world(cfg, seed=0):
    return sharding.jit_once(lambda: regression.make(cfg).draw_world(prng.key(seed)))


def test_tasks_are_by_turns_affine_and_sinusoids_with_noise_on_their_examples():
    cfg = config(**{'problem.tasks': 40, 'problem.examples': 500})
    known, new = draw_world(cfg)
    for task in range(4):
        x = np.asarray(known.x[task], np.float64)
        shape = x if task % 2 == 0 else np.sin(10 * x)
        residual = np.asarray(known.y[task]) - (float(known.a[task]) * shape + float(known.b[task]))
        assert np.std(residual) == pytest.approx(0.1, rel=0.15)
        assert abs(np.mean(residual)) < 0.02
    assert np.abs(known.x).max() <= 1 and known.x.min() < -0.9 and known.x.max() > 0.9
    assert not np.isin(np.asarray(new.a), np.asarray(known.a)).any()
    assert new.x.shape == (32, 16)


def test_the_parameters_of_a_task_are_linear_in_its_descriptor_up_to_noise():
    """They are linear in it: least squares finds them, on new tasks too."""
    cfg = config(**{'problem.context': 'descriptor', 'problem.tasks': 200})
    known, new = draw_world(cfg)
    readout, *_ = np.linalg.lstsq(np.asarray(known.z), np.asarray(known.a), rcond=None)
    assert np.std(np.asarray(new.z) @ readout - np.asarray(new.a)) == pytest.approx(0.1, rel=0.3)


def test_an_inferred_context_takes_examples_as_a_set_and_only_those_with_weight():
    encoder = regression.Encoder(3, 8)
    x, y = jax.random.normal(prng.key(0), (2, 5))
    weights = jnp.array([0.5, 0.5, 0, 0, 0])
    params, encode = jax.jit(encoder.init)(prng.key(1), x, y, weights), jax.jit(encoder.apply)
    z = encode(params, x, y, weights)
    reversed_z = encode(params, x[::-1], y[::-1], weights[::-1])
    np.testing.assert_allclose(z, reversed_z, atol=1e-6)
    np.testing.assert_allclose(z, encode(params, x.at[3].set(9.0), y, weights), atol=1e-6)
    assert np.abs(z - encode(params, x.at[1].set(9.0), y, weights)).max() > 1e-3
    assert regression._weigh_first(jnp.array([[2], [4]]), 4).tolist() == [
        [0.5, 0.5, 0, 0],
        [0.25] * 4,
    ]


def test_errors_are_of_affine_tasks_and_of_sinusoids_each_by_its_name():
    """A network of zeros is exact for affine tasks that are zero, and for those alone."""
    cfg = config(**{'problem.tasks': 6, 'model.width': 4})
    problem = regression.make(cfg)
    world = draw_world(cfg)
    is_sinusoid = world.known.family == 1
    known = world.known._replace(a=3.0 * is_sinusoid, b=0.0 * is_sinusoid)
    shapes = jax.eval_shape(problem.init_params, jax.random.key(0), world)
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    evaluate = jax.jit(problem.evaluate)
    metrics = evaluate(params, world._replace(known=known), prng.key(1))['eval']
    grid = np.linspace(-1, 1, regression.POINTS)
    assert metrics['mse_affine'] == 0
    assert metrics['mse_sinusoid'] == pytest.approx(9 * np.mean(np.sin(10 * grid) ** 2), rel=1e-4)
    assert metrics['mse'] == pytest.approx(float(metrics['mse_sinusoid']) / 2)


TOY = {
    'train.steps': 800, 'train.log_every': 800, 'train.eval_every': 800, 'train.save_every': 800,
    'optim.learning_rate': 1e-2, 'transfer.steps': 200, 'transfer.shots': (4,), 'seeds': (0, 1),
    'problem.tasks': 32, 'transfer.tasks': 16, 'model.parameters': 1500, 'problem.encoder': 16,
    'problem.inferred': 4,
}  # fmt: skip


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Networks that know the tasks by number or by examples, and one without a context."""
    path = tmp_path_factory.mktemp('regression')
    for name, context in (('mi', 'one_hot'), ('none', 'one_hot'), ('mi', 'inferred')):
        overrides = {'model.fusion.name': name, 'problem.context': context}
        train.train(config(**TOY, **overrides), str(path / f'{name}_{context}'))
    return path


@pytest.mark.slow
def test_a_one_hot_context_halves_the_error(trained):
    one_hot_errors, none_errors = (
        finals(trained / f'{name}_one_hot', 'mse', 'eval') for name in ('mi', 'none')
    )
    for seed in (0, 1):
        assert one_hot_errors[seed] < none_errors[seed] / 2
        affine_error = finals(trained / 'mi_one_hot', 'mse_affine', 'eval')[seed]
        sinusoid_error = finals(trained / 'mi_one_hot', 'mse_sinusoid', 'eval')[seed]
        assert one_hot_errors[seed] == pytest.approx((affine_error + sinusoid_error) / 2, rel=1e-4)


@pytest.mark.slow
def test_transfer_beats_training_alone_on_four_examples(trained):
    alone_errors = finals(trained / 'none_one_hot', 'mse/4', 'new')
    for run in ('mi_one_hot', 'mi_inferred'):
        transfer_errors = finals(trained / run, 'mse/4', 'new')
        assert np.mean(list(transfer_errors.values())) < 0.8 * np.mean(list(alone_errors.values()))
    initial_errors, final_errors = (
        finals(trained / 'mi_one_hot', f'mse/{K}', 'new') for K in (0, 4)
    )
    for seed in (0, 1):
        assert final_errors[seed] < initial_errors[seed]


@pytest.mark.slow
def test_artifacts_hold_predictions_of_known_tasks(trained):
    arrays = np.load(trained / 'mi_one_hot/artefacts.npz')
    assert arrays['predictions'].shape == (2, regression.SHOWN, regression.POINTS)
    a, b, grid = (arrays[name] for name in ('a', 'b', 'grid'))
    np.testing.assert_allclose(
        arrays['targets'][:, 0], a[:, :1] * grid[:, 0] + b[:, :1], rtol=1e-5, atol=1e-6
    )
    error = np.mean((arrays['predictions'] - arrays['targets']) ** 2)
    assert error < 0.3


@pytest.mark.slow
def test_the_parameters_of_an_encoder_are_counted(trained):
    cost = json.loads((trained / 'mi_inferred/cost.json').read_text())
    problem = factory.make_problem(config(**TOY, **{'problem.context': 'inferred'}))
    assert cost['parameters']['model'] == factory.count_parameters(problem)
    assert cost['parameters']['model'] == pytest.approx(1500, rel=0.1)


def test_every_member_of_the_sweep_can_be_built():
    for overrides in experiment.sweep()[::31]:
        problem = factory.make_problem(config(**overrides))
        assert factory.count_parameters(problem) == pytest.approx(6000, rel=0.05)


def test_the_report_tabulates_known_and_new_tasks_and_the_agreement_of_two_draws():
    def make_arm(overrides, value):
        metrics = [
            {'step': 1, 'seed': seed, 'split': split}
            | dict.fromkeys(names, value * (1 + seed % 10))
            for seed in range(20)
            for split, names in (('eval', ['mse']), ('new', ['mse/2', 'mse/16']))
            if split == 'eval' or overrides['model.fusion.name'] != 'multi_head'
        ]
        return Arm('label', 'done', None, tuple(range(20)), overrides, metrics=metrics)

    members = [member for member in experiment.sweep() if member['seeds'] == experiment.SEEDS[0]]
    all_arms = [make_arm(member, 0.1 + index) for index, member in enumerate(members)]
    arms = {experiment._make_key(arm): arm for arm in all_arms}
    assert len(arms) == len(members)
    fusions = list(dict.fromkeys(fusion for fusion, _, _ in arms))
    contents = '\n\n'.join(experiment._tabulate_errors(arms, fusions, tuple(experiment.SEEDS)))
    assert contents.count('**Known tasks**') == contents.count('**New tasks**') == 3
    assert contents.count('| multi head |') == 1
    assert contents.count(': 1.00') == 3 * (len(experiment.EXAMPLES) + 2)
    assert experiment._read_new(arms, 'none', 'inferred')  # beside every context


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'model.fusion.name': 'multi_head', 'problem.context': 'inferred'},
            r"problem\.context = 'inferred': expected 'one_hot', because .* = 'multi_head'",
        ),
        ({'problem.context': 'number'}, r"problem\.context = 'number': .*one_hot"),
        ({'transfer.shots': (0,)}, r'transfer\.shots.*tuple of positive integers'),
        ({'problem.tasks': 1}, r'problem\.tasks = 1'),
        (
            {'model.parameters': 5, 'model.depth': 0},
            r'model\.parameters = 5: expected 0, or .* always has [0-9,]+ parameters',
        ),
        ({'model.parameters': 5}, r'model\.parameters = 5: the smallest size, 1, costs'),
    ],
)
def test_bad_values_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(
            config(
                **(
                    changes
                    | ({'problem.context': 'inferred'} if 'model.parameters' in changes else {})
                )
            ),
            str(tmp_path / 'run'),
        )
