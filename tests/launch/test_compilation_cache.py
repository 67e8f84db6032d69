"""Compiled programs that the members of a sweep share."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch import compilation_cache, engine, local
from mi.training import host
from tests.conftest import ROOT
from tests.launch.sweep_files import read_status

VARIABLES = (
    'JAX_COMPILATION_CACHE_DIR',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS',
    'TF_CPP_MIN_LOG_LEVEL',
)


@pytest.fixture(autouse=True)
def _without_the_cache_of_the_tests(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_members_share_a_directory_of_their_sweep_and_processor(tmp_path, monkeypatch):
    variables = compilation_cache.prepare(tmp_path, 1)
    assert variables == {
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compilation_cache' / host.hash_processor()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'TF_CPP_MIN_LOG_LEVEL': '3',
    }
    assert compilation_cache.prepare(tmp_path, 0) == {}
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')  # the user's
    monkeypatch.setenv('TF_CPP_MIN_LOG_LEVEL', '0')
    assert compilation_cache.prepare(tmp_path, 1) == variables | {
        VARIABLES[1]: '0.5',
        VARIABLES[2]: '0',
    }
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/elsewhere')
    assert compilation_cache.prepare(tmp_path, 1) == {}


def test_the_oldest_programs_are_deleted_above_the_size(tmp_path):
    directory = tmp_path / 'compilation_cache' / 'a_processor'
    directory.mkdir(parents=True)
    for age, name in enumerate(('newest', 'middle', 'oldest')):
        (directory / name).write_bytes(bytes(400_000))
        os.utime(directory / name, (1e9 - age, 1e9 - age))
    compilation_cache.prepare(tmp_path, 2)
    assert len(list(directory.iterdir())) == 3
    compilation_cache.prepare(tmp_path, 1)  # 1,048,576 bytes
    assert {file.name for file in directory.iterdir()} == {'newest', 'middle'}


@pytest.mark.parametrize('megabytes', [0, 1])
def test_the_processes_of_a_member_get_the_cache(tmp_path, megabytes):
    code = 'import os, sys; print(os.environ.get("JAX_COMPILATION_CACHE_DIR"), file=sys.stderr)'
    run_dir = tmp_path / 'member'
    local.submit(
        {run_dir: [sys.executable, '-c', code]},
        engine.Resources(processes=2, cache_megabytes=megabytes),
    )
    directory = tmp_path / 'compilation_cache' / host.hash_processor() if megabytes else None
    assert (run_dir / 'log.txt').read_text() == f'{directory}\n' * 2


# Counts what JAX compiles in a run of `mi.main`, by the events that it reports.
MEMBER = """
import collections, json, sys
import jax
from mi import main
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
try:
    main.run()
finally:  # it ends by SystemExit
    counts = {name: events[f'/jax/compilation_cache/cache_{name}'] for name in ('hits', 'misses')}
    print('counted', json.dumps(counts))
"""
SIZES = {
    'lm': {'train.steps': 4, 'train.log_every': 2, 'train.eval_every': 4, 'train.save_every': 4},
    'rl': {'train.steps': 80, 'train.log_every': 1, 'train.eval_every': 2, 'train.save_every': 2},
    'fit': {'train.steps': 4, 'train.log_every': 2, 'train.eval_every': 4, 'train.save_every': 4},
}
CONFIGS = {
    'lm': 'configs/lm.py:tiny',
    'rl': 'configs/rl.py:tiny',
    'fit': 'experiments/expressivity/config.py:fit',
}


def run_member(run_dir, task, megabytes, settings):
    """Run a member by the launcher; return its metrics, and how often it found a program."""
    overrides = [f'--config.{key}={value}' for key, value in (SIZES[task] | settings).items()]
    config = [f'--config={CONFIGS[task]}', f'--workdir={run_dir}']
    command = [sys.executable, '-c', MEMBER, *config, *overrides]
    states = local.submit({run_dir: command}, engine.Resources(cache_megabytes=megabytes))
    output = (run_dir / 'log.txt').read_text()
    assert states == {run_dir: 'done'}, output
    assert 'machine feature' not in output  # jaxlib 0.10, of programs that it has compiled itself
    counts = json.loads(output.split('counted')[1])
    return (run_dir / 'metrics.jsonl').read_bytes(), counts


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, other',
    [
        ('lm', {'optim.schedule': 'linear'}),
        ('rl', {'loss.entropy_cost': 0.02}),
        ('rl', {'train.topology': 'threads', 'loss.entropy_cost': 0.02}),
        ('fit', {'optim.schedule': 'constant'}),
    ],
)
def test_a_member_with_other_rates_and_seeds_compiles_next_to_nothing(
    tmp_path, texts, cache, task, other
):
    data = {'data.source': texts, 'data.cache': cache} if task == 'lm' else {}
    topology = {key: other[key] for key in other if key == 'train.topology'}
    first = {'optim.learning_rate': 1e-3, 'seeds': '(1,)', **data, **topology}
    second = {'optim.learning_rate': 5e-3, 'seeds': '(2,)', **data, **other}
    _, counts = run_member(tmp_path / 'first', task, 64, first)
    assert counts['misses'] > 5
    metrics, counts = run_member(tmp_path / 'second', task, 64, second)
    assert counts['misses'] <= 1 and counts['hits'] > 4  # its learning rates alone are new
    if 'train.topology' not in other:  # the actors' threads may answer in another order
        expected, counts = run_member(tmp_path / 'alone', task, 0, second)
        assert counts == {'hits': 0, 'misses': 0}
        assert metrics == expected


@pytest.mark.slow
def test_status_and_report_of_a_sweep_do_not_see_its_cache(tmp_path, texts, cache):
    sweep = tmp_path / 'a_sweep.py'
    overrides = SIZES['lm'] | {'data.source': texts, 'data.cache': cache}
    sweep.write_text(
        'from launch.sweep import product\n'
        "CONFIG = 'configs/lm.py:tiny'\n"
        "TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', None, []\n"
        'def sweep():\n'
        f"    return [{{**{overrides!r}, 'optim.learning_rate': rate}} for rate in (1e-3, 5e-3)]\n"
    )
    workdir = tmp_path / 'runs'
    arguments = [f'--sweep={sweep}', f'--workdir={workdir}']
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}

    def run(module, *arguments):
        command = [sys.executable, '-m', module, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout

    run('launch.local', *arguments)
    directory = workdir / 'compilation_cache'
    programs = {file.name for file in directory.rglob('*-cache')}
    assert len([name for name in programs if name.startswith('jit_update-')]) == 1
    member_dirs = [path for path in workdir.iterdir() if (path / 'status.json').exists()]
    assert len(member_dirs) == 2
    assert not any(list(path.rglob('*-cache')) for path in member_dirs)
    assert [read_status(path)['state'] for path in member_dirs] == ['done', 'done']
    assert 'compilation_cache' not in run('launch.status', f'--workdir={workdir}')
    report = run('mi.report', f'--workdir={workdir}')
    pages = [path.read_text() for path in pathlib.Path(workdir / 'report').rglob('*.html')]
    assert pages and not any('compilation_cache' in text for text in [report, *pages])
