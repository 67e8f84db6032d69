"""Modular teachers: what is held out, what errors mean, and who finds the modules."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.composition import config as configs
from experiments.composition import problem as composition
from experiments.composition import sweep as experiment
from launch.sweep import chain
from mi.config import UserError
from mi.fit import factory, train, transfer
from mi.report.arms import Arm
from mi.training import sharding
from tests import prng
from tests.fit.runs import edited, finals


def config(**changes):
    return edited(configs.get_config(), **changes)


def decode_sets(rows):
    return {frozenset(np.flatnonzero(row).tolist()) for row in rows}


def is_connected(pairs, modules):
    """Whether pairs lead from any module to any other."""
    reached, neighbours = {0}, True
    while neighbours:
        neighbours = {module for pair in pairs if pair & reached for module in pair} - reached
        reached |= neighbours
    return reached == set(range(modules))


@pytest.mark.parametrize('modules', [6, 8])
def test_every_module_is_trained_and_no_support_contains_a_tested_pair(modules):
    singletons = {frozenset([module]) for module in range(modules)}
    tested_pairs = set()
    seen_pairs = set()
    for support in composition.SUPPORTS:
        trained, unseen_pairs = map(decode_sets, composition.make_module_sets(modules, support))
        assert singletons <= trained
        pairs = trained - singletons
        assert is_connected(pairs, modules) == (support == 'connected')
        assert len(pairs) == (0 if support == 'alone' else modules)
        tested_pairs.add(frozenset(unseen_pairs))
        seen_pairs |= pairs
    (tested_pairs,) = tested_pairs  # the same for all supports
    all_pairs = {frozenset(pair) for pair in itertools.combinations(range(modules), 2)}
    assert tested_pairs == all_pairs - seen_pairs
    assert {module for pair in tested_pairs for module in pair} == set(range(modules))


def test_the_teacher_is_its_equation_and_has_outputs_of_variance_1():
    problem = composition.make(config(**{'problem.inputs': 40, 'problem.hidden': 300}))
    teacher = problem.draw_world(prng.key(0))
    rng = np.random.default_rng(0)
    c = rng.normal(size=(3, 6))
    c /= np.linalg.norm(c, axis=-1, keepdims=True)
    x = rng.uniform(-np.sqrt(3), np.sqrt(3), (3, 2000, 40))
    modules, readout = (np.asarray(array, np.float64) for array in teacher)
    expected = np.zeros((3, 2000, 4))
    for task in range(3):
        W = sum(c[task, module] * modules[module] for module in range(6))
        expected[task] = np.maximum(x[task] @ W, 0) @ readout
    outputs = composition.compute_outputs(teacher, jnp.asarray(c), jnp.asarray(x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-3)
    assert np.mean(expected**2) == pytest.approx(1, rel=0.3)


def test_the_error_is_0_for_the_teacher_and_1_for_the_means_of_the_tasks():
    y = jax.random.normal(prng.key(0), (3, 50, 2)) + jnp.arange(3.0)[:, None, None]
    assert composition.compute_unexplained(y, y) == 0
    means = jnp.broadcast_to(y.mean(1, keepdims=True), y.shape)
    assert composition.compute_unexplained(y, means) == pytest.approx(1)
    assert composition.compute_unexplained(y, means + 1) == pytest.approx(2, rel=0.2)


def test_an_mi_with_the_modules_of_the_teacher_solves_every_combination():
    """The form of the teacher: W its modules, U, V and b zero, and the readout."""
    cfg = config(**{'model.width': 16, 'model.parameters': 0})
    problem = composition.make(cfg)
    teacher = problem.draw_world(prng.key(0))
    shapes = jax.eval_shape(problem.init_params, jax.random.key(1), teacher)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params['network']['fusion_0']['W'] = teacher.modules / 6**0.5  # z = √6 c
    params['network']['affine_1']['kernel'] = teacher.readout
    metrics = jax.jit(problem.evaluate)(params, teacher, prng.key(2))
    assert metrics.keys() == {'seen', 'unseen'}
    assert all(split['error'] < 1e-8 for split in metrics.values())


def test_transfer_recovers_the_hidden_context_of_an_affine_map():
    hidden = jnp.array([2.0, -1.0, 0.5])
    x = jax.random.normal(prng.key(0), (30, 3))

    def loss(z):
        return jnp.mean(jnp.square(x @ z - x @ hidden))

    context = transfer.fit(loss, jnp.zeros(3), 400, 0.1)
    np.testing.assert_allclose(context, hidden, atol=1e-3)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Students of one small teacher, by fusion and support."""
    path = tmp_path_factory.mktemp('composition')
    settings = {
        'problem.inputs': 4, 'problem.hidden': 4, 'problem.outputs': 3, 'seeds': (0, 1),
        'model.parameters': 400, 'train.steps': 1000, 'train.log_every': 1000,
        'train.eval_every': 1000, 'train.save_every': 1000, 'train.batch': 16,
        'optim.learning_rate': 3e-2,
    }  # fmt: skip
    for fusion_name in ('mi', 'concat'):
        overrides = settings | {'model.fusion.name': fusion_name}
        train.train(config(**overrides), str(path / fusion_name))
    return path


@pytest.mark.slow
def test_an_mi_generalizes_to_unseen_combinations_and_concat_does_not(trained):
    mi_errors, concat_errors = (
        finals(trained / name, 'error', 'unseen') for name in ('mi', 'concat')
    )
    for seed in (0, 1):
        assert mi_errors[seed] < 0.1
        assert concat_errors[seed] > 3 * mi_errors[seed]
    costs = [json.loads((trained / name / 'cost.json').read_text()) for name in ('mi', 'concat')]
    mi_size, concat_size = (cost['parameters']['model'] for cost in costs)
    assert mi_size == pytest.approx(concat_size, rel=0.1)


def test_learning_contexts_lowers_the_error_on_unseen_pairs():
    """Steps of gradient on the context of a pair bring its error down; none leave it at 1 or so."""
    settings = {
        'problem.context': 'learned', 'problem.coefficients': 'equal', 'problem.examples': 64,
        'model.width': 12, 'model.parameters': 0, 'transfer.examples': 64,
    }  # fmt: skip

    def evaluate_after(steps):
        problem = composition.make(config(**settings, **{'transfer.steps': steps}))
        teacher = problem.draw_world(prng.key(0))
        params = problem.init_params(prng.key(1), teacher)
        return problem.evaluate(params, teacher, prng.key(2))['unseen']['error']

    initial_error, final_error = (
        sharding.jit_once(lambda steps=steps: evaluate_after(steps)) for steps in (1, 100)
    )
    assert final_error < 0.9 * initial_error


def test_the_report_tabulates_every_student_and_the_agreement_of_two_draws(tmp_path):
    def make_arm(overrides, value):
        metrics = [
            {'step': 1, 'seed': seed, 'split': split, 'error': value * (1 + seed % 10) / 5}
            for seed in range(20) for split in ('seen', 'unseen')
        ]  # fmt: skip
        cost = {'parameters': {'model': 4000}}
        return Arm('label', 'done', None, tuple(range(20)), overrides, cost=cost, metrics=metrics)

    members = [member for member in experiment.sweep() if member['seeds'] == experiment.SEEDS[0]]
    all_arms = [make_arm(member, 0.1 + index) for index, member in enumerate(members)]
    arms = {experiment._make_key(arm): arm for arm in all_arms}
    assert len(arms) == len(members) == len(chain(experiment.sweep())) / 2
    table = experiment._tabulate_errors(arms, 'given', tuple(map(tuple, experiment.SEEDS)))
    assert table.count('\n| ') == 2 + len(experiment.STUDENTS)
    assert 'connected 1.00, disconnected 1.00, alone 1.00' in table


@pytest.mark.slow
def test_every_student_has_the_requested_size_for_every_support():
    sizes = {}
    for overrides in experiment.sweep():
        is_given = overrides['problem.context'] == 'given'  # no parameters but the network's
        if overrides['seeds'] != experiment.SEEDS[0] or (
            is_given and overrides['problem.support'] != 'connected'
        ):
            continue
        problem = factory.make_problem(config(**overrides))
        num_params = factory.count_parameters(problem)
        if overrides['problem.support'] == 'connected':
            assert num_params == problem.costs()['parameters']['model']
        assert num_params == pytest.approx(overrides['model.parameters'], rel=0.07)
        student = [v for k, v in overrides.items() if k not in ('problem.support', 'seeds')]
        sizes.setdefault(tuple(student), set()).add(num_params)
    assert len(sizes) == len(experiment.STUDENTS) + len(experiment.LEARNED)
    assert all(len(counts) == 1 for counts in sizes.values())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'problem.modules': 7}, r'problem\.modules = 7: expected an even number'),
        ({'problem.modules': 4}, r'problem\.modules = 4: expected an integer of at least 6'),
        ({'problem.context': 'learned'}, r"problem\.coefficients = 'drawn': expected 'equal'"),
        (
            {'model.fusion.name': 'multi_head'},
            r"'multi_head': expected a fusion for dense contexts",
        ),
        ({'problem.support': 'ring'}, r"problem\.support = 'ring': .*connected"),
    ],
)
def test_bad_values_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(config(**changes), str(tmp_path / 'run'))
