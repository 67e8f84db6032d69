import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

from launch import asha, cli, records, state
from launch.asha import Arrival
from mi.config import UserError
from mi.training import run_state

MEMBER = str(pathlib.Path(__file__).with_name('member.py'))


def decide(values, factor=3, lower_is_better=True):
    """Return the members that continue after arriving at one rung in this order."""
    come, stay = [], []
    for i, value in enumerate(values):
        new = Arrival(10, str(i), value)
        if not asha.find_stop_reason(come, new, factor, lower_is_better):
            stay.append(value)
        come.append(new)
    return stay


def test_the_best_third_of_those_that_have_come_goes_on():
    assert asha.list_rungs(10, 3, 100) == [10, 30, 90] and asha.list_rungs(10, 3, 90) == [10, 30]
    # The first is the best of one; from six on two of them stay.
    assert decide([5, 6, 4, 7, 8, 4.5]) == [5, 4, 4.5]
    assert decide([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [1]
    assert decide([9, 8, 7, 6]) == [9, 8, 7, 6]  # each the best when it came
    assert decide([1, 2, 3], lower_is_better=False) == [1, 2, 3]
    assert decide([4, 1, 3, 2], factor=2) == [4, 1, 2]
    nan = float('nan')
    for lower in (True, False):  # the worst, and only the best of others like it
        assert decide([5, nan, 5, 5], lower_is_better=lower) == [5, 5, 5]
        assert str(decide([nan, nan, 5], lower_is_better=lower)) == '[nan, nan, 5]'
    new = Arrival(30, 'a', 9.0)
    assert not asha.find_stop_reason(
        [Arrival(10, 'b', 1.0), Arrival(10, 'c', 2.0)], new, 3, True
    )  # other rung


def test_decisions_are_all_read_again_however_many(tmp_path):
    """900 members come from the worst to the best, so that none was stopped when it came."""
    sweep = {'metric': 'loss', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    arrivals = [
        Arrival(10, f'a member with a name that is long, {i}', 1000.0 - i) for i in range(900)
    ]
    arrivals.append(Arrival(10, 'the last', 999.5))  # and is second to the worst
    text = ''.join(json.dumps(dataclasses.asdict(a)) + '\n' for a in arrivals)
    assert len(text) > records.TAIL
    (tmp_path / 'asha.jsonl').write_text(text)
    (tmp_path / 'the last').mkdir()
    asha.Asha(tmp_path, 10, 3)
    (stopped,) = tmp_path.glob(f'*/{run_state.STOP_MARK}')
    assert 'place 900 of 901' in json.loads(stopped.read_text())['reason']


def test_half_a_line_of_a_killed_launcher_is_cut_off(tmp_path):
    file, half = tmp_path / 'asha.jsonl', b'{"rung": 10, "na'
    first, second = ({'rung': 10, 'name': name, 'value': 1.0} for name in 'ab')
    file.write_bytes(json.dumps(first).encode() + b'\n' + half)
    records.append_record(file, second)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [first, second]

    sweep = {'metric': 'loss', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    file.write_bytes(b'{"rung": 10}\n' + half)
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/cost.json').write_text('{"steps": 20}')
    record = {'step': 10, 'split': 'train', 'loss': 2.0}
    (tmp_path / 'a/metrics.jsonl').write_text(json.dumps(record) + '\n')
    asha.Asha(tmp_path, 10, 3)([tmp_path / 'a'])
    assert file.read_bytes().splitlines()[1:] == [b'{"rung": 10, "name": "a", "value": 2.0}']
    asha.Asha(tmp_path, 10, 3)([tmp_path / 'a'])  # it is read again, and nothing decided twice
    assert len(file.read_bytes().splitlines()) == 2


def test_a_member_is_judged_by_its_value_at_the_rung_however_far_it_is(tmp_path):
    """Both are past the first rung at the comparison; the better one has become worse since.

    Between records the first one from the rung on counts.
    """
    sweep = {'metric': 'loss', 'curves': 'valid', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    curves = {'better': {8: 0.1, 12: 1.0, 16: 9.0, 31: 5.0}, 'worse': {8: 0.0, 12: 2.0, 16: 0.5}}
    for name, curve in curves.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'cost.json').write_text('{"steps": 80}')
        records = [{'step': s, 'split': 'valid', 'loss': v} for s, v in curve.items()]
        records.append({'step': 11, 'split': 'train', 'loss': 7.0})
        text = ''.join(json.dumps(record) + '\n' for record in records)
        (tmp_path / name / 'metrics.jsonl').write_text(text)
    rule = asha.Asha(tmp_path, 10, 3)
    assert 'no member was compared, because none recorded loss of the valid split' in rule.summary()
    rule([tmp_path / name for name in curves])
    decided = [json.loads(line) for line in (tmp_path / 'asha.jsonl').read_text().splitlines()]
    assert [(d['rung'], d['name'], d['value']) for d in decided] == [
        (10, 'better', 1.0), (30, 'better', 5.0), (10, 'worse', 2.0),
    ]  # fmt: skip
    assert not (tmp_path / 'better' / run_state.STOP_MARK).exists()
    reason = json.loads((tmp_path / 'worse' / run_state.STOP_MARK).read_text())['reason']
    assert reason == 'asha: 2 at step 10 is place 2 of 2, and 1 stay'
    assert rule.summary() == 'asha: 2 members were compared, 1 of them stopped'


def test_a_member_is_judged_by_all_of_its_seeds(tmp_path):
    """A run writes one record for each seed, and the rule may look between two of them."""
    sweep = {'metric': 'loss', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    path = tmp_path / 'a'
    path.mkdir()
    (path / 'cost.json').write_text('{"steps": 100}')
    (path / 'config.json').write_text('{"seeds": [5, 6]}')

    def add(step, seed, loss):
        with open(path / 'metrics.jsonl', 'a') as stream:
            record = {'step': step, 'seed': seed, 'split': 'train', 'loss': loss}
            stream.write(json.dumps(record) + '\n')

    rule = asha.Asha(tmp_path, 10, 3)
    add(10, 5, 3.0)
    rule([path])
    assert not (tmp_path / 'asha.jsonl').exists()
    add(10, 6, -3.0)
    rule([path])
    assert json.loads((tmp_path / 'asha.jsonl').read_text())['value'] == 0.0
    add(20, 5, None)  # it diverged
    add(20, 6, 1.0)
    assert math.isnan(records.read_curve(path, 'loss', 'train')[20])


def test_a_member_that_is_done_or_gone_is_not_stopped(tmp_path):
    sweep = {'metric': 'loss', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    arrivals = [{'rung': 10, 'name': name, 'value': float(i)} for i, name in enumerate('abcd')]
    text = ''.join(json.dumps(arrival) + '\n' for arrival in arrivals)
    (tmp_path / 'asha.jsonl').write_text(text)
    for name, phase in (('a', 'done'), ('b', 'running'), ('c', 'done')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'status.json').write_text(json.dumps({'state': phase}))
    rule = asha.Asha(tmp_path, 10, 3)
    marked = [name for name in 'abcd' if (tmp_path / name / run_state.STOP_MARK).exists()]
    assert marked == ['b']
    assert rule.summary() == 'asha: 4 members were compared, 1 of them stopped'


def test_only_what_was_added_to_a_curve_is_read(tmp_path, monkeypatch):
    """And nothing at all of a member that has come to every rung, or was stopped."""
    sweep = {'metric': 'loss', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    path = tmp_path / 'a'
    path.mkdir()
    (path / 'cost.json').write_text('{"steps": 100}')
    file, lines = path / 'metrics.jsonl', []

    def add(*steps, to=file):
        with open(to, 'a') as stream:
            for step in steps:
                record = {'step': step, 'split': 'train', 'loss': 1.0 / step}
                stream.write(json.dumps(record) + '\n')

    parse = records._parse
    monkeypatch.setattr(records, '_parse', lambda text: (lines.append(text), parse(text))[1])
    rule = asha.Asha(tmp_path, 10, 3)
    add(*range(1, 21))
    rule([path])
    lines.clear()
    for _ in range(3):
        rule([path])
    assert lines == []
    add(21, 22)
    rule([path])
    assert len(lines) == 2
    add(*range(23, 100))
    rule([path])
    lines.clear()
    add(100)
    rule([path])  # it has come to all rungs
    assert lines == [] and len((tmp_path / 'asha.jsonl').read_text().splitlines()) == 3
    file.unlink()  # it resumes from a checkpoint with another file
    add(1, 2, 3, to=file)
    assert records.read_curve(path, 'loss', 'train') == {1: 1.0, 2: 0.5, 3: 1 / 3}


def test_only_one_launcher_decides(tmp_path):
    refused = pytest.raises(UserError, match='another launcher controls this sweep')
    with cli.lock_sweep(tmp_path), refused, cli.lock_sweep(tmp_path):
        pass
    with cli.lock_sweep(tmp_path):  # again when the first has ended
        pass


@pytest.mark.slow
def test_members_that_are_behind_save_and_are_stopped_and_stay_so(tmp_path):
    """Nine members whose losses differ by a factor; on this machine, nine simultaneously."""
    launcher = (
        'import json, pathlib, sys\n'
        'from launch import asha, engine, local\n'
        'workdir = pathlib.Path(sys.argv[1])\n'
        'commands = {workdir / n: c for n, c in json.loads(sys.argv[2]).items()}\n'
        'rule = asha.Asha(workdir, 5, 3)\n'
        'states = local.submit(commands, engine.Resources(parallel=9), rule)\n'
        'print(json.dumps({path.name: word for path, word in states.items()}))\n'
    )
    sweep = {'metric': 'loss', 'curves': 'train', 'lower_is_better': True}
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    commands = {
        f'{i}': [
            sys.executable,
            MEMBER,
            f'--workdir={tmp_path / str(i)}',
            f'--scale={1 + i}',
            '--steps=80',
            '--seconds=0.1',
        ]
        for i in range(9)
    }
    command = [sys.executable, '-c', launcher, str(tmp_path), json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    states = json.loads(result.stdout)
    assert states['0'] == 'done' and 5 <= list(states.values()).count('stopped') <= 8
    stopped = [tmp_path / name for name, word in states.items() if word == 'stopped']
    assert all(state.read_member_state(path).step < 80 for path in stopped)
    assert all('place' in state.read_member_state(path).reason for path in stopped)

    arrivals = (tmp_path / 'asha.jsonl').read_text()
    second_result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(second_result.stdout) == states
    assert (tmp_path / 'asha.jsonl').read_text() == arrivals
