import json
import signal
import subprocess
import sys
import time

import pytest

from launch import sweep
from mi.config import UserError

SWEEP = """
from launch.sweep import product
CONFIG = 'configs/lm.py:tiny'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', {baseline!r}, []
def sweep():
    return {overrides!r}
"""


def write(tmp_path, overrides, baseline=None):
    file = tmp_path / 'a_sweep.py'
    file.write_text(SWEEP.format(overrides=overrides, baseline=baseline))
    return str(file)


def launch(file, workdir, *more):
    return [sys.executable, '-m', 'launch.local', f'--sweep={file}', f'--workdir={workdir}', *more]


def status(path):
    return json.loads((path / 'status.json').read_text())


def test_members_are_named_by_what_differs(tmp_path):
    overrides = sweep.product(
        **{
            'model.fusion.name': ['concat', 'mi'],
            'model.site': ['encoder', 'both'],
            'seeds': [(0, 1)],
        }
    )
    members = sweep.load(write(tmp_path, overrides), tmp_path / 'runs')
    assert [m.name for m in members] == [
        'fusion=concat,site=encoder', 'fusion=concat,site=both',
        'fusion=mi,site=encoder', 'fusion=mi,site=both',
    ]  # fmt: skip
    assert members[3].label == 'mi, both'
    assert '--config.seeds=(0, 1)' in members[3].command
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert [m['label'] for m in record['members']] == [m.label for m in members]


def test_runs_of_a_task_each_are_one_arm(tmp_path):
    overrides = sweep.product(**{'model.site': ['none', 'both'], 'data.source': ['a', 'b']})
    file = write(tmp_path, overrides)
    with open(file, 'a') as more:
        more.write("TASK = 'data.source'\n")
    members = sweep.load(file, tmp_path / 'runs')
    assert [m.label for m in members] == ['none', 'none', 'both', 'both']
    assert len({m.name for m in members}) == 4
    record = json.loads((tmp_path / 'runs/sweep.json').read_text())
    assert [m['task'] for m in record['members']] == ['a', 'b', 'a', 'b']


def test_helpers_make_the_members_they_say():
    widths = sweep.zip_(**{'model.width': [64, 128], 'optim.learning_rate': [0.1, 0.03]})
    assert widths == [
        {'model.width': 64, 'optim.learning_rate': 0.1},
        {'model.width': 128, 'optim.learning_rate': 0.03},
    ]
    both = sweep.product(widths, seeds=[(0,), (1,)])
    assert [(m['model.width'], m['seeds']) for m in both] == [
        (64, (0,)), (64, (1,)), (128, (0,)), (128, (1,)),
    ]  # fmt: skip
    first = sweep.product(seeds=[(0,)], **{'model.width': [64]})
    assert sweep.chain(first, widths, first) == [*first, *widths]
    with pytest.raises(UserError, match=r'model\.width 2, seeds 1'):
        sweep.zip_(**{'model.width': [1, 2], 'seeds': [(0,)]})
    with pytest.raises(UserError, match=r'two of its sweeps set model\.width, optim'):
        sweep.product(widths, widths)


def test_another_sweep_in_the_same_directory_is_refused(tmp_path):
    sweep.load(write(tmp_path, [{'model.site': 'none'}]), tmp_path / 'runs')
    with pytest.raises(UserError, match='holds another sweep'):
        sweep.load(write(tmp_path, [{'model.site': 'both'}]), tmp_path / 'runs')


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match='no such file'):
        sweep.load(str(tmp_path / 'none.py'), tmp_path / 'runs')
    (tmp_path / 'empty.py').write_text('')
    with pytest.raises(UserError, match='does not define CONFIG'):
        sweep.load(str(tmp_path / 'empty.py'), tmp_path / 'runs')
    with pytest.raises(UserError, match='the same overrides'):
        sweep.load(write(tmp_path, [{'model.site': 'none'}] * 2), tmp_path / 'runs')


@pytest.mark.slow
def test_a_failing_member_is_named_and_the_others_finish(tmp_path, texts):
    common = {'data.source': texts, 'train.steps': 10}
    overrides = [
        common | {'model.fusion.name': 'concat', 'optim.learning_rate': 1e-3},
        common | {'model.fusion.name': 'mi', 'optim.learning_rate': -1.0},
        common | {'model.fusion.name': 'film', 'optim.learning_rate': 1e-3},
    ]
    file, runs = write(tmp_path, overrides, 'concat, 0.001'), tmp_path / 'runs'
    done = subprocess.run(launch(file, runs, '--parallel=2'), capture_output=True, text=True)
    assert done.returncode == 1
    assert '1 of 3 members failed: fusion=mi' in done.stderr
    assert 'config.optim.learning_rate = -1.0: expected a finite number above 0' in done.stderr
    good = [p for p in runs.iterdir() if p.is_dir() and 'mi' not in p.name and p.name != 'report']
    assert len(good) == 2 and all(status(p)['state'] == 'done' for p in good)
    assert (runs / 'report/report.html').exists()

    before = {p: (p / 'status.json').read_bytes() for p in good}
    again = subprocess.run(launch(file, runs), capture_output=True, text=True)
    assert again.returncode == 1
    assert {p: (p / 'status.json').read_bytes() for p in good} == before  # skipped, not run again


@pytest.mark.slow
def test_a_stopped_sweep_saves_and_goes_on(tmp_path, texts):
    rarely = {'train.steps': 4000, 'train.save_every': 1000, 'train.eval_every': 4000}
    overrides = [
        {'data.source': texts, 'model.site': site, 'train.log_every': 50} | rarely
        for site in ('none', 'both')
    ]
    file, runs = write(tmp_path, overrides), tmp_path / 'runs'
    process = subprocess.Popen(launch(file, runs), stderr=subprocess.DEVNULL)
    first = runs / 'site=none'
    while not (first / 'metrics.jsonl').exists() or not (first / 'metrics.jsonl').stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 143
    assert status(first)['state'] == 'preempted'
    assert not (runs / 'site=both').exists()
    done = subprocess.run(launch(file, runs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {status(runs / f'site={s}')['state'] for s in ('none', 'both')} == {'done'}


def test_a_sweep_may_draw_figures_of_its_own(tmp_path):
    file = tmp_path / 'drawn.py'
    draws = "def report(workdir, out):\n    (out / 'own.txt').write_text(workdir.name)\n"
    file.write_text(SWEEP.format(overrides=[{'model.site': 'none'}], baseline=None) + draws)
    (tmp_path / 'runs/report').mkdir(parents=True)
    sweep.report(str(file), tmp_path / 'runs')
    assert (tmp_path / 'runs/report/own.txt').read_text() == 'runs'
    sweep.report(write(tmp_path, [{'model.site': 'none'}]), tmp_path / 'runs')  # draws nothing
