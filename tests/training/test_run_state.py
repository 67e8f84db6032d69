"""The phase of a run follows from its files alone, by rules in a fixed order."""

import fcntl
import json
import subprocess
import sys

import pytest

from mi.training import run_state
from mi.training.run_state import RunState, read_run_state

STOP_MARK = {'reason': 'behind'}
REFUSAL = {'reason': 'stopped twice', 'at': [-1, 0]}


def write_run(path, status=None, stop_mark=None, note=None, log=''):
    path.mkdir()
    contents = {'status.json': status, 'stopped.json': stop_mark, 'stops.json': note}
    for name, content in contents.items():
        if content is not None:
            (path / name).write_text(json.dumps(content))
    if log:
        (path / 'log.txt').write_text(log)
    return path


@pytest.mark.parametrize(
    'files, expected',
    [
        ({}, RunState('waiting')),
        ({'log': 'error: no such key\n\n'}, RunState('failed', 'error: no such key')),
        ({'status': {'state': 'done'}}, RunState('done')),
        ({'status': {'state': 'done'}, 'stop_mark': STOP_MARK}, RunState('done')),
        ({'status': {'state': 'preempted'}}, RunState('preempted')),
        ({'status': {'state': 'preempted'}, 'stop_mark': STOP_MARK}, RunState('stopped', 'behind')),
        ({'status': {'state': 'preempted'}, 'note': REFUSAL}, RunState('failed', 'stopped twice')),
        (
            {'status': {'state': 'preempted', 'step': 7}, 'note': REFUSAL},  # it has progressed
            RunState('preempted'),
        ),
        ({'status': {'state': 'failed', 'reason': 'OOM'}}, RunState('failed', 'OOM')),
        ({'status': {'state': 'failed', 'reason': 'OOM'}, 'log': 'a\n'}, RunState('failed', 'OOM')),
        ({'status': {'state': 'running'}}, RunState('died', 'its process is gone')),
        ({'status': {'state': 'running'}, 'log': 'Killed'}, RunState('died', 'Killed')),
        ({'status': {'state': 'running'}, 'stop_mark': STOP_MARK}, RunState('stopped', 'behind')),
    ],
)
def test_the_files_of_a_run_without_a_process_decide(tmp_path, files, expected):
    assert read_run_state(write_run(tmp_path / 'run', **files)) == expected


@pytest.mark.parametrize('lock_name', ['lock', 'launched'])
@pytest.mark.parametrize('files', [{}, {'status': {'state': 'failed'}}, {'stop_mark': STOP_MARK}])
def test_a_run_whose_lock_is_held_is_running(tmp_path, lock_name, files):
    path = write_run(tmp_path / 'run', **files)
    with open(path / lock_name, 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run_state(path) == RunState('running')
        (path / 'status.json').write_text('{"state": "done"}')
        assert read_run_state(path) == RunState('done')


def test_a_run_that_ends_after_its_status_was_read_has_not_died(tmp_path):
    path = write_run(tmp_path / 'run', status={'state': 'done'})
    assert read_run_state(path, status={'state': 'running'}) == RunState('done')


@pytest.mark.parametrize('content', ['', '{"state": "run', '[1]', '\ufffd'])
def test_damaged_files_count_as_missing(tmp_path, content):
    path = write_run(tmp_path / 'run')
    for name in ('status.json', 'stops.json'):
        (path / name).write_text(content)
    assert read_run_state(path) == RunState('waiting')
    assert read_run_state(tmp_path / 'none') == RunState('waiting')


def test_only_the_end_of_a_log_is_read(tmp_path):
    log = tmp_path / 'log.txt'
    log.write_text('x' * 2 * run_state.LOG_TAIL + '\nlast\n')
    assert run_state.last_line(log) == 'last'


def test_it_does_not_import_jax():
    code = "import sys, mi.training.run_state; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)
