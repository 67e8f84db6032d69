"""No launcher leaves members running when it ends by an error, whatever and wherever it is."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import engine, local, pbt, process, slurm, state, watch
from launch.members import Member
from launch.population import Population
from mi.config import UserError
from mi.training.lock import is_locked

MEMBER = str(pathlib.Path(__file__).with_name('member.py'))
TWO = engine.Resources(parallel=2)


class Broken(BaseException):
    """Not even an Exception."""


def counting(path):
    return [sys.executable, MEMBER, f'--workdir={path}', '--steps=40_000', '--seconds=0.05']


def have_begun(paths):
    return all((path / 'metrics.jsonl').exists() for path in paths)


def assert_saved(paths):
    for path in paths:
        assert not is_locked(path / 'lock') and not is_locked(path / 'launched')
        assert (
            state.read_member_state(path).phase == 'preempted'
            and state.read_member_state(path).step >= 1
        )


@pytest.mark.parametrize('error', [RuntimeError, OSError, UserError, SystemExit, Broken])
def test_members_save_and_end_when_a_rule_raises(tmp_path, error):
    paths = [tmp_path / 'a', tmp_path / 'b']

    def rule(members):
        if have_begun(members):
            raise error('a rule')

    with pytest.raises(error, match='a rule'):
        local.submit({path: counting(path) for path in paths}, TWO, rule)
    assert_saved(paths)


def test_members_end_when_the_next_one_cannot_be_started(tmp_path):
    paths = [tmp_path / 'a', tmp_path / 'b']

    class Late(dict):
        """Commands whose second is looked up when the first member has begun, and is invalid."""

        def __getitem__(self, path):
            deadline = time.monotonic() + 60
            while path == paths[1] and not have_begun(paths[:1]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return super().__getitem__(path)

    commands = Late({paths[0]: counting(paths[0]), paths[1]: ['/no/such/program']})
    with pytest.raises(FileNotFoundError):
        local.submit(commands, TWO)
    assert_saved(paths[:1])


def test_members_end_when_the_screen_does(tmp_path, monkeypatch):
    path = tmp_path / 'a'

    def show(self, states, is_last):
        if have_begun([path]):
            raise OSError('the screen is gone')

    monkeypatch.setattr(watch.Watch, '_show', show)
    monkeypatch.setattr(watch.Watch, 'print', show)  # raises too: it takes other arguments
    with pytest.raises(OSError, match='the screen is gone'):
        local.submit({path: counting(path)}, TWO)
    assert_saved([path])


def test_all_processes_of_a_member_start_or_none(tmp_path):
    environments = [{}, {'PATH': 1}]  # no text: the second cannot be started
    options = process.ProcessOptions(processes=2, environments=environments)
    with pytest.raises(TypeError):
        process.start(tmp_path / 'a', counting(tmp_path / 'a'), options)
    assert not is_locked(tmp_path / 'a/launched')


@pytest.mark.parametrize('method', ['decide', 'is_due'])
def test_members_of_a_population_end_when_a_decision_raises(tmp_path, monkeypatch, method):
    sweep_file = {'metric': 'loss', 'split': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep_file))
    paths = [tmp_path / 'a', tmp_path / 'b']

    def is_due(self, member, interval):
        if method == 'is_due' and have_begun(paths):
            raise UserError('no such number')
        return member == 'a' and have_begun(paths)

    def decide(self, member):
        raise UserError('no such number')

    monkeypatch.setattr(Population, 'is_due', is_due)
    monkeypatch.setattr(Population, 'decide', decide)
    members = [Member(p.name, p.name, counting(p)[:2] + counting(p)[3:], {}) for p in paths]
    population = Population(tmp_path, members, 0.05, [], 0)
    with pytest.raises(UserError, match='no such number'):
        pbt.train(population, 1, TWO)
    assert_saved(paths)


def test_jobs_that_cannot_be_noted_are_taken_back(tmp_path, monkeypatch):
    commands = []

    def run(*command):
        commands.append(command)
        return '7\n' if command[0] == 'sbatch' else ''

    def write_json(file, value):
        raise OSError('no space left on device')

    for name in ('PARTITION', 'TIME', 'GRES'):
        monkeypatch.setattr(slurm, name, type('Flag', (), {'value': ''}))
    monkeypatch.setattr(slurm, 'WARNING', type('Flag', (), {'value': 120}))
    monkeypatch.setattr(slurm, 'SBATCH', type('Flag', (), {'value': []}))
    monkeypatch.setattr(slurm, 'run_slurm', run)
    monkeypatch.setattr(slurm, 'write_json', write_json)
    with pytest.raises(OSError, match='no space'):
        slurm.submit({tmp_path / 'runs/a': ['true']}, TWO)
    assert commands[-1] == ('scancel', '7')


RAY = """
import json, pathlib, sys
from absl import flags
from launch import engine, ray
flags.FLAGS(['ray'])
paths = [pathlib.Path(path) for path in json.loads(sys.argv[1])]
def rule(members):
    if all((path / 'metrics.jsonl').exists() for path in members):
        raise RuntimeError('a rule')
commands = dict(zip(paths, json.loads(sys.argv[2])))
ray.submit(commands, engine.Resources(), rule)
"""


@pytest.mark.slow
def test_a_watcher_that_is_interrupted_twice_waits_until_the_member_has_saved(tmp_path):
    path = tmp_path / 'a'
    # A shell starts commands in the background without SIGINT.
    code = 'import json, signal, sys; from launch import process; '
    code += 'signal.signal(signal.SIGINT, signal.default_int_handler); '
    code += 'process.run(*json.loads(sys.argv[1]))'
    arguments = json.dumps([str(path), counting(path), str(tmp_path)])
    watcher = subprocess.Popen([sys.executable, '-c', code, arguments])
    deadline = time.monotonic() + 60
    while not have_begun([path]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(2):
        watcher.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert watcher.wait(60) == 0
    assert_saved([path])


@pytest.mark.slow
def test_members_on_a_ray_cluster_save_and_end_too(tmp_path):
    paths = [tmp_path / 'a', tmp_path / 'b']
    arguments = [json.dumps([str(path) for path in paths]), json.dumps([*map(counting, paths)])]
    result = subprocess.run([sys.executable, '-c', RAY, *arguments], capture_output=True, text=True)
    assert result.returncode == 1 and 'RuntimeError: a rule' in result.stderr
    assert_saved(paths)
