"""Forty members: five fail, five are killed, and then their launcher is killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import state
from mi.training.lock import is_locked

MEMBER = str(pathlib.Path(__file__).with_name('member.py'))
LAUNCHER = """
import json, pathlib, sys
from launch import engine, local
commands = {pathlib.Path(path): command for path, command in json.load(open(sys.argv[1])).items()}
states = local.submit(commands, engine.Resources(parallel=8, retries=int(sys.argv[3])))
json.dump({path.name: word for path, word in states.items()}, open(sys.argv[2], 'w'))
"""
REAL = [
    '--config=experiments/expressivity/config.py:fit',
    '--config.seeds=(0,)',
    '--config.train.batch=16',
    '--config.train.steps=12000',
    '--config.train.log_every=200',
    '--config.train.eval_every=12000',
    '--config.train.save_every=200',
]


def member(path, **options):
    flags = [f'--{name}={value}' for name, value in options.items()]
    return [sys.executable, MEMBER, f'--workdir={path}', *flags]


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(is_true, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(path):
    """kill -9 of the process that runs in a directory."""
    os.kill(int(json.loads((path / 'status.json').read_text())['pid']), signal.SIGKILL)


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    for lock in tmp_path.glob('*/lock'):  # where the test failed, some may still run
        if is_locked(lock):
            kill(lock.parent)


@pytest.mark.slow
def test_a_sweep_survives_failures_kills_and_the_death_of_its_launcher(folder):
    """Nothing is run twice and nothing is lost; two of the forty are training runs."""
    paths = [folder / f'{i:02d}' for i in range(40)]
    failing, killed, real = paths[2:7], [*paths[8:12], paths[0]], paths[:2]
    commands = {
        path: member(
            path, steps=20, seconds=0.3 if path in killed else 0.06, fails=int(path in failing)
        )
        for path in paths
    }
    for path in real:
        commands[path] = [sys.executable, '-m', 'mi.main', f'--workdir={path}', *REAL]
    plan, result = folder / 'commands.json', folder / 'states.json'
    plan.write_text(json.dumps({str(path): command for path, command in commands.items()}))
    launch = [sys.executable, '-c', LAUNCHER, str(plan), str(result)]

    first = subprocess.Popen([*launch, '0'], stderr=subprocess.DEVNULL)
    for path in killed[:-1]:
        wait_for(lambda path=path: len(records(path / 'metrics.jsonl')) > 3)
        kill(path)
    wait_for(lambda: state.read_member_state(killed[-2]).phase == 'died')
    first.kill()
    first.wait()
    orphans = [path for path in paths if is_locked(path / 'launched')]
    assert set(real) < set(orphans) and not paths[-1].exists()  # some run, some have not begun

    second = subprocess.Popen([*launch, '1'], stderr=subprocess.PIPE, text=True)
    # It restarts this one only after it has seen which members run.
    wait_for(lambda: len(records(failing[0] / 'starts.jsonl')) == 2)
    wait_for(lambda: list((real[0] / 'checkpoints').glob('0*')))
    kill(real[0])  # an orphan, which the second launcher waits for
    errors = second.communicate(timeout=300)[1]
    assert second.returncode == 0, errors
    assert '00 failed, starting it again' in errors
    assert set(json.loads(result.read_text()).values()) == {'done'}
    for path in paths:
        assert state.read_member_state(path).phase == 'done'
    for path in paths[2:]:
        assert [r['step'] for r in records(path / 'metrics.jsonl')] == list(range(1, 21)), path
    starts = {path: len(records(path / 'starts.jsonl')) for path in paths[2:]}
    assert starts == {path: 2 if path in failing or path in killed else 1 for path in paths[2:]}
    assert all(records(path / 'starts.jsonl')[1]['step'] > 3 for path in killed[:-1])
    killed_run, undisturbed_run = ((path / 'metrics.jsonl').read_bytes() for path in real)
    assert killed_run == undisturbed_run and b'"eval"' in undisturbed_run  # to the same bits
