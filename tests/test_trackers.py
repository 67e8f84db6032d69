"""Trackers for real, without a network, each in a process of its own; skipped where absent."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from mi.config import suggest_install
from mi.training import trackers
from tests.conftest import ROOT


def train(workdir, tracker, environment):
    """Fits a small function for ten steps, in records of five; returns the numbers it recorded."""
    changes = {'tracker': tracker, 'train.steps': 10, 'seeds': (0, 1), 'problem.examples': 64}
    changes |= {f'train.{name}_every': 5 for name in ('log', 'eval', 'save')}
    command = [sys.executable, '-m', 'mi.main', '--config=experiments/expressivity/config.py:fit']
    command += [f'--config.{key}={value}' for key, value in changes.items()]
    done = subprocess.run(
        [*command, f'--workdir={workdir}'],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert {r['step'] for r in records} == {5, 10}
    return {
        (r['step'], f'{r["split"]}/{name}/seed{r["seed"]}'): value
        for r in records
        for name, value in r.items()
        if name not in ('step', 'seed', 'split')
    }


def needs(package):
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f'{package} is not installed: the extra {package}')


@pytest.mark.slow
@needs('wandb')
def test_wandb_gets_every_number_and_respects_offline_mode(tmp_path):
    recorded = train(tmp_path / 'run', 'wandb', {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'})
    id = json.loads((tmp_path / 'run/tracker.json').read_text())['id']
    [file] = (tmp_path / 'run/wandb').glob('offline-run-*/*.wandb')
    assert file.name == f'run-{id}.wandb'
    content = file.read_bytes()  # names and numbers stand in it as JSON
    for (_, name), value in recorded.items():
        assert name.encode() in content and json.dumps(value).encode() in content
    assert b'timing/seconds' in content


@pytest.mark.slow
@needs('trackio')
def test_trackio_gets_every_number_at_its_step(tmp_path):
    recorded = train(tmp_path / 'run', 'trackio', {'TRACKIO_DIR': str(tmp_path / 'trackio')})
    id = json.loads((tmp_path / 'run/tracker.json').read_text())['id']
    with sqlite3.connect(tmp_path / 'trackio' / 'mi.db') as database:
        rows = database.execute('SELECT run_name, step, metrics FROM metrics').fetchall()
    found = {(step, name): v for _, step, text in rows for name, v in json.loads(text).items()}
    assert {run for run, *_ in rows} == {f'run-{id}'}
    assert recorded.items() <= found.items()
    assert (10, 'timing/seconds') in found


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not there
    assert suggest_install('wandb') in trackers.check_tracker('wandb')
    assert "did you mean 'trackio'" in trackers.check_tracker('tracio')
    assert trackers.check_tracker('none') == ''
    assert trackers.start_tracker('none', ROOT, {}) is None


def test_a_tracker_that_did_not_start_has_no_records(tmp_path, monkeypatch):
    def refuse(path, id, config, continued):
        raise OSError('not logged in')

    monkeypatch.setitem(trackers.TRACKERS, 'wandb', refuse)
    with pytest.raises(OSError, match='not logged in'):
        trackers.start_tracker('wandb', tmp_path, {})
    monkeypatch.setitem(trackers.TRACKERS, 'wandb', lambda *arguments: arguments)
    assert trackers.start_tracker('wandb', tmp_path, {})[3] is False
    assert trackers.start_tracker('wandb', tmp_path, {})[3] is True


def test_a_tracker_knows_whether_it_was_told_what_came_before(tmp_path, monkeypatch):
    started = []

    def make(path, id, config, continued):
        started.append((id, continued))

    monkeypatch.setitem(trackers.TRACKERS, 'wandb', make)
    monkeypatch.setitem(trackers.TRACKERS, 'trackio', make)
    for word in ('wandb', 'wandb', 'trackio', 'trackio'):
        trackers.start_tracker(word, tmp_path, {})
    assert [continued for _, continued in started] == [False, True, False, True]
    assert len({id for id, _ in started}) == 1
    (tmp_path / 'tracker.json').write_text('{"id": "a1"}')  # of a run before names were kept
    trackers.start_tracker('wandb', tmp_path, {})
    assert started[-1] == ('a1', True)
