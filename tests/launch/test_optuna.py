"""A search by Optuna: its trials are the same whether its launcher is killed or not."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from launch import optuna as search_launcher
from launch import sweep_file
from launch.optuna import Search
from launch.search_space import choice, integer, log_uniform, uniform
from mi.config import UserError
from tests.conftest import ROOT

optuna = pytest.importorskip('optuna', reason='the extra optuna is not installed')

SPACE = {
    'optim.learning_rate': log_uniform(1e-4, 1.0),
    'model.width': integer(2, 64, log=True),
    'seeds': choice((0,), (1, 2)),
    'train.steps': 40,
}
SWEEP = """
from launch.sweep import choice, integer, log_uniform
CONFIG = 'experiments/expressivity/config.py:fit'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a search', 'mse', 'eval', None, []
SPACE = {{
    'optim.learning_rate': log_uniform(1e-4, 1e-1),
    'model.width': integer(2, 16, log=True),
    'model.parameters': 0,
    'seeds': (0, 1),
    **dict.fromkeys(('train.log_every', 'train.eval_every', 'train.save_every'), {every}),
    'train.steps': {steps},
}}
COUNT = {count}
"""


def make_search(workdir, count=14, seed=0, lower_is_better=True, sampler='TPESampler'):
    description = {'metric': 'loss', 'split': 'eval', 'lower_is_better': lower_is_better}
    description |= {'name': 'a search', 'config': 'configs/lm.py:tiny'}
    workdir.mkdir(exist_ok=True)
    return Search(workdir, description, SPACE, seed, count, sampler)


def read_members(workdir):
    return json.loads((workdir / 'sweep.json').read_text())['members']


def finish_run(workdir, name, losses=None):
    """Write the run directory of a trial that is done, whose loss is (log₁₀ rate + 2)² + width."""
    (overrides,) = (m['overrides'] for m in read_members(workdir) if m['name'] == name)
    loss = (math.log10(overrides['optim.learning_rate']) + 2) ** 2 + overrides['model.width']
    (workdir / name).mkdir()
    with open(workdir / name / 'metrics.jsonl', 'w') as file:
        for seed, value in enumerate(losses or [loss - 1, loss + 1]):
            for step, number in ((10, 99.0), (20, value)):
                row = {'step': step, 'seed': seed, 'split': 'eval', 'loss': number}
                file.write(json.dumps(row) + '\n')
    (workdir / name / 'status.json').write_text('{"state": "done"}')


def test_the_objective_is_of_all_seeds(tmp_path):
    """A seed whose metric was never defined makes it NaN; an earlier value of the seed counts."""

    def write(*rows):
        text = ''.join(json.dumps({'step': 1, 'split': 'eval', **row}) + '\n' for row in rows)
        (tmp_path / 'metrics.jsonl').write_text(text)
        return search_launcher.read_objective(tmp_path, 'loss', 'eval')

    assert write({'seed': 0, 'loss': 1.0}, {'seed': 1, 'loss': 3.0}) == 2.0
    assert write({'seed': 0, 'loss': 1.0}, {'seed': 1, 'loss': 3.0}, {'seed': 1}) == 2.0
    assert math.isnan(write({'seed': 0, 'loss': 1.0}, {'seed': 1}))
    assert math.isnan(write({'seed': 0, 'loss': 1.0}, {'seed': 1, 'loss': None}))


def run_trials(search, workdir, names=None):
    for name in names or search.names():
        search.prepare(name)
        finish_run(workdir, name)
        search.handle_exit(name, 'done', False)


def read_study(workdir):
    return search_launcher.open_study(workdir, True).get_trials()


def test_a_search_that_is_killed_after_every_trial_has_the_same_trials(tmp_path):
    """The last four of fourteen are drawn by what the first ten found."""
    run_trials(make_search(tmp_path / 'whole'), tmp_path / 'whole')
    for index in range(14):
        search = make_search(tmp_path / 'killed')
        run_trials(search, tmp_path / 'killed', search.names()[index : index + 1])
    members = read_members(tmp_path / 'whole')
    assert read_members(tmp_path / 'killed') == members
    assert [member['name'] for member in members] == [f'trial={i:04d}' for i in range(14)]
    assert len({member['label'] for member in members}) == 14

    # Values are in the space, constants are in every member, and another seed has other trials.
    for member in members:
        overrides = member['overrides']
        assert 1e-4 <= overrides['optim.learning_rate'] <= 1 and overrides['train.steps'] == 40
        assert overrides['model.width'] in range(2, 65) and overrides['seeds'] in ([0], [1, 2])
    other = make_search(tmp_path / 'other', seed=1)
    run_trials(other, tmp_path / 'other', other.names()[:3])
    all_members = [*members, *read_members(tmp_path / 'other')]
    assert len({member['overrides']['optim.learning_rate'] for member in all_members}) == 17


def test_the_value_of_a_trial_is_its_last_one_averaged_over_seeds(tmp_path):
    search = make_search(tmp_path)
    run_trials(search, tmp_path, search.names()[:3])
    told = [trial.value for trial in read_study(tmp_path)]
    expected = []
    for member in read_members(tmp_path):
        rate, width = (member['overrides'][key] for key in ('optim.learning_rate', 'model.width'))
        expected.append((math.log10(rate) + 2) ** 2 + width)
    assert told == pytest.approx(expected)
    best = min(range(3), key=expected.__getitem__)
    assert f'3 trials, the best is trial={best:04d}' in search.summary()
    assert f'loss {expected[best]:.6g}' in search.summary()


def test_the_best_trial_is_the_greatest_if_that_is_the_direction(tmp_path):
    search = make_search(tmp_path, lower_is_better=False)
    run_trials(search, tmp_path, search.names()[:3])
    study = search_launcher.open_study(tmp_path, False)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    values = [trial.value for trial in study.get_trials()]
    assert f'the best is trial={max(range(3), key=values.__getitem__):04d}' in search.summary()


def test_a_launcher_that_is_killed_in_between_loses_nothing(tmp_path):
    """After a trial was asked and before it had a name; and before a result was told."""
    search = make_search(tmp_path)
    search.prepare('trial=0000')
    finish_run(tmp_path, 'trial=0000')
    search._study.ask()  # its values were not drawn yet
    again = make_search(tmp_path)
    states = [trial.state.name for trial in read_study(tmp_path)]
    assert states == ['RUNNING', 'FAIL'] and not (tmp_path / 'trial=0001').exists()
    again.prepare('trial=0001')
    assert [trial.state.name for trial in read_study(tmp_path)] == ['COMPLETE', 'FAIL', 'RUNNING']
    asked = read_members(tmp_path)
    make_search(tmp_path).prepare('trial=0001')  # it was asked, and keeps its values
    assert read_members(tmp_path) == asked and len(read_study(tmp_path)) == 3


@pytest.mark.parametrize('losses', [[1.0, None], [None, None]])
def test_a_trial_that_diverged_has_no_result(tmp_path, losses):
    """Although one of its seeds, or an earlier record, has a value."""
    search = make_search(tmp_path)
    search.prepare('trial=0000')
    finish_run(tmp_path, 'trial=0000', losses)
    search.handle_exit('trial=0000', 'done', False)
    assert [trial.state.name for trial in read_study(tmp_path)] == ['FAIL']
    assert search.summary() == 'optuna: no trial has a result'


def test_a_trial_that_failed_or_was_preempted_stays_open(tmp_path):
    search = make_search(tmp_path)
    search.prepare('trial=0000')
    command = search.command('trial=0000')
    assert (
        f'--workdir={tmp_path / "trial=0000"}' in command and '--config.train.steps=40' in command
    )
    (tmp_path / 'trial=0000').mkdir()
    for phase in ('failed', 'preempted'):
        (tmp_path / 'trial=0000/status.json').write_text(json.dumps({'state': phase}))
        search.handle_exit('trial=0000', phase, False)
        assert [trial.state.name for trial in read_study(tmp_path)] == ['RUNNING']
    again = make_search(tmp_path)
    again.prepare('trial=0000')
    assert again.command('trial=0000') == command


def test_distributions_are_those_of_the_space():
    space = {'a': uniform(0, 2), 'b': log_uniform(1, 8), 'c': integer(1, 9), 'd': choice(1, 'x')}
    found = search_launcher.make_distributions({**space, 'e': 3})
    distributions = optuna.distributions
    assert found == {
        'a': distributions.FloatDistribution(0.0, 2.0),
        'b': distributions.FloatDistribution(1.0, 8.0, log=True),
        'c': distributions.IntDistribution(1, 9),
        'd': distributions.CategoricalDistribution(['1', "'x'"]),
    }
    params = {'a': 1.23456789, 'b': 7.9999999999, 'c': 4, 'd': "'x'"}
    overrides = search_launcher.make_overrides({**space, 'e': 3}, params)
    assert overrides == {'a': 1.23457, 'b': 8.0, 'c': 4, 'd': 'x', 'e': 3}


class Fixed(optuna.samplers.RandomSampler):
    """A sampler of this file, named 'tests.launch.test_optuna:Fixed'."""

    def sample_independent(self, study, trial, name, distribution):
        return getattr(distribution, 'low', '(0,)')


@pytest.mark.parametrize(
    ('sampler', 'message'),
    [
        ('TPESampeler', "did you mean 'TPESampler'"),
        ('no_such.module:Sampler', 'expected an importable module'),
        ('optuna.samplers:GridSampler', 'expected a class that needs only a seed'),
    ],
)
def test_a_sampler_that_cannot_be_built_is_refused(sampler, message):
    with pytest.raises(UserError, match=message):
        search_launcher.make_sampler(sampler, 0)


def test_a_sampler_of_one_s_own_draws_the_trials(tmp_path):
    search = make_search(tmp_path, sampler=f'{__name__}:Fixed')
    run_trials(search, tmp_path, search.names()[:2])
    assert [m['overrides']['model.width'] for m in read_members(tmp_path)] == [2, 2]


def write_search(folder, count=4, steps=40, every=20, more=''):
    file = folder / 'a_search.py'
    file.write_text(SWEEP.format(count=count, steps=steps, every=every) + more)
    return str(file)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ('def sweep():\n    return []', r'expected SPACE and COUNT without sweep\(\)'),
        ("BASELINE = 'concat'", 'BASELINE = .concat.: expected None'),
        ("METRIC = 'mes'", "did you mean 'mse'"),
        ("SPACE['model.widht'] = 3", 'did you mean config.model.width'),
    ],
)
def test_a_file_that_is_no_search_is_refused(tmp_path, more, message):
    file = write_search(tmp_path, more=more)
    with pytest.raises(UserError, match=message):
        search_launcher.describe_search(file, tmp_path, sweep_file.load_module(file))


def test_another_search_in_the_same_directory_is_refused_and_a_longer_one_is_not(tmp_path):
    def describe(**changes):
        file = write_search(tmp_path, **changes)
        return search_launcher.describe_search(file, tmp_path, sweep_file.load_module(file))

    (tmp_path / 'sweep.json').write_text(json.dumps({**describe(), 'members': []}))
    assert describe(count=9)['space']['train.steps'] == '40'
    with pytest.raises(UserError, match='holds a different sweep or search: its space differs'):
        describe(more="SPACE['model.width'] = integer(2, 32)")


def start_search(file, workdir):
    command = [sys.executable, '-m', 'launch.optuna', f'--sweep={file}', f'--workdir={workdir}']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    with open(workdir.with_suffix('.log'), 'a') as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_a_search_whose_launcher_was_killed_continues(tmp_path):
    """With kill -9, during its second trial; its trials are those of a search that was not."""
    file = write_search(tmp_path, count=3)
    assert start_search(file, tmp_path / 'whole').wait(600) == 0
    killed = start_search(file, tmp_path / 'killed')
    deadline = time.monotonic() + 300
    while not (tmp_path / 'killed/trial=0001/status.json').exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(read_members(tmp_path / 'killed')) == 2
    assert start_search(file, tmp_path / 'killed').wait(600) == 0
    for name in ('whole', 'killed'):
        trials = read_study(tmp_path / name)
        assert [trial.state.name for trial in trials] == ['COMPLETE'] * 3
        assert (tmp_path / name / 'report/report.html').exists()
    whole, continued = (
        [(trial.params, trial.value) for trial in read_study(tmp_path / name)]
        for name in ('whole', 'killed')
    )
    assert continued == whole
