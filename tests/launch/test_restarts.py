"""Exit code 143 is taken for a clean stop only where a run got further than the time before."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import engine, k8s, restarts, slurm, state
from mi.config import UserError
from mi.training import run_state

ONE = engine.Resources()


def save(path, step):
    (path / 'checkpoints' / f'{step:08d}').mkdir(parents=True, exist_ok=True)


def test_a_run_starts_again_as_long_as_it_has_saved_more(tmp_path):
    assert restarts.note_stop(tmp_path)  # the first time there is nothing to compare with
    assert not restarts.note_stop(tmp_path) and not restarts.note_stop(tmp_path)
    for step in (10, 20):
        save(tmp_path, step)
        assert restarts.note_stop(tmp_path) and run_state.restart_refusal(tmp_path) == ''
        assert not restarts.note_stop(tmp_path)
        message = f'stopped twice at step {step}, without getting further'
        assert run_state.restart_refusal(tmp_path) == message
    (tmp_path / 'checkpoints/00000030.damaged').mkdir()  # no run resumes from it
    assert not restarts.note_stop(tmp_path)
    (tmp_path / 'status.json').write_text('{"state": "running", "step": 25}')  # no word of saving
    assert not restarts.note_stop(tmp_path)
    (tmp_path / 'status.json').write_text('{"state": "preempted", "step": 25}')
    assert restarts.note_stop(tmp_path)
    (tmp_path / 'probes.json').write_text('{"3": {}}')  # a search, within a step
    assert restarts.note_stop(tmp_path) and not restarts.note_stop(tmp_path)
    (tmp_path / run_state.RESTART_NOTE).write_text(
        '{"saved": '
    )  # a power failure: as if it were the first
    assert restarts.note_stop(tmp_path)


def test_what_holds_in_one_launcher_holds_in_the_next(tmp_path):
    """A launcher that is started again does not forget that a member was stopped at its step."""
    save(tmp_path, 5)
    (tmp_path / 'status.json').write_text('{"state": "running"}')
    assert engine.Attempts(0).end(tmp_path, 143) == ('preempted', True, '')
    phase, is_restarted, message = engine.Attempts(0).end(tmp_path, 143)
    assert (phase, is_restarted) == ('failed', False) and 'stopped twice at step 5' in message
    assert (
        state.read_member_state(tmp_path).phase == 'failed'
        and 'twice' in state.read_member_state(tmp_path).reason
    )
    assert engine.Attempts(1).end(tmp_path, 143)[1]  # a retry is one
    save(tmp_path, 6)
    assert (
        state.read_member_state(tmp_path).phase != 'failed'
    )  # it was started by hand, and got further
    assert engine.Attempts(0).end(tmp_path, 143) == ('preempted', True, '')
    assert state.read_member_state(tmp_path).reason == 'its process is gone'


def batch(tmp_path, does, **options):
    """Runs the batch script of a job once, with an srun that does this; its exit code."""
    path = tmp_path / 'runs/member'
    bin_dir = tmp_path / 'bin'
    bin_dir.mkdir(exist_ok=True)
    commands = {'srun': does, 'scancel': 'true', 'scontrol': 'echo "$@" >> "$REQUEUED"'}
    for name, body in commands.items():
        (bin_dir / name).write_text(f'#!/bin/bash\n{body}\n')
        (bin_dir / name).chmod(0o755)
    script = slurm.write_script({path: ['true']}, ONE, slurm.Options(**options), tmp_path / 'slurm')
    environment = os.environ | {
        'PATH': f'{bin_dir}:{os.environ["PATH"]}',
        'REQUEUED': str(tmp_path / 'requeued'),
        'RUN': str(path),
        'SLURM_ARRAY_JOB_ID': '7',
        'SLURM_ARRAY_TASK_ID': '0',
    }
    return subprocess.run(['bash', '-c', script], env=environment).returncode


def requeued(tmp_path):
    file = tmp_path / 'requeued'
    return file.read_text().splitlines() if file.exists() else []


def test_a_job_that_is_warned_before_it_can_save_goes_back_once(tmp_path):
    """The warning comes while Python starts: the run dies of SIGTERM, which is 143 as well."""
    warned = 'kill -USR1 $PPID; sleep 0.2; exit 143'
    assert batch(tmp_path, warned) == 0 and requeued(tmp_path) == ['requeue 7_0']
    assert batch(tmp_path, warned) == 1 and requeued(tmp_path) == ['requeue 7_0']
    path = tmp_path / 'runs/member'
    assert state.read_member_state(path).phase == 'failed'
    assert 'stopped twice at step 0' in (path / 'log.txt').read_text()
    for step in (10, 20):  # one that has saved goes back each time
        saves = f'mkdir -p "$RUN/checkpoints/{step:08d}"; {warned}'
        assert batch(tmp_path, saves) == 0
    assert len(requeued(tmp_path)) == 3
    assert batch(tmp_path, 'exit 143') == 143  # Slurm itself has stopped it, and queues it again
    assert batch(tmp_path, 'kill -USR1 $PPID; sleep 0.2; exit 3') == 3
    assert len(requeued(tmp_path)) == 3


def test_a_second_job_of_a_member_that_runs_starts_nothing(tmp_path):
    path = tmp_path / 'runs/member'
    path.mkdir(parents=True)
    hold = subprocess.Popen(['flock', '--no-fork', str(path / 'launched'), 'sleep', '60'])
    try:
        deadline = time.monotonic() + 60
        while state.read_member_state(path).phase != 'running':
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert batch(tmp_path, 'touch "$RUN/started"') == 1
        assert not (path / 'started').exists()
    finally:
        hold.kill()
        hold.wait()


@pytest.mark.parametrize(
    'limit, expected',
    [
        ('30', 1800), ('2:30', 150), ('4:00:00', 14400), ('1-12', 129600), ('1-0:30', 88200),
        ('1-0:0:1', 86401), ('UNLIMITED', float('inf')),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(limit, expected):
    assert slurm.parse_time_limit(limit) == expected


def test_a_limit_that_is_over_at_the_warning_is_refused():
    for options in (
        slurm.Options(time='2:00', warning=120),
        slurm.Options(sbatch=['--time=1']),
        slurm.Options(sbatch=['-t 0:01:59']),
    ):
        with pytest.raises(UserError, match=r'expected more than --warning=120 seconds'):
            slurm.refuse_short(options)
    with pytest.raises(UserError, match='--time=four: expected MINUTES'):
        slurm.refuse_short(slurm.Options(time='four'))
    slurm.refuse_short(slurm.Options(time='2:01', sbatch=['--account=me', '-t', '-t 3']))


PATH = pathlib.Path('/runs/s/m')
PODS = k8s.Options('image', 'claim')


def container(path, resources=ONE):
    manifest = k8s.make_jobset(
        path, ['/bin/python', '-m', 'mi.main', f'--workdir={path}'], resources, PODS
    )
    (job,) = manifest['spec']['replicatedJobs']
    (container_spec,) = job['template']['spec']['template']['spec']['containers']
    return manifest['metadata']['name'], container_spec['command']


def pod(path, program, **environment):
    """Runs a program as the container of a member does; its exit code."""
    command = container(path)[1]
    command = [sys.executable, *command[1 : command.index('--') + 1], 'bash', '-c', program]
    return subprocess.run(
        command, env=os.environ | environment, stderr=subprocess.DEVNULL
    ).returncode


def test_a_pod_that_gets_no_further_has_failed(tmp_path):
    path = tmp_path / 'member'
    assert pod(path, 'kill -TERM $$') == 143  # once; Kubernetes starts it again without limit
    assert pod(path, 'kill -TERM $$') == 1  # and counts this one
    save(path, 10)
    for index in '0', '1':  # each pod of a member decides for itself, and both the same
        assert pod(path, 'exit 143', JOB_COMPLETION_INDEX=index) == 143
    for index in '0', '1':
        assert pod(path, 'exit 143', JOB_COMPLETION_INDEX=index) == 1
    assert pod(path, 'exit 0') == 0 and pod(path, 'exit 3') == 3


def test_the_reason_is_that_of_the_last_failure(tmp_path):
    path = tmp_path / 'member'
    assert pod(path, 'exit 3') == 3
    assert pod(path, 'kill -KILL $$') == 137
    assert state.read_member_state(path).reason == 'exit code 137'
    save(path, 10)
    assert pod(path, 'exit 143') == 143 and pod(path, 'exit 143') == 1
    assert state.read_member_state(path).reason.startswith('stopped twice at step 10')
    save(path, 20)
    assert pod(path, 'kill -KILL $$') == 137
    assert state.read_member_state(path).reason == 'exit code 137'


def test_a_member_that_failed_gets_a_job_set_of_a_new_name(tmp_path):
    path = tmp_path / 'member'
    first = container(path)[0]
    assert container(path)[0] == first  # it has not begun: the same one
    names = [first]
    assert pod(path, 'exit 1') == 1  # refused before the run could write anything
    assert (
        state.read_member_state(path).phase == 'failed'
        and state.read_member_state(path).reason == 'exit code 1'
    )
    names.append(container(path)[0])
    assert pod(path, 'exit 1') == 1
    names.append(container(path)[0])
    for updated in ('12:00', '13:00'):  # its node was lost, or it ran out of memory
        status = {'state': 'running', 'pid': 1, 'host': 'pod', 'updated': updated}
        (path / 'status.json').write_text(json.dumps(status))
        names.append(container(path)[0])
        assert container(path)[0] == names[-1]  # the same failure has the same name
    assert len(set(names)) == 5 and all(len(name) <= 40 for name in names)
    (path / 'status.json').write_text('{"state": "preempted", "step": 10}')
    assert container(path)[0] == first  # Kubernetes itself starts it again


def test_members_that_run_are_left_out_of_the_manifest(tmp_path, capsys, monkeypatch):
    for name, value in ('IMAGE', 'x'), ('CLAIM', 'c'), ('MOUNT', str(tmp_path)):
        monkeypatch.setattr(k8s, name, type('Flag', (), {'value': value}))
    for name, value in ('TPU', ''), ('TOPOLOGY', ''), ('MEMORY', ''), ('NAMESPACE', ''):
        monkeypatch.setattr(k8s, name, type('Flag', (), {'value': value}))
    runs, waits = tmp_path / 'runs', tmp_path / 'waits'
    runs.mkdir()
    commands = {path: ['python', f'--workdir={path}'] for path in (runs, waits)}
    held = subprocess.Popen(['flock', '--no-fork', str(runs / 'lock'), 'sleep', '60'])
    try:
        deadline = time.monotonic() + 60
        while state.read_member_state(runs).phase != 'running':
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert k8s.submit(commands, ONE) == dict.fromkeys(commands, 'queued')
    finally:
        held.kill()
        held.wait()
    output = capsys.readouterr()
    assert f'--workdir={waits}' in output.out and f'--workdir={runs}' not in output.out
    assert '1 running, left alone: runs' in output.err


def test_a_signal_to_the_first_process_of_a_container_reaches_the_run(tmp_path):
    """And what it saves then counts."""
    save = 'mkdir -p "$0/checkpoints/00000010"; exit 143'
    program = f'trap \'{save}\' TERM; touch "$0/ready"; while true; do sleep 0.05; done'
    path = tmp_path / 'member'
    path.mkdir()
    command = [sys.executable, '-m', 'launch.restarts', str(path), '--']
    for expected in 143, 1:  # the second saves no more than the first
        (path / 'ready').unlink(missing_ok=True)
        arguments = [*command, 'bash', '-c', program, str(path)]
        first = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (path / 'ready').exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == expected
