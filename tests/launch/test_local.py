"""Members on this machine: GPUs and cores, retries, failures and status."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import rich.console

from launch import engine, local, process, records, state, sweep, table
from mi.config import UserError
from tests.launch.sweep_files import count_command, read_status, write_sweep

ONE = engine.Resources()


def launch_command(file, workdir, *more):
    return [sys.executable, '-m', 'launch.local', f'--sweep={file}', f'--workdir={workdir}', *more]


def read_starts(path):
    return [json.loads(line) for line in (path / 'starts.jsonl').read_text().splitlines()]


def test_gpus_are_dealt_out_so_that_no_two_members_share_one(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,6,GPU-a1')
    paths = [tmp_path / str(i) for i in range(4)]
    commands = {path: count_command(path, steps=4, seconds=0.1) for path in paths}
    states = local.submit(commands, engine.Resources(gpus=2))
    assert set(states.values()) == {'done'}
    first, second, *_ = (read_starts(path)[0]['cuda'] for path in paths)
    assert {first, second} == {'3,5', '6,GPU-a1'}  # simultaneously
    assert {read_starts(path)[0]['cuda'] for path in paths[2:]} <= {first, second}
    with pytest.raises(UserError, match=r'at most the 4 GPUs of this machine .* Try fewer'):
        local.submit(commands, engine.Resources(gpus=5))
    with pytest.raises(UserError, match='expected at most 2, because'):
        local.submit(commands, engine.Resources(gpus=2, parallel=3))


def test_the_processes_of_members_have_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,6,7,8,9,10,11')
    dealt = []
    monkeypatch.setattr(
        process,
        'start',
        lambda path, command, options: dealt.append(
            [environment['CUDA_VISIBLE_DEVICES'] for environment in options.environments]
        ),
    )
    slots = local.Slots(engine.Resources(processes=2, gpus=2))
    assert slots.count == 2
    for i in range(2):
        slots.start(tmp_path / str(i), ['true'])
    assert dealt == [['3,5', '6,7'], ['8,9', '10,11']]


def test_members_that_run_at_once_are_on_cores_of_their_own(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip('one core')
    paths = [tmp_path / str(i) for i in range(2)]
    commands = {path: count_command(path, steps=20, seconds=0.05) for path in paths}
    assert set(local.submit(commands, engine.Resources(parallel=2)).values()) == {'done'}
    on = [read_starts(path)[0]['cores'] for path in paths]
    assert on[0] and not set(on[0]) & set(on[1]) and sorted(on[0] + on[1]) == cores

    path = tmp_path / 'alone'  # it has all, but where it is to have one
    for num_cores, expected in ((0, cores), (1, cores[:1])):
        shutil.rmtree(path, ignore_errors=True)
        local.submit({path: count_command(path, steps=1)}, engine.Resources(cores=num_cores))
        assert read_starts(path)[0]['cores'] == expected
    assert sorted(os.sched_getaffinity(0)) == cores  # those of the launcher are as before


def test_failures_are_retried_as_configured_and_preemptions_as_long_as_they_get_further(tmp_path):
    paths = {name: tmp_path / name for name in ('once', 'twice', 'preempted')}
    commands = {
        paths['once']: count_command(paths['once'], steps=2, fails=1),
        paths['twice']: count_command(paths['twice'], steps=2, fails=2),
        paths['preempted']: count_command(paths['preempted'], steps=4, stops=1),
    }
    states = local.submit(commands, engine.Resources(parallel=3, retries=1))
    assert states == {
        paths['once']: 'done', paths['twice']: 'failed', paths['preempted']: 'done',
    }  # fmt: skip
    assert [len(read_starts(path)) for path in paths.values()] == [2, 2, 4]
    assert state.read_member_state(paths['twice']).reason == 'ValueError: so it was asked'

    stuck = tmp_path / 'stuck'
    commands = {stuck: count_command(stuck, steps=2, stops=0)}  # always stops before its first step
    assert local.submit(commands, engine.Resources()) == {stuck: 'failed'}
    assert len(read_starts(stuck)) == 2


def test_a_run_whose_process_is_gone_has_died(tmp_path):
    path = tmp_path / 'run'
    first = process.start(path, count_command(path, steps=1000, seconds=0.05))
    while not (path / 'metrics.jsonl').exists():
        assert first.poll() is None
        time.sleep(0.02)
    member = state.read_member_state(path, 'loss')
    assert (member.phase, member.num_steps, member.reason) == ('running', 1000, '')
    assert member.metric.startswith('loss ') and member.metric.endswith('(train)')
    second = process.start(path, count_command(path, steps=1000))  # one is enough
    assert isinstance(second, process.AdoptedProcess) and second.poll() is None
    first.kill()
    assert first.wait() == second.poll() * -signal.SIGKILL  # the other one only sees that it failed
    assert state.read_member_state(path).phase == 'died' and read_status(path)['state'] == 'running'
    assert len(read_starts(path)) == 1


def test_status_shows_the_members_of_a_sweep_and_why_one_failed(tmp_path):
    file, runs = (
        write_sweep(tmp_path, [{'model.site': s} for s in ('none', 'both')]),
        tmp_path / 'runs',
    )
    sweep.load(file, runs)
    local.submit({runs / 'site=none': count_command(runs / 'site=none', steps=1, fails=9)}, ONE)
    states = state.read_sweep_states(runs)
    assert {name: member.phase for name, member in states.items()} == {
        'site=none': 'failed', 'site=both': 'waiting',
    }  # fmt: skip
    assert states['site=none'].reason == 'ValueError: so it was asked'
    console = rich.console.Console(width=150, file=io.StringIO())
    console.print(table.build_table('runs', states))
    assert 'runs, 1 failed, 1 waiting' in console.file.getvalue()
    assert list(state.read_sweep_states(runs / 'site=none')) == ['site=none']
    with pytest.raises(UserError, match='expected the directory of a sweep or a run'):
        state.read_sweep_states(tmp_path)


def test_damaged_files_of_a_member_cost_nothing_but_what_they_say(tmp_path):
    sweep_file, runs = (
        write_sweep(tmp_path, [{'model.site': s} for s in ('none', 'both')]),
        tmp_path / 'runs',
    )
    sweep.load(sweep_file, runs)
    path = runs / 'site=none'
    commands = {path: count_command(path, steps=3)}
    assert local.submit(commands, ONE) == {path: 'done'}
    expected = state.read_member_state(path, 'loss')
    for name in ('timing.jsonl', 'metrics.jsonl'):
        with open(path / name, 'ab') as file:  # not JSON, no object, wrong fields, unfinished
            file.write(b'{"step": 9, \xff}\n[9]\n{"loss": 9.0}\n{"step": "9"}\n{"step": 9, "lo')
    assert state.read_member_state(path, 'loss') == expected
    assert records.read_curve(path, 'loss', 'train') == {1: 1.0, 2: 0.5, 3: 1 / 3}
    for damaged in (b'', b'[1]', b'\xff\xfe', b'{"state": ', b'{"step": null}', b'7'):
        (path / 'status.json').write_bytes(damaged)
        (path / 'cost.json').write_bytes(damaged)
        member = state.read_member_state(path)
        assert (member.phase, member.step) == ('waiting', 3)
        assert not state.is_finished(path)
    (path / 'launched').write_bytes(b'[1]')
    assert process.read_slot(path) == -1
    for damaged in (b'', b'[1]', b'\xff\xfe', b'{"metric": "loss"}', b'{"members": [{}]}'):
        (runs / 'sweep.json').write_bytes(damaged)
        for reads in (lambda: state.read_sweep_states(runs), lambda: sweep.load(sweep_file, runs)):
            with pytest.raises(UserError, match=r'(?i)restore (it|the file), or use another'):
                reads()


@pytest.mark.slow
def test_a_failing_member_is_named_and_the_others_finish(tmp_path, texts):
    common = {'data.source': texts, 'train.steps': 10}
    overrides = [
        common | {'model.fusion.name': 'concat', 'optim.learning_rate': 1e-3},
        common | {'model.fusion.name': 'mi', 'optim.learning_rate': -1.0},
        common | {'model.fusion.name': 'film', 'optim.learning_rate': 1e-3},
    ]
    file, runs = write_sweep(tmp_path, overrides, 'concat, 0.001'), tmp_path / 'runs'
    result = subprocess.run(
        launch_command(file, runs, '--parallel=2'), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert '1 of 3 members failed: fusion=mi' in result.stderr
    assert 'config.optim.learning_rate = -1.0: expected a finite number above 0' in result.stderr
    good = [p for p in runs.iterdir() if p.is_dir() and 'mi' not in p.name and p.name != 'report']
    assert len(good) == 2 and all(read_status(p)['state'] == 'done' for p in good)
    assert (runs / 'report/report.html').exists()

    old_statuses = {p: (p / 'status.json').read_bytes() for p in good}
    second = subprocess.run(launch_command(file, runs), capture_output=True, text=True)
    assert second.returncode == 1
    assert {
        p: (p / 'status.json').read_bytes() for p in good
    } == old_statuses  # skipped, not run again


@pytest.mark.slow
def test_a_stopped_sweep_saves_and_goes_on(tmp_path, texts):
    rarely = {'train.steps': 1500, 'train.save_every': 500, 'train.eval_every': 1500}
    overrides = [
        {'data.source': texts, 'model.site': site, 'train.log_every': 50} | rarely
        for site in ('none', 'both')
    ]
    file, runs = write_sweep(tmp_path, overrides), tmp_path / 'runs'
    process = subprocess.Popen(launch_command(file, runs), stderr=subprocess.DEVNULL)
    first = runs / 'site=none'
    while not (first / 'metrics.jsonl').exists() or not (first / 'metrics.jsonl').stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 143
    assert read_status(first)['state'] == 'preempted'
    assert not (runs / 'site=both').exists()
    result = subprocess.run(launch_command(file, runs), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {read_status(runs / f'site={s}')['state'] for s in ('none', 'both')} == {'done'}


@pytest.mark.slow
def test_a_member_of_two_processes_of_which_one_is_killed_is_tried_again(tmp_path):
    """The other process cannot continue without it and ends within seconds."""
    path = tmp_path / 'run'
    command = [sys.executable, '-m', 'mi.main', '--config=configs/rl.py:tiny,env=catch']
    command += ['--config.train.steps=2000', f'--workdir={path}']
    took = []

    def kill_one():
        while not list(path.glob('checkpoints/0*')):
            time.sleep(0.05)
        pids = [read_status(path, name)['pid'] for name in ('status.json', 'status.1.json')]
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        while (
            pathlib.Path(f'/proc/{pids[0]}/stat').exists() and read_status(path)['pid'] == pids[0]
        ):
            time.sleep(0.05)
        took.append(time.monotonic() - began)

    killer = threading.Thread(target=kill_one)
    killer.start()
    states = local.submit({path: command}, engine.Resources(processes=2, retries=1))
    killer.join()
    assert states == {path: 'done'}
    assert read_status(path)['state'] == read_status(path, 'status.1.json')['state'] == 'done'
    assert took[0] < 60
    lines = (path / 'metrics.jsonl').read_text().splitlines()
    steps = [r['step'] for r in map(json.loads, lines) if r['split'] == 'train']
    assert steps == list(range(5, 51, 5))
