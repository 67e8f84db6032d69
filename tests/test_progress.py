"""Reports of long work. Its interval is made short here, so that all work is long."""

import json
import threading
import time

import pytest

from configs import rl as rl_configs
from experiments.expressivity import config as expressivity
from mi.estimate import cli
from mi.fit import search
from mi.fit import train as fit
from mi.rl import train as rl
from mi.training import progress
from tests.conftest import ROOT


@pytest.fixture
def short_interval(monkeypatch):
    monkeypatch.setattr(progress, 'INTERVAL', 1e-3)


def changed(config, **changes):
    config.unlock().update_from_flattened_dict(changes)
    return config.lock()


@pytest.mark.parametrize(
    'done, seconds, line',
    [
        (0, 20, 'reading … 20 s so far'),
        (3e8, 20, 'reading … 300 of 1,200 MB, 15.0 MB/s, 00:01:00 left'),
        (12e8, 90, 'reading … 90 s so far'),  # what comes after the last of it is not known
    ],
)
def test_a_line_has_what_is_known_of_the_work(done, seconds, line):
    work = progress.Work('reading', 12e8, 'MB', 1e6)
    work.done = done
    assert work.line(seconds) == line


def test_lines_come_while_the_work_is_inside_one_call_and_end_with_it(capsys, short_interval):
    reports = threading.Event()
    with progress.Work('compiling') as work:
        line = work.line
        work.line = lambda seconds: reports.set() or line(seconds)
        assert reports.wait(60)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == 'compiling … 0 s so far' and last == 'compiling: took 0 s'
    assert not work._thread.is_alive()


def test_short_work_is_silent(capsys):
    with progress.Work('compiling'):
        pass
    assert list(progress.track([1, 2], 'reading', 2, 'lines')) == [1, 2]
    assert capsys.readouterr() == ('', '')


def test_work_that_fails_ends_its_report():
    with pytest.raises(ZeroDivisionError), progress.Work('dividing') as work:
        _ = 1 / 0
    assert not work._thread.is_alive()


def test_fits_and_searches_say_that_they_compile(tmp_path, capsys, short_interval, monkeypatch):
    small = {'train.steps': 4, 'train.log_every': 2, 'train.eval_every': 2, 'train.save_every': 4,
             'problem.examples': 64, 'seeds': (0,)}  # fmt: skip
    fit.train(changed(expressivity.get_config('fit'), **small), str(tmp_path / 'fit'))
    assert 'compiling 2 training steps … ' in capsys.readouterr().err
    small |= {'search.at': (1,), 'search.parameters': 30}
    reached = [{'width': 1, 'parameters': 5, 'mse': 0.0, 'learning_rate': 0.1}]
    monkeypatch.setattr(search, 'probe', lambda *_: time.sleep(0.05) or reached)
    search.search(changed(expressivity.get_config(), **small), str(tmp_path / 'search'))
    said = capsys.readouterr().err
    assert 'sizing the networks of problem.dimension 1 … ' in said
    assert 'training problem.dimension 1, width 1 … ' in said


@pytest.mark.slow
@pytest.mark.parametrize(
    'topology, said',
    [
        ('fused', ['compiling 5 updates … ', 'evaluating eval … ']),
        ('threads', ['waiting for the first trajectories … ', 'compiling the update … ']),
    ],
)
def test_agents_say_that_they_compile(topology, said, tmp_path, capsys, short_interval):
    config = rl_configs.get_config('tiny,env=catch')
    rl.train(changed(config, **{'train.topology': topology, 'train.steps': 200}), str(tmp_path))
    reported = capsys.readouterr().err
    assert [line for line in said if line not in reported] == []


def test_costs_say_what_takes_long_and_leave_stdout_to_the_result(capsys, short_interval):
    cli.main(['cost', f'--config={ROOT}/configs/lm.py:tiny', '--json', '--nocompile'])
    out, err = capsys.readouterr()
    assert 'counting the FLOPs of a training step … ' in err and json.loads(out)['steps'] == 20
