"""How a sweep looks from outside: what is read of it, how often, and what is shown first."""

import fcntl
import io
import itertools
import json
import os
import pathlib
import subprocess
import time

import pytest
import rich.console

from launch import records, state, table, watch
from mi.training import run_state
from mi.training.lock import is_locked


def record(step, split='train', **values):
    return json.dumps({'step': step, 'seed': 0, 'split': split, **values}) + '\n'


def make(path, phase, step=0, **metric):
    path.mkdir(parents=True)
    status = {'state': phase, 'step': step, 'reason': 'no disk' if phase == 'failed' else None}
    (path / 'status.json').write_text(json.dumps(status))
    (path / 'cost.json').write_text('{"steps": 100}')
    timing = {'step': step, 'seconds': 1.0, 'steps_per_second': 3.0}
    (path / 'timing.jsonl').write_text(json.dumps(timing) + '\n')
    (path / 'metrics.jsonl').write_text(record(step, **metric) if metric else '')


class Held:
    """The lock of a run, in another process as a run has it."""

    def __init__(self, lock):
        self._process = subprocess.Popen(['flock', '--no-fork', str(lock), 'sleep', '600'])
        deadline = time.monotonic() + 60
        while not (lock.exists() and is_locked(lock)):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.kill()
        self._process.wait()


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened, by name, as long as the test runs."""
    file_names = []

    def counting(function):
        def opens(file, *args, **options):
            file_names.append(pathlib.Path(os.fspath(file)).name)
            return function(file, *args, **options)

        return opens

    monkeypatch.setattr(io, 'open', counting(io.open))  # pathlib's
    monkeypatch.setattr('builtins.open', counting(open))
    return file_names


def test_what_has_not_changed_is_not_read_again(tmp_path, opened):
    """Of 1,000 members one runs; later reads only read what it has added."""
    finished = [tmp_path / f'done {i}' for i in range(200)]
    for path in finished:
        make(path, 'done', 100, loss=0.5)
    waiting = [tmp_path / f'waiting {i}' for i in range(799)]
    path = tmp_path / 'runs'
    make(path, 'running', 10, loss=2.0)
    reader, paths = state.StateReader('loss'), [*finished, *waiting, path]
    with Held(path / 'lock'):
        opened.clear()
        first = {p: reader.read(p) for p in paths}
        assert len(opened) > 4 * len(finished)  # they were read, once
        for _ in range(3):
            opened.clear()
            assert {p: reader.read(p) for p in paths} == first
            assert opened == ['lock']  # to see whether it still runs
        with open(path / 'metrics.jsonl', 'a') as file:
            file.write(record(20, loss=1.0) + '{"step": 30')
        (path / 'timing.jsonl').write_text('{"step": 20, "seconds": 2.0, "steps_per_second": 5}\n')
        opened.clear()
        member = reader.read(path)
        assert (member.phase, member.step, member.metric) == ('running', 20, 'loss 1 (train)')
        assert sorted(opened) == ['lock', 'metrics.jsonl', 'timing.jsonl']
        assert member == state.read_member_state(path, 'loss')
    (path / 'status.json').write_text('{"state": "done", "step": 100}')
    assert reader.read(path).phase == 'done'
    opened.clear()
    assert reader.read(path).phase == 'done' and opened == []


def test_those_who_ask_at_once_do_not_see_each_other(tmp_path):
    """A process that only tests the lock does not count as a run."""
    lock = tmp_path / 'lock'
    with open(lock, 'w') as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        assert not is_locked(lock)
        fcntl.flock(another, fcntl.LOCK_EX)
        assert is_locked(lock)
    assert not is_locked(lock) and not is_locked(tmp_path / 'none')


def test_the_time_left_is_by_the_pace_of_the_last_record(tmp_path):
    path = tmp_path / 'a'
    make(path, 'running')
    timing = [{'step': 10, 'seconds': 90.0}, {'step': 30, 'seconds': 5.0, 'tokens_per_second': 1e4}]
    text = [json.dumps(record) + '\n' for record in timing]
    with Held(path / 'lock'):
        (path / 'timing.jsonl').write_text(text[0])
        assert (
            state.read_member_state(path).seconds_left == 90 * 90 / 10
        )  # the steps from the beginning
        (path / 'timing.jsonl').write_text(''.join(text))
        member = state.read_member_state(path)
        assert (member.step, member.num_steps, member.seconds_left) == (30, 100, 70 * 5 / 20)
        assert member.rate == '10,000 tokens/s'
    assert state.read_member_state(path).seconds_left is None  # it has died


def test_a_member_that_is_started_again_is_seen(tmp_path):
    """Only one that is done, or was stopped for good, stays so."""
    reader, path = state.StateReader(), tmp_path / 'a'
    assert reader.read(path).phase == 'waiting'
    for phase in ('failed', 'preempted'):
        if path.exists():
            (path / 'status.json').write_text(json.dumps({'state': phase, 'step': 7}))
        else:
            make(path, phase)
        assert reader.read(path).phase == phase
        with Held(path / 'launched'):
            assert reader.read(path).phase == 'running'
        assert reader.read(path).phase == phase
    (path / 'status.json').write_text('{"state": "running"}')
    assert reader.read(path).phase == 'died'
    (path / run_state.STOP_MARK).write_text('{"reason": "behind"}')
    assert reader.read(path)[0::6] == ('stopped', 'behind')


def test_records_that_a_checkpoint_takes_back_are_forgotten(tmp_path):
    """A run that resumes from step 10 has its later records cut off."""
    path = tmp_path / 'a'
    make(path, 'preempted', 10, loss=2.0)
    reader, curve = state.StateReader('loss'), records.CurveReader(path, 'loss', 'train')
    old_records = (path / 'metrics.jsonl').read_text()
    for step, loss in ((20, 1.0), (30, 0.5)):
        with open(path / 'metrics.jsonl', 'a') as file:
            file.write(record(step, loss=loss))
    assert reader.read(path).metric == 'loss 0.5 (train)' and curve.read() == {
        10: 2,
        20: 1,
        30: 0.5,
    }
    (path / 'metrics.jsonl').write_text(old_records)
    assert reader.read(path).metric == 'loss 2 (train)' and curve.read() == {10: 2}
    (path / 'metrics.jsonl').unlink()
    assert reader.read(path).metric == '' and curve.read() == {}


def test_a_metric_is_the_mean_over_seeds_however_far_back_it_is(tmp_path):
    path = tmp_path / 'a'
    make(path, 'running')
    reader = state.StateReader('success')
    evaluations = [
        record(10, split, success=value + more)
        for value in (0.25, 0.75)  # of each seed
        for split, more in (('eval_greedy', 0.125), ('eval', 0.0))
    ]
    (path / 'metrics.jsonl').write_text(''.join(evaluations))
    assert reader.read(path).metric == 'success 0.5 (eval)'
    with open(path / 'metrics.jsonl', 'a') as file:
        file.writelines(record(10 + i, loss=1.0, name='x' * 100) for i in range(1, 1000))
    assert (path / 'metrics.jsonl').stat().st_size > records.TAIL
    assert reader.read(path).metric == 'success 0.5 (eval)'


def test_another_metric_is_never_shown_as_if_it_were_the_one(tmp_path):
    """A typo in METRIC; and a run that has no value of it yet."""
    path = tmp_path / 'a'
    make(path, 'running', 10, nats=3.0)
    died = state.read_member_state(path, 'bits').metric
    assert died == 'no bits yet, nats 3 (train)'
    (path / 'status.json').write_text('{"state": "done", "step": 100}')
    assert state.read_member_state(path, 'bits').metric == 'no bits, nats 3 (train)'
    assert state.read_member_state(path).metric == 'nats 3 (train)'
    with open(path / 'metrics.jsonl', 'a') as file:
        file.write(record(20, 'valid', bits=None, nats=2.0))
    assert state.read_member_state(path, 'bits').metric == 'no bits, nats 2 (valid)'


STATES = {f'arm={i}': state.MemberState('done', 100, 100) for i in range(290)}
STATES |= {f'arm={i}': state.MemberState('waiting') for i in range(290, 297)}
STATES['arm=297'] = state.MemberState(
    'failed', 3, 100, reason='ValueError: no disk ' + 'and so on ' * 20
)
STATES['arm=298'] = state.MemberState(
    'running', 7, 100, '1,200 tokens/s', 75.0, 'loss 1.25 (train)'
)
STATES['arm=299'] = state.MemberState('died', 9, 100, reason='its process is gone')


def rendered(width, height, states, columns=table.COLUMNS):
    console = rich.console.Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None
    )
    console.print(table.FittedTable('2.0 min', states, columns), end='')
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize('width, height', [(80, 24), (200, 24), (80, 12), (60, 40), (120, 400)])
def test_running_and_failed_members_are_on_the_screen_whatever_its_height(width, height):
    lines = rendered(width, height, STATES)
    text = ' '.join(' '.join(lines).split())
    assert len(lines) <= height
    assert '1 running, 1 failed, 1 died, 7 waiting, 290 done' in text
    names = [line.split()[0] for line in lines if line.strip().startswith('arm=')]
    assert names[:3] == ['arm=298', 'arm=297', 'arm=299'][: len(names)] and len(names) >= 2
    assert len(set(names)) == len(names)
    if len(names) < len(STATES):
        more = len(STATES) - len(names)
        assert f'and {more} more: ' in text and text.endswith('done')
        assert height - len(lines) <= 3  # it is used
    else:
        assert height == 400 and ' more: ' not in text


def test_a_table_that_fits_is_shown_as_it_is():
    states = dict(list(STATES.items())[-3:])
    lines = rendered(200, 50, states)
    assert [line.split()[0] for line in lines if ' arm=' in line] == [
        'arm=298',
        'arm=297',
        'arm=299',
    ]
    assert ' more: ' not in ' '.join(lines)
    assert rendered(200, 1, states)  # a screen that is too small still has the counts


def test_a_screen_has_five_columns_and_a_reason_in_place_of_a_metric():
    """At 80 characters every row of these members is one line; a file has all seven columns."""
    running = state.MemberState('running', 7, 100, '12,345 tokens/s', 75.0, 'loss 1.25 (train)')
    failed = state.MemberState('failed', 3, 100, metric='loss 2 (train)', reason='ValueError: full')
    states = {'fusion=mi': running, 'fusion=film': failed}
    heading, columns, *rows = rendered(80, 24, states, table.SHORT_COLUMNS)
    assert heading.strip() == '2.0 min, 1 running, 1 failed'
    assert columns.split() == ['run', 'state', 'step', 'left', 'metric']
    assert [row.split() for row in rows] == [
        ['fusion=mi', 'running', '7/100', '00:01:15', 'loss', '1.25', '(train)'],
        ['fusion=film', 'failed', '3/100', 'ValueError:', 'full'],
    ]
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(table.build_table('runs', states))
    text = console.file.getvalue()
    assert '12,345 tokens/s' in text and 'loss 2 (train)' in text and 'ValueError: full' in text


@pytest.mark.parametrize('last_phase', ['done', 'failed'])
def test_the_table_of_a_terminal_gives_way_to_a_line_when_all_are_done(
    tmp_path, monkeypatch, last_phase
):
    screen = io.StringIO()
    console = rich.console.Console(
        file=screen, width=80, height=24, force_terminal=True, color_system=None
    )
    monkeypatch.setattr(watch.rich.console, 'Console', lambda stderr: console)
    run_dirs = [tmp_path / 'a', tmp_path / 'b']
    for run_dir, phase in zip(run_dirs, ('done', last_phase), strict=True):
        make(run_dir, phase, 10, nats=3.0)
    with watch.Watch(run_dirs):
        pass
    *_, after_last_table = screen.getvalue().split('metric')
    erased_lines = after_last_table.count('\x1b[2K')  # erase in line, ECMA-48
    if last_phase == 'done':
        assert erased_lines >= 4 and after_last_table.splitlines()[-1].endswith('0.0 min, 2 done')
    else:
        assert erased_lines == 0 and 'no disk' in after_last_table


def test_the_more_a_look_takes_the_fewer_there_are(tmp_path, monkeypatch):
    """A twentieth of the time at most, by a clock that a look moves on by 3 seconds."""
    clock, looks = [0.0], []
    monkeypatch.setattr(watch.time, 'monotonic', lambda: clock[0])
    path = tmp_path / 'a'
    display = watch.Watch([path])

    def rule(paths):
        looks.append(clock[0])
        clock[0] += 3.0

    for _ in range(2000):
        display.update(rule)
        clock[0] += 0.2
    assert len(looks) == pytest.approx(clock[0] / 63, abs=2)
    assert min(b - a for a, b in itertools.pairwise(looks)) >= 60.0
