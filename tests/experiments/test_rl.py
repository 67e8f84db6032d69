"""Agents with many tasks: the arms of the sweeps, learned embeddings, and tuning."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from configs import rl as configs
from experiments import rl_multitask, rl_readout, rl_tuning
from launch import sweep as sweeps
from mi import counting
from mi.config import UserError, flatten
from mi.rl import config as rl_config
from mi.rl import envs, factory, restore, train
from mi.training import logger
from tests import prng
from tests.conftest import ROOT

TINY = {
    'seeds': (0, 1),
    'model.features': 16,
    'model.hidden': 16,
    'model.context': 4,
    'train.steps': 40 * 10,
    'train.batch': 8,
    'train.length': 5,
    'train.log_every': 5,
    'train.eval_every': 10,
    'train.save_every': 10,
    'eval.episodes': 1,
}


def load(name, workdir):
    """The members of a sweep, with their configs, by label."""
    file = str(ROOT / f'experiments/{name}.py')
    members = sweeps.load(file, workdir)
    return {member.label: sweeps.parse_config(member.command) for member in members}


def param_shapes(config):
    """path → shape of the parameters of the agent."""
    agent = factory.build_agent(config, envs.make(config.env.name).spec)
    shapes = jax.eval_shape(lambda: factory.init_params(agent, jax.random.key(0)))
    return {jax.tree_util.keystr(p): a.shape for p, a in jax.tree.leaves_with_path(shapes)}


def count(config):
    return sum(map(math.prod, param_shapes(config).values()))


@pytest.mark.parametrize('is_instructed', [False, True])
def test_arms_of_the_read_outs_differ_in_read_out_and_context_alone(is_instructed, tmp_path):
    arms = load('rl_readout_instruction' if is_instructed else 'rl_readout', tmp_path)
    others, heads = {}, {}
    for label, config in arms.items():
        rl_config.validate(config)
        shapes = param_shapes(config)
        names = ("['readout']", "['context']", "['task_embedding']")
        heads[label] = {path: shape for path, shape in shapes.items() if path.startswith(names)}
        others[label] = shapes.items() - heads[label].items()
    assert len({frozenset(shapes) for shapes in others.values()}) == 1
    assert any('instruction' in path for path, _ in others['single head']) == is_instructed
    H, outputs, tasks, m = 128, 7, 30, 32
    sizes = {label: sum(map(math.prod, shapes.values())) for label, shapes in heads.items()}
    assert sizes == {
        'MI, index': (tasks * H + tasks + H + 1) * outputs,
        'concat, index': (tasks + H + 1) * outputs,
        'single head': (H + 1) * outputs,
        'multi-head': tasks * (H + 1) * outputs,
        'MI, embedding': (m * H + m + H + 1) * outputs + tasks * m,
        'MI, learned context': (m * H + m + H + 1) * outputs + (H + 1) * m + (m + 1) * m,
    }


def test_the_large_concat_has_the_parameters_of_mi(tmp_path):
    arms = load('rl_multitask', tmp_path)

    def count_at_width(width):
        config = configs.get_config('fusion=concat').unlock()
        config.model.features = config.model.hidden = width
        return count(config)

    target = count(arms['mi'])
    assert counting.nearest_size(count_at_width, target, 128) == rl_multitask.LARGE
    assert count(arms['concat, large']) == pytest.approx(target, rel=0.03)
    assert count(arms['concat']) < 0.4 * target


def test_film_at_random_begins_with_a_policy_for_each_task(tmp_path):
    arms = load('rl_multitask', tmp_path)
    spec = envs.make('xland').spec

    def spread_over_tasks(config):
        """Standard deviation of the logits over tasks, everything else alike."""
        agent = factory.build_agent(config, spec)
        shapes = factory.make_input_shapes(spec, 1, 30)
        inputs = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), shapes)
        inputs.observation['task'] = np.arange(30, dtype=np.int32)[None]
        params = jax.jit(lambda: factory.init_params(agent, prng.key(0)))()
        _, outputs = jax.jit(agent.apply)({'params': params}, agent.initial_carry(30), inputs)
        return float(outputs.logits[0].std(0).max())

    assert spread_over_tasks(arms['film']) < 1e-6
    assert spread_over_tasks(arms['film, random']) > 1e-3


def test_principal_components_are_those_of_the_covariance():
    embeddings = np.random.default_rng(0).normal(size=(30, 8)) * np.arange(1, 9)
    points, shares = rl_readout.project(embeddings)
    variances, directions = np.linalg.eigh(np.cov(embeddings.T))
    expected = (embeddings - embeddings.mean(0)) @ directions[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-6)
    np.testing.assert_allclose(shares, variances[[-1, -2]] / variances.sum(), rtol=1e-6)


def test_explained_variance_is_that_between_groups():
    embeddings = np.array([[0.0, 0], [0, 2], [4, 0], [4, 2]])  # variance 4 along x, 1 along y
    assert rl_readout.explain_variance(embeddings, 'aabb') == pytest.approx(0.8)
    assert rl_readout.explain_variance(embeddings, 'abab') == pytest.approx(0.2)
    assert rl_readout.explain_variance(embeddings, 'abcd') == pytest.approx(1)
    # The mean over all groupings of five points in a pair and a triple.
    points = np.random.default_rng(1).normal(size=(5, 3))
    groupings = set(itertools.permutations('aabbb'))
    shares = [rl_readout.explain_variance(points, groups) for groups in groupings]
    assert np.mean(shares) == pytest.approx((2 - 1) / (5 - 1))


def write_toy(path, experiment, body):
    """A sweep file with an experiment's names, at the size of a toy."""
    file = path / f'{experiment}_toy.py'
    imports = f'from experiments.{experiment} import *\nfrom experiments import {experiment}\n'
    file.write_text(f'{imports}BASELINE, TINY = None, {TINY!r}\n{body}\n')
    return str(file)


def train_members(file, workdir):
    for member in sweeps.load(file, workdir):
        train.train(sweeps.parse_config(member.command), str(workdir / member.name))
    (workdir / 'report').mkdir()
    sweeps.report(file, workdir)


@pytest.mark.slow
def test_the_figure_of_a_trained_arm_has_its_embeddings(tmp_path, monkeypatch):
    body = 'def sweep():\n    return [arm | TINY for arm in rl_readout.sweep()[-2:]]'
    file = write_toy(tmp_path, 'rl_readout', body)
    drawn = []
    draw = rl_readout._draw_embeddings
    monkeypatch.setattr(
        rl_readout, '_draw_embeddings', lambda *args: (drawn.append(args), draw(*args))
    )
    train_members(file, tmp_path / 'runs')
    report = tmp_path / 'runs/report'
    assert {f.name for f in report.iterdir()} >= {'rl_readout.png', 'rl_readout.md'}

    # What was drawn are the parameters of the first seed, which training has moved.
    ((embeddings, names, title, _),) = drawn
    assert title == 'seed 0' and names[0] == envs.make('xland').spec.tasks[0]
    (member,) = (m for m in sweeps.load(file, tmp_path / 'runs') if m.label == 'MI, embedding')
    config = sweeps.parse_config(member.command)
    agent = factory.build_agent(config, envs.make('xland').spec)
    params, step = restore.restore_params(config, agent, tmp_path / 'runs' / member.name)
    assert step == 10 and params['task_embedding'].shape == (2, 30, 4)
    np.testing.assert_array_equal(embeddings, params['task_embedding'][0])
    assert (embeddings != restore.init_seed_params(config, agent, 0)['task_embedding']).any()

    # The table has the mean over both seeds.
    kinds = [name.split()[0] for name in names]
    shares = [rl_readout.explain_variance(np.float64(e), kinds) for e in params['task_embedding']]
    assert f'| kind | {np.mean(shares):.3f} [' in (report / 'rl_readout.md').read_text()


def write_tuning(workdir, success):
    """The sweep of the tuning, every member done; success: (arm, point) → that of both seeds.

    A member with None for a seed diverged, and failed as mi.training.logger fails.
    """
    members = sweeps.load(str(ROOT / 'experiments/rl_tuning.py'), workdir)
    names = {
        rl_tuning.name_member(arm, point): (arm, point)
        for arm, point in itertools.product(rl_multitask.ARMS, rl_tuning.POINTS)
    }
    assert len(members) == len(names) == 8 * 5
    for member in members:
        run = workdir / member.name
        run.mkdir()
        config = sweeps.parse_config(member.command)
        (run / 'config.json').write_text(config.to_json())
        by_seed = success(*names[member.label])
        status = {'state': 'done'}
        if None in by_seed:
            with pytest.raises(UserError) as error:
                logger.refuse_non_finite(config.seeds, 40, {'loss': np.array([np.nan, 1.0])})
            status, by_seed = {'state': 'failed', 'reason': f'UserError: {error.value}'}, ()
        (run / 'status.json').write_text(json.dumps(status))
        values = zip(config.seeds, by_seed, strict=by_seed != ())
        lines = [
            json.dumps({'step': 9, 'seed': seed, 'split': 'eval', 'success': value})
            for seed, value in values
        ]
        (run / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    (workdir / 'report').mkdir()
    sweeps.report(str(ROOT / 'experiments/rl_tuning.py'), workdir)
    return workdir / 'report/rl_tuning.json'


def test_every_arm_gets_the_best_of_the_same_points(tmp_path, monkeypatch):
    """Each arm is best elsewhere; one seed alone, or a diverged one, must not decide."""
    best = dict(zip(rl_multitask.ARMS, itertools.cycle(rl_tuning.POINTS[1:])))

    def success(arm, point):
        if point == rl_tuning.POINTS[0]:
            return (1.0, 0.0) if arm != 'mi' else (None, 1.0)  # null: not finite
        return (0.55, 0.57) if point == best[arm] else (0.54, 0.56)

    file = write_tuning(tmp_path, success)
    tuning = json.loads(file.read_text())
    assert tuning['seeds'] == [10, 11] and tuning['steps'] == [2_500_000]
    assert tuning['chosen']['film']['success'] == pytest.approx(0.56)
    table = (tmp_path / 'report/rl_tuning.md').read_text()
    assert table.count('←') == 8 + 1 and 'diverged' in table

    # The comparison has the chosen values and other seeds, and is otherwise the same.
    monkeypatch.setenv('MI_RL_TUNING', str(file))
    tuned = load('rl_multitask', tmp_path / 'tuned')
    monkeypatch.delenv('MI_RL_TUNING')
    usual = load('rl_multitask', tmp_path / 'usual')
    assert list(tuned) == list(usual) == list(rl_multitask.ARMS)
    for arm, config in tuned.items():
        changed = dict(flatten(config.to_dict()).items() - flatten(usual[arm].to_dict()).items())
        expected = {'optim.learning_rate': best[arm][0], 'loss.entropy_cost': best[arm][1]}
        assert changed.pop('seeds') == (5, 6, 7, 8, 9)
        assert changed.items() <= expected.items()
        assert (config.optim.learning_rate, config.loss.entropy_cost) == best[arm]
    assert not set(tuned['mi'].seeds) & {*rl_tuning.SEEDS, *usual['mi'].seeds}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda tuning: tuning['chosen'].pop('film'), 'none for film. Run the rest'),
        (lambda tuning: tuning['chosen']['mi'].pop('loss.entropy_cost'), 'none for mi. Run'),
        (lambda tuning: tuning['seeds'].append(7), r'seeds other than .* made on \[7\]'),
    ],
)
def test_an_incomplete_choice_is_refused(change, message, tmp_path, monkeypatch):
    values = {'optim.learning_rate': 1e-3, 'loss.entropy_cost': 0.01}
    tuning = {'seeds': [10, 11], 'chosen': {arm: dict(values) for arm in rl_multitask.ARMS}}
    change(tuning)
    file = tmp_path / 'rl_tuning.json'
    file.write_text(json.dumps(tuning))
    monkeypatch.setenv('MI_RL_TUNING', str(file))
    with pytest.raises(UserError, match=message):
        load('rl_multitask', tmp_path / 'runs')
    monkeypatch.setenv('MI_RL_TUNING', str(tmp_path / 'absent.json'))
    with pytest.raises(UserError, match=r'absent\.json: .* but found no file'):
        load('rl_multitask', tmp_path / 'runs')


def test_nothing_is_chosen_before_all_points_are_done():
    scores = dict.fromkeys(rl_tuning.POINTS, 0.5)
    assert rl_tuning.choose_point(scores) == rl_tuning.POINTS[0]
    assert rl_tuning.choose_point(dict.fromkeys(rl_tuning.POINTS, -math.inf)) is None
    scores.pop(rl_tuning.POINTS[3])
    assert rl_tuning.choose_point(scores) is None


@pytest.mark.slow
def test_a_toy_is_tuned_and_compared(tmp_path, monkeypatch):
    """Two arms, two points: one of them learns nothing, because its learning rate is 1e-9."""
    monkeypatch.setattr(
        rl_tuning, 'POINTS', [rl_tuning.Point(1e-9, 0.01), rl_tuning.Point(3e-3, 0.01)]
    )
    arms = {label: rl_multitask.ARMS[label] for label in ('concat', 'film, random')}
    for module in (rl_multitask, rl_tuning):
        monkeypatch.setattr(module, 'ARMS', arms)
    toy = TINY | {'env.name': 'catch', 'train.steps': 40 * 300, 'train.eval_every': 300}
    toy |= {'train.save_every': 300, 'eval.episodes': 64, 'seeds': rl_tuning.SEEDS}
    body = f'def sweep():\n    return [arm | {toy!r} for arm in rl_tuning.sweep()]'
    train_members(write_toy(tmp_path, 'rl_tuning', body), tmp_path / 'tuning')
    file = tmp_path / 'tuning/report/rl_tuning.json'
    chosen = json.loads(file.read_text())['chosen']
    assert {arm: values['optim.learning_rate'] for arm, values in chosen.items()} == {
        'concat': 3e-3, 'film, random': 3e-3,
    }  # fmt: skip

    monkeypatch.setattr(rl_multitask, 'TUNING', str(file))
    monkeypatch.setattr(rl_multitask, 'SEEDS', (5, 6))
    toy |= {'seeds': (5, 6)}
    body = f'def sweep():\n    return [arm | {toy!r} for arm in rl_multitask.sweep()]'
    compared = write_toy(tmp_path, 'rl_multitask', body)
    train_members(compared, tmp_path / 'compared')
    for member in sweeps.load(compared, tmp_path / 'compared'):
        recorded = json.loads((tmp_path / 'compared' / member.name / 'config.json').read_text())
        assert recorded['optim']['learning_rate'] == 3e-3 and recorded['seeds'] == [5, 6]
