"""A run that was stopped, however it was, ends with the bits of one that was not."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from mi.training.checkpoint import hash_file

pytestmark = pytest.mark.slow

STEPS = 40


LSTM = [
    '--config=configs/lm.py:tiny,fusion=mi', '--config.seeds=(0, 1)', '--config.model.source=state',
    '--config.dropout.state=0.1',
]  # fmt: skip
TRANSFORMER = [
    '--config=configs/lm.py:core=transformer,tiny', '--config.model.memory=8',
    '--config.model.layers=2', '--config.model.dtype=bfloat16', '--config.train.accumulate=2',
]  # fmt: skip


def start(workdir, texts, model=LSTM):
    command = [
        *(sys.executable, '-m', 'mi.main', *model, f'--config.data.source={texts}'),
        *(f'--config.train.steps={STEPS}', '--config.train.log_every=3', f'--workdir={workdir}'),
    ]
    with open(workdir.with_suffix('.log'), 'a') as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(workdir, texts, model=LSTM):
    assert start(workdir, texts, model).wait() == 0, workdir.with_suffix('.log').read_text()


def wait_for_step(workdir, step, process):
    """Until the run has written a record of this step."""
    file = workdir / 'metrics.jsonl'
    while process.poll() is None:
        lines = file.read_text().splitlines() if file.exists() else []
        if lines and lines[-1].endswith('}') and json.loads(lines[-1])['step'] >= step:
            return
        time.sleep(0.005)


def assert_same_end(ended, uninterrupted):
    assert (ended / 'metrics.jsonl').read_bytes() == (uninterrupted / 'metrics.jsonl').read_bytes()
    last = f'checkpoints/{STEPS:08d}'
    ours, theirs = (restored(path / last / 'state') for path in (ended, uninterrupted))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(ours[name] == theirs[name] for name in ours)
    for name in ('config.json', 'cost.json'):
        assert hash_file(ended / name) == hash_file(uninterrupted / name)
    assert json.loads((ended / 'status.json').read_text())['state'] == 'done'


def restored(path: pathlib.Path) -> dict[str, bytes]:
    """Every array of a checkpoint, parameters, optimizer and carry, as its bytes."""
    import jax
    import orbax.checkpoint as ocp

    leaves, _ = jax.tree.flatten_with_path(ocp.StandardCheckpointer().restore(path))
    return {jax.tree_util.keystr(name): leaf.tobytes() for name, leaf in leaves}


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, texts):
    workdir = tmp_path_factory.mktemp('runs') / 'uninterrupted'
    finish(workdir, texts)
    return workdir


def killed_at_random_moments(workdir, texts, model, times):
    moments = random.Random(os.environ.get('PYTEST_SEED'))
    for _ in range(times):
        process = start(workdir, texts, model)
        wait_for_step(workdir, moments.randrange(1, STEPS), process)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.wait()
    finish(workdir, texts, model)


def test_killed_at_random_moments(tmp_path, texts, uninterrupted):
    killed_at_random_moments(tmp_path / 'run', texts, LSTM, 3)
    assert_same_end(tmp_path / 'run', uninterrupted)


def test_a_transformer_in_bf16_with_parts_of_the_batch(tmp_path, texts):
    finish(tmp_path / 'whole', texts, TRANSFORMER)
    killed_at_random_moments(tmp_path / 'run', texts, TRANSFORMER, 2)
    assert_same_end(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(number, tmp_path, texts, uninterrupted):
    workdir = tmp_path / 'run'
    process = start(workdir, texts)
    wait_for_step(workdir, 7, process)
    process.send_signal(number)
    assert process.wait() == 143
    status = json.loads((workdir / 'status.json').read_text())
    assert status['state'] == 'preempted' and 7 <= status['step'] < STEPS
    assert (workdir / 'checkpoints' / f'{status["step"]:08d}').exists()
    finish(workdir, texts)
    assert_same_end(workdir, uninterrupted)


def test_a_flipped_bit_costs_no_more_than_the_steps_since_the_checkpoint_before(
    tmp_path, texts, uninterrupted
):
    workdir = tmp_path / 'run'
    process = start(workdir, texts)
    wait_for_step(workdir, 12, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    newest = max((workdir / 'checkpoints').glob('[0-9]*'))
    file = max(newest.rglob('*'), key=lambda f: f.stat().st_size if f.is_file() else -1)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)
    finish(workdir, texts)
    log = workdir.with_suffix('.log').read_text()
    assert f'{newest} is damaged' in log and 'continues from the previous one' in log
    assert newest.with_name(newest.name + '.damaged').exists()
    assert_same_end(workdir, uninterrupted)
