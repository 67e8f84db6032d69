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
from mi.report.runs import Arm
from mi.training import sharding
from tests.fit.runs import edited, finals


def config(**changes):
    return edited(configs.get_config(), **changes)


def sets(rows):
    return {frozenset(np.flatnonzero(row).tolist()) for row in rows}


def connected(pairs, modules):
    """Whether pairs lead from any module to any other."""
    reached, found = {0}, True
    while found:
        found = {i for pair in pairs if pair & reached for i in pair} - reached
        reached |= found
    return reached == set(range(modules))


@pytest.mark.parametrize('modules', [6, 8])
def test_every_module_is_trained_and_the_tested_pairs_are_those_of_no_support(modules):
    singles = {frozenset([i]) for i in range(modules)}
    tested = set()
    seen = set()
    for support in composition.SUPPORTS:
        trained, unseen = map(sets, composition.make_module_sets(modules, support))
        assert singles <= trained
        pairs = trained - singles
        assert connected(pairs, modules) == (support == 'connected')
        assert len(pairs) == (0 if support == 'alone' else modules)
        tested.add(frozenset(unseen))
        seen |= pairs
    (tested,) = tested  # the same for all supports
    every = {frozenset(pair) for pair in itertools.combinations(range(modules), 2)}
    assert tested == every - seen
    assert {i for pair in tested for i in pair} == set(range(modules))


def test_the_teacher_is_its_equation_and_has_outputs_of_variance_1():
    problem = composition.make(config(**{'problem.inputs': 40, 'problem.hidden': 300}))
    teacher = problem.draw_world(jax.random.key(0))
    rng = np.random.default_rng(0)
    c = rng.normal(size=(3, 6))
    c /= np.linalg.norm(c, axis=-1, keepdims=True)
    x = rng.uniform(-np.sqrt(3), np.sqrt(3), (3, 2000, 40))
    modules, readout = (np.asarray(a, np.float64) for a in teacher)
    wanted = np.zeros((3, 2000, 4))
    for t in range(3):
        W = sum(c[t, i] * modules[i] for i in range(6))
        wanted[t] = np.maximum(x[t] @ W, 0) @ readout
    found = composition.compute_outputs(teacher, jnp.asarray(c), jnp.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert np.mean(wanted**2) == pytest.approx(1, rel=0.3)


def test_the_error_is_0_for_the_teacher_and_1_for_the_means_of_the_tasks():
    y = jax.random.normal(jax.random.key(0), (3, 50, 2)) + jnp.arange(3.0)[:, None, None]
    assert composition.compute_unexplained(y, y) == 0
    means = jnp.broadcast_to(y.mean(1, keepdims=True), y.shape)
    assert composition.compute_unexplained(y, means) == pytest.approx(1)
    assert composition.compute_unexplained(y, means + 1) == pytest.approx(2, rel=0.2)


def test_an_mi_of_the_teacher_s_modules_knows_every_combination():
    """The form of the teacher: W its modules, U, V and b zero, and the readout."""
    of = config(**{'model.width': 16, 'model.parameters': 0})
    problem = composition.make(of)
    teacher = problem.draw_world(jax.random.key(0))
    shapes = jax.eval_shape(problem.init_params, jax.random.key(1), teacher)
    params = jax.tree.map(lambda a: jnp.zeros(a.shape), shapes)
    params['network']['fusion_0']['W'] = teacher.modules / 6**0.5  # z = √6 c
    params['network']['affine_1']['kernel'] = teacher.readout
    metrics = jax.jit(problem.evaluate)(params, teacher, jax.random.key(2))
    assert metrics.keys() == {'seen', 'unseen'}
    assert all(split['error'] < 1e-8 for split in metrics.values())


def test_a_context_is_learnt_that_an_affine_map_has_hidden():
    hidden = jnp.array([2.0, -1.0, 0.5])
    x = jax.random.normal(jax.random.key(0), (30, 3))
    found = transfer.fit(lambda z: jnp.mean(jnp.square(x @ z - x @ hidden)), jnp.zeros(3), 400, 0.1)
    np.testing.assert_allclose(found, hidden, atol=1e-3)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Students of one small teacher, by fusion and support."""
    path = tmp_path_factory.mktemp('composition')
    toy = {
        'problem.inputs': 4, 'problem.hidden': 4, 'problem.outputs': 3, 'seeds': (0, 1),
        'model.parameters': 400, 'train.steps': 1000, 'train.log_every': 1000,
        'train.eval_every': 1000, 'train.save_every': 1000, 'train.batch': 16,
        'optim.learning_rate': 3e-2,
    }  # fmt: skip
    for name in ('mi', 'concat'):
        train.train(config(**toy, **{'model.fusion.name': name}), str(path / name))
    return path


@pytest.mark.slow
def test_an_mi_knows_combinations_that_it_has_not_seen_and_concatenation_does_not(trained):
    ours, theirs = (finals(trained / name, 'error', 'unseen') for name in ('mi', 'concat'))
    for seed in (0, 1):
        assert ours[seed] < 0.1
        assert theirs[seed] > 3 * ours[seed]
    counted = [json.loads((trained / n / 'cost.json').read_text()) for n in ('mi', 'concat')]
    ours, theirs = (of['parameters']['model'] for of in counted)
    assert ours == pytest.approx(theirs, rel=0.1)


def test_a_context_that_is_learnt_makes_another_task_of_what_was_trained():
    """Steps of gradient on the context of a pair bring its error down; none leave it at 1 or so."""
    toy = {'problem.context': 'learned', 'problem.coefficients': 'equal', 'problem.examples': 64,
           'model.width': 12, 'model.parameters': 0, 'transfer.examples': 64}  # fmt: skip

    def error(steps):
        problem = composition.make(config(**toy, **{'transfer.steps': steps}))
        teacher = problem.draw_world(jax.random.key(0))
        params = problem.init_params(jax.random.key(1), teacher)
        return problem.evaluate(params, teacher, jax.random.key(2))['unseen']['error']

    before, after = (sharding.jit_once(lambda steps=steps: error(steps)) for steps in (1, 100))
    assert after < 0.9 * before


def test_the_report_draws_and_tabulates_what_is_there(tmp_path):
    def arm(overrides, value):
        both = [
            {'step': 1, 'seed': s, 'split': split, 'error': value * (1 + s % 10) / 5}
            for s in range(20) for split in ('seen', 'unseen')
        ]  # fmt: skip
        cost = {'parameters': {'model': 4000}}
        return Arm('label', 'done', None, tuple(range(20)), overrides, cost=cost, metrics=both)

    members = [m for m in experiment.sweep() if m['seeds'] == experiment.SEEDS[0]]
    found = {experiment._make_key(a): a for a in (arm(m, 0.1 + i) for i, m in enumerate(members))}
    assert len(found) == len(members) == len(chain(experiment.sweep())) / 2
    text = experiment._tabulate_errors(found, 'given', tuple(map(tuple, experiment.SEEDS)))
    assert text.count('\n| ') == 2 + len(experiment.STUDENTS)
    assert 'connected 1.00, disconnected 1.00, alone 1.00' in text


def test_every_student_of_the_sweep_is_one_network_of_the_size_asked_for_whatever_the_support():
    sizes = {}
    for overrides in experiment.sweep():
        given = overrides['problem.context'] == 'given'  # no parameters but the network's
        if overrides['seeds'] != experiment.SEEDS[0] or (
            given and overrides['problem.support'] != 'connected'
        ):
            continue
        problem = factory.make_problem(config(**overrides))
        counted = problem.costs()['parameters']['model']
        assert counted == factory.count_parameters(problem)
        assert counted == pytest.approx(overrides['model.parameters'], rel=0.07)
        of = [v for k, v in overrides.items() if k not in ('problem.support', 'seeds')]
        sizes.setdefault(tuple(of), set()).add(counted)
    assert len(sizes) == len(experiment.STUDENTS) + len(experiment.LEARNED)
    assert all(len(found) == 1 for found in sizes.values())


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
