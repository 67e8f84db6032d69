"""One sweep on this machine, on a real Slurm and on a real Ray: the same metrics to the last bit.

Slurm is started by the test where its programs are installed and the user is root, and with
MI_TEST_SLURM=install, as in CI, Debian's packages are installed for it; elsewhere it is skipped.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from launch import slurm, state
from launch.engine import Resources
from tests.launch import cluster

SWEEP = """
from launch.sweep import product
CONFIG = {config!r}
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', {metric!r}, 'eval', None, []
def sweep():
    return product(**{values!r})
"""
FIT = {
    'model.width': [4, 16],
    'seeds': [(0,)],
    'train.steps': [5000],
    'train.log_every': [50],
    'train.save_every': [50],  # so that a signal finds it on its way
    'train.eval_every': [2500],
}
NAMES = ['width=4', 'width=16']


def launch(engine, folder, config, values, *more):
    file = folder / 'a_sweep.py'
    metric = 'success' if 'rl' in config else 'mse'
    file.write_text(SWEEP.format(config=config, values=values, metric=metric))
    command = [sys.executable, '-m', f'launch.{engine}', f'--sweep={file}', *more]
    return [*command, f'--workdir={folder / "runs"}']


def wait_for(is_true, seconds=300):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f'not so after {seconds} seconds'
        time.sleep(0.1)


@pytest.fixture(scope='module')
def on_this_machine(tmp_path_factory):
    """What the members' metrics are when nothing disturbs them, by name."""
    folder = tmp_path_factory.mktemp('local')
    command = launch('local', folder, 'experiments/expressivity/config.py:fit', FIT, '--parallel=2')
    subprocess.run(command, check=True, capture_output=True)
    return {name: (folder / 'runs' / name / 'metrics.jsonl').read_bytes() for name in NAMES}


@pytest.fixture(scope='module')
def a_slurm(tmp_path_factory):
    with cluster.slurm(tmp_path_factory.mktemp('slurm')) as environment:
        yield environment


@pytest.mark.slow
def test_ray_gives_the_same_metrics(tmp_path, on_this_machine):
    command = launch('ray', tmp_path, 'experiments/expressivity/config.py:fit', FIT)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in NAMES:
        metrics = (tmp_path / 'runs' / name / 'metrics.jsonl').read_bytes()
        assert metrics == on_this_machine[name]
    assert (tmp_path / 'runs/report/report.html').exists()


@pytest.mark.slow
def test_slurm_gives_the_same_metrics_also_to_jobs_that_are_sent_back(
    tmp_path, on_this_machine, a_slurm
):
    """One is requeued by Slurm; the other gets the signal that Slurm sends before the time-out."""
    runs = tmp_path / 'runs'
    command = launch('slurm', tmp_path, 'experiments/expressivity/config.py:fit', FIT, '--time=30')
    submitted = subprocess.run(command, check=True, capture_output=True, text=True, env=a_slurm)
    assert '2 members' in submitted.stdout
    jobs = json.loads((runs / 'slurm/jobs.json').read_text())
    running_names = set(NAMES)
    while running_names:
        wait_for(lambda: any(list((runs / name).glob('checkpoints/0*')) for name in running_names))
        name = next(name for name in running_names if list((runs / name).glob('checkpoints/0*')))
        running_names.remove(name)
        if name == NAMES[0]:
            cluster.run(a_slurm, 'scontrol', 'requeue', jobs[name])
        else:
            cluster.run(a_slurm, 'scancel', '--signal=USR1', '--batch', jobs[name])
    for name in NAMES:
        wait_for(lambda name=name: state.read_member_state(runs / name).phase == 'preempted')
        wait_for(lambda name=name: 'PENDING' in job(a_slurm, jobs[name]))
        assert 'Restarts=1' in job(a_slurm, jobs[name])
    resubmitted = subprocess.run(command, check=True, capture_output=True, text=True, env=a_slurm)
    assert 'members' not in resubmitted.stdout  # they are in the queue
    for name in NAMES:
        start_again(a_slurm, jobs[name])
    waited = subprocess.run([*command, '--wait'], capture_output=True, text=True, env=a_slurm)
    assert waited.returncode == 0, waited.stderr
    for name in NAMES:
        assert state.read_member_state(runs / name).phase == 'done'
        assert (runs / name / 'metrics.jsonl').read_bytes() == on_this_machine[name]
    assert (runs / 'report/report.html').exists()


def job(environment, name):
    return cluster.run(environment, 'scontrol', 'show', 'job', name)


def start_again(environment, name):
    """Start a requeued job sooner than after the two minutes that Slurm would wait.

    Slurm compares credentials in whole seconds: a job that starts in the second in which its last
    credential was revoked ends with 'Job credential revoked'.
    """
    cluster.run(environment, 'scontrol', 'update', f'JobId={name}', 'StartTime=now+3seconds')


@pytest.mark.slow
def test_a_job_that_never_gets_further_goes_back_once(tmp_path, a_slurm):
    """Its program dies of the signal each time, as Python does while it starts."""
    path = tmp_path / 'runs/member'
    text = slurm.write_script(
        {path: ['sleep', '600']}, Resources(), slurm.Options(), tmp_path / 'slurm'
    )
    (tmp_path / 'slurm').mkdir()
    (tmp_path / 'sweep.sh').write_text(text)
    name = cluster.run(a_slurm, 'sbatch', '--parsable', str(tmp_path / 'sweep.sh')) + '_0'
    for restarts in range(2):
        wait_for(lambda: 'RUNNING' in job(a_slurm, name))
        wait_for(lambda: state.read_member_state(path).phase == 'running')
        time.sleep(1)  # until srun has started it
        cluster.run(a_slurm, 'scancel', '--signal=USR1', '--batch', name)
        if restarts == 0:
            wait_for(lambda: 'Restarts=1' in job(a_slurm, name))
            start_again(a_slurm, name)
    wait_for(lambda: name not in cluster.run(a_slurm, 'squeue', '--array', '--format=%i'))
    now = state.read_member_state(path)
    assert now.phase == 'failed' and now.reason.startswith('stopped twice at step 0')


@pytest.mark.slow
def test_the_processes_of_a_member_find_each_other_by_what_slurm_tells_them(tmp_path, a_slurm):
    values = {'train.steps': [400], 'env.name': ['catch']}
    command = launch('slurm', tmp_path, 'configs/rl.py:tiny', values, '--processes=2', '--wait')
    result = subprocess.run(command, capture_output=True, text=True, env=a_slurm)
    (run,) = (path.parent for path in (tmp_path / 'runs').glob('*/config.json'))
    assert result.returncode == 0, result.stderr + (run / 'log.txt').read_text()
    second = json.loads((run / 'status.1.json').read_text())
    assert state.read_member_state(run).phase == second['state'] == 'done'


@pytest.mark.slow
def test_a_member_that_fails_on_slurm_is_tried_again_and_named(tmp_path, a_slurm):
    values = {'optim.learning_rate': [-1.0], 'env.name': ['catch']}
    more = ['--wait', '--retries=1']
    command = launch('slurm', tmp_path, 'configs/rl.py:tiny', values, *more)
    result = subprocess.run(command, capture_output=True, text=True, env=a_slurm)
    assert result.returncode == 1
    assert '1 of 1 members failed' in result.stderr
    (log,) = (tmp_path / 'runs').glob('*/log.txt')
    assert log.read_text().count('config.optim.learning_rate = -1.0: expected') == 2


@pytest.mark.slow
def test_members_that_left_the_queue_unfinished_are_reported_and_named(tmp_path):
    """A Slurm that loses its jobs; and figures of the sweep's own that cannot be drawn of that."""
    for name, does in ('sbatch', 'echo 7'), ('squeue', 'true'):
        (tmp_path / name).write_text(f'#!/bin/sh\n{does}\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    command = launch('slurm', tmp_path, 'experiments/expressivity/config.py:fit', FIT)
    with open(tmp_path / 'a_sweep.py', 'a') as file:
        file.write("def report(workdir, out):\n    raise ValueError('nothing to draw')\n")
    queued = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert queued.returncode == 0 and 'job 7: 2 members' in queued.stdout
    assert not (tmp_path / 'runs/report').exists()
    (tmp_path / 'runs/width=16').mkdir()
    (tmp_path / 'runs/width=16/log.txt').write_text('error: no disk')
    waited = subprocess.run([*command, '--wait'], capture_output=True, text=True, env=environment)
    assert waited.returncode == 1
    error = 'error: 1 of 2 members are not finished: width=4 (waiting)'
    for line in ('error: 1 of 2 members failed: width=16', error):
        assert 0 <= waited.stderr.index(line) < waited.stderr.index('nothing to draw')
    assert (tmp_path / 'runs/report/report.html').exists()


def test_a_batch_script_says_what_was_asked_for():
    commands = {pathlib.Path("runs/it's"): ['python', '-m', 'mi.main', '--config.seeds=(0, 1)']}
    resources = Resources(parallel=3, processes=2, gpus=1, cores=4, retries=2)
    options = slurm.Options('gpu', '1:00:00', '', 90, ['--account=me'])
    text = slurm.write_script(commands, resources, options, pathlib.Path('runs/slurm'))
    for line in (
        '--array=0-0%3', '--ntasks=2', '--cpus-per-task=4', '--gpus-per-task=1', '--account=me',
        '--partition=gpu', '--time=1:00:00', '--signal=B:USR1@90', '--requeue',
    ):  # fmt: skip
        assert f'#SBATCH {line}\n' in text
    start = text.index('case'), text.index('esac') + 4
    shown = (
        f'SLURM_ARRAY_TASK_ID=0\n{text[slice(*start)]}\nprintf "%s\\n" "$path" "${{command[@]}}"'
    )
    result = subprocess.run(['bash', '-c', shown], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "runs/it's", 'python', '-m', 'mi.main', '--config.seeds=(0, 1)', '--distributed=auto',
    ]  # fmt: skip
