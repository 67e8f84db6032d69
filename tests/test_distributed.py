"""Two processes over loopback: they train to what one process with two devices trains to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import forced

FUSED = ['--config=configs/rl.py:tiny,env=catch', '--config.train.steps=4000']
TRANSFORMER = ['--config=configs/lm.py:core=transformer,tiny', '--config.model.layers=2']
SHORT = ['--config.train.steps=100', '--config.train.save_every=25', '--config.train.eval_every=50']
LM = [*TRANSFORMER, '--config.model.memory=8', '--config.train.fsdp=2', *SHORT]
THREADS = [*FUSED, '--config.train.topology=threads', '--config.actors.batch=2']


def start(workdir, arguments, *, process=None, port=0, devices=1):
    command = [sys.executable, '-m', 'mi.main', f'--workdir={workdir}', *arguments]
    if process is not None:
        command.append(f'--distributed=localhost:{port},2,{process}')
    environment = os.environ | {'XLA_FLAGS': forced(devices), 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def two(workdir, arguments, devices=1):
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    return [start(workdir, arguments, process=i, port=port, devices=devices) for i in range(2)]


def finish(processes, codes):
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == codes, errors


def records(path, split='train'):
    rows = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
    return [row for row in rows if row['split'] == split]


def status(path, name='status.json'):
    return json.loads((path / name).read_text())['state']


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [FUSED, LM], ids=['rl', 'lm'])
def test_two_processes_train_and_continue_as_one_with_two_devices(tmp_path, texts, arguments):
    """The language model's parameters are split over the processes too."""
    if arguments is LM:
        arguments = [*LM, f'--config.data.source={texts}']
    finish([start(tmp_path / 'one', arguments, devices=2)], [0])
    processes = two(tmp_path / 'two', arguments)
    while not list((tmp_path / 'two').glob('checkpoints/0*')):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)  # one of them is enough
    finish(processes, [143, 143])
    assert status(tmp_path / 'two') == status(tmp_path / 'two', 'status.1.json') == 'preempted'
    before = len(records(tmp_path / 'two'))
    finish(two(tmp_path / 'two', arguments), [0, 0])
    assert status(tmp_path / 'two') == status(tmp_path / 'two', 'status.1.json') == 'done'

    one, both = records(tmp_path / 'one'), records(tmp_path / 'two')
    assert [row['step'] for row in both] == [row['step'] for row in one]
    assert 0 < before < len(both)
    for name in {'loss', 'entropy', 'gradient_norm', 'nats_per_token'} & set(one[0]):
        expected = [row[name] for row in one]
        np.testing.assert_allclose([row[name] for row in both], expected, rtol=2e-4, atol=1e-6)
    of_rl, of_lm = (records(tmp_path / 'two', split) for split in ('eval', 'test'))
    assert of_rl or of_lm[0]['nats_per_token'] == pytest.approx(
        records(tmp_path / 'one', 'test')[0]['nats_per_token'], rel=2e-4
    )


SEEDS = ['--config.seeds=(0,1)', '--config.train.batch=8']
MEASURED = ('loss', 'entropy', 'nats_per_token', 'gradient_norm', 'success')


@pytest.mark.slow
@pytest.mark.parametrize(
    'arguments',
    [[*TRANSFORMER, *SHORT], FUSED],
    ids=['transformer', 'fused'],
)
def test_a_run_is_the_same_on_other_devices_and_moves_between_them(tmp_path, texts, arguments):
    """On one device; on one and, from a checkpoint on, on eight; on two processes of two."""
    if arguments is not FUSED:
        arguments = [*arguments, f'--config.data.source={texts}']
    arguments = [*arguments, *SEEDS]
    finish([start(tmp_path / 'one', arguments)], [0])

    moved = start(tmp_path / 'moved', arguments)
    while not list((tmp_path / 'moved').glob('checkpoints/0*')):
        assert moved.poll() is None, moved.communicate()
        time.sleep(0.02)
    moved.send_signal(signal.SIGTERM)
    finish([moved], [143])
    finish([start(tmp_path / 'moved', arguments, devices=8)], [0])
    finish(two(tmp_path / 'two', arguments, devices=2), [0, 0])

    for split in ('train', 'valid', 'test', 'eval'):
        expected = records(tmp_path / 'one', split)
        for name in ('moved', 'two'):
            rows = records(tmp_path / name, split)
            assert [(r['step'], r['seed']) for r in rows] == [
                (r['step'], r['seed']) for r in expected
            ]
            for key in set(MEASURED) & set(expected[0] if expected else ()):
                np.testing.assert_allclose(
                    [r[key] for r in rows],
                    [r[key] for r in expected],
                    rtol=1e-3,
                    atol=1e-5,
                    err_msg=f'{name} {split} {key}',
                )


@pytest.mark.slow
def test_each_process_has_actors_of_its_own_and_one_learner_over_all(tmp_path):
    finish(two(tmp_path, THREADS), [0, 0])
    assert status(tmp_path) == status(tmp_path, 'status.1.json') == 'done'
    assert all(row['lag_max'] >= 0 for row in records(tmp_path))
    assert records(tmp_path, 'eval')


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_within_a_minute(tmp_path):
    processes = two(tmp_path, [*FUSED, '--config.train.steps=100000000'])
    while not (tmp_path / 'metrics.jsonl').exists() or not records(tmp_path):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.1)
    processes[1].kill()
    processes[1].communicate()
    began = time.monotonic()
    _, error = processes[0].communicate(timeout=90)
    assert processes[0].returncode not in (0, 143)
    assert time.monotonic() - began < 60
    assert 'heartbeat' in error or 'peer' in error or 'task' in error.lower(), error[-2000:]
