"""Which devices would be idle is said before anything starts, and what is compiled for them."""

import subprocess
import sys
import types

import pytest

from configs import lm, rl
from experiments.expressivity import config as expressivity
from launch import devices, k8s, local, slurm, sweep
from launch.devices import Devices
from launch.engine import Resources
from tests.fit.runs import edited

SWEEP = """
from launch.sweep import product
CONFIG = 'configs/lm.py:tiny'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', None, []
def sweep():
    return product(**{'train.batch': [6, 8], 'model.fusion.name': ['concat', 'mi']})
"""


def language(**changes):
    return edited(lm.get_config('tiny'), **changes)


@pytest.mark.parametrize(
    'batch, seeds, count, idle',
    [
        (8, 1, 8, 0),
        (6, 1, 8, 2),
        (6, 8, 8, 0),
        (6, 4, 8, 0),
        (1, 1, 4, 3),
        (1, 3, 4, 1),
        (64, 3, 8, 0),
    ],
)
def test_devices_that_neither_seeds_nor_rows_reach_are_idle(batch, seeds, count, idle):
    config = language(**{'train.batch': batch, 'seeds': tuple(range(seeds))})
    warning = devices.describe_waste(config, Devices(count))
    assert warning.startswith(f'{idle} of {count} devices will be idle') if idle else warning == ''
    if idle:
        config.train.batch = int(warning.rpartition('config.train.batch = ')[2])
        assert devices.describe_waste(config, Devices(count)) == ''  # what it says helps


def test_the_remedy_fits_the_cause():
    """A given mesh, or shares of the parameters that do not divide the devices, limit the batch."""
    mesh = language(**{'train.batch': 32, 'train.mesh': (1, 2, 1)})
    assert devices.describe_waste(mesh, Devices(8)).startswith('6 of 8 devices will be idle')
    assert 'Try config.train.mesh = ()' in devices.describe_waste(mesh, Devices(8))
    mesh.train.mesh = ()
    assert devices.describe_waste(mesh, Devices(8)) == ''

    shares = language(**{'train.batch': 30, 'train.fsdp': 3})
    assert devices.describe_waste(shares, Devices(8)).endswith('Try config.train.fsdp = 1')


def test_several_processes_refuse_what_leaves_one_of_them_idle():
    warning = devices.describe_waste(language(**{'train.batch': 6}), Devices(8, processes=2))
    assert warning.startswith('each member will fail, because 2 of 8 devices would be idle')
    warning = devices.describe_waste(language(**{'train.batch': 6, 'train.fsdp': 4}), Devices(8))
    assert warning.startswith('each member will fail on 8 devices: config.train.fsdp = 4')


def test_a_learner_apart_from_its_actors_divides_rows_alone():
    config = edited(rl.get_config('tiny,env=catch'), **{'train.batch': 6, 'seeds': (0, 1, 2, 3)})
    assert devices.describe_waste(config, Devices(8)) == ''
    config.train.topology = 'threads'
    assert devices.describe_waste(config, Devices(8)).startswith('2 of 8')


@pytest.mark.parametrize(
    'task, seeds, count, processes, expected',
    [
        ('fit', 8, 8, 1, ''),
        ('fit', 3, 8, 1, '5 of 8 devices will be idle'),
        ('fit', 9, 8, 1, '3 of 8 devices will be idle'),  # five with two each
        ('fit', 3, 8, 2, '5 of 8 places will repeat the work of others'),
        ('search', 8, 8, 2, ''),  # with three rates each
        ('search', 3, 8, 1, '3 of 8 devices will be idle'),
    ],
)
def test_fit_problems_divide_seeds_and_rates(task, seeds, count, processes, expected):
    config = edited(expressivity.get_config(task), seeds=tuple(range(seeds)))
    warning = devices.describe_waste(config, Devices(count, processes))
    assert warning.startswith(expected) and bool(warning) == bool(expected)


def test_members_with_the_same_fault_share_a_line(tmp_path):
    (tmp_path / 'a_sweep.py').write_text(SWEEP)
    members = sweep.load(str(tmp_path / 'a_sweep.py'), tmp_path / 'runs', 'local', dry=True)
    (line,) = devices.find_warnings(members, Devices(8))
    assert line.startswith('2 of 8 devices will be idle')
    assert line.endswith('(batch=6,fusion=concat, batch=6,fusion=mi)')
    assert (
        devices.find_warnings(members, Devices(1))
        == devices.find_warnings(members, Devices(2))
        == []
    )


def test_every_engine_knows_the_devices_of_a_member(monkeypatch):
    resources = Resources(processes=2, gpus=4)
    assert local.find_devices(resources) == Devices(8, 2)
    for gres, count in (('', 8), ('gpu:a100:4', 0)):  # Slurm decides how many nodes there are
        monkeypatch.setattr(slurm, 'GRES', types.SimpleNamespace(value=gres))
        assert slurm.find_devices(resources) == Devices(count, 2)
    assert slurm.find_devices(Resources()) == Devices(4)
    monkeypatch.setattr(local, 'find_gpus', lambda: ['0', '1', '2'])
    assert local.find_devices(Resources()) == Devices(3)
    options = k8s.Options(tpu='tpu-v5-lite-podslice', topology='4x4')
    monkeypatch.setattr(k8s, 'get_options', lambda: options)
    assert k8s.find_devices(Resources()) == Devices(16, 4, 'v5e:4x4')


@pytest.mark.slow
def test_a_check_needs_a_dry_run_and_a_number_of_devices(tmp_path):
    result = launch(tmp_path, 'local', '--check')
    assert result.returncode == 1 and '--check: expected --dry_run too' in result.stderr
    result = launch(tmp_path, 'slurm', '--check', '--dry_run', '--gres=gpu:4', '--processes=2')
    assert result.returncode == 1 and '--check: expected a known number of devices' in result.stderr


@pytest.mark.slow
def test_a_check_compiles_the_dearest_member_for_its_devices(tmp_path):
    result = launch(tmp_path, 'local', '--check', '--dry_run', '--processes=2', '--gpus=2')
    assert result.returncode == 0, result.stderr
    listed, _, checked = result.stdout.partition('check: ')
    assert 'all of it' in listed
    assert checked.startswith('batch=8,fusion=mi\npython -m mi.estimate ')
    assert '1/4 = 0.250 is ideal' in checked
    assert 'warning: each member will fail, because 1 of 4 devices would be idle' in result.stderr


def launch(folder, engine, *more):
    (folder / 'a_sweep.py').write_text(SWEEP)
    command = [sys.executable, '-m', f'launch.{engine}', f'--sweep={folder / "a_sweep.py"}']
    return subprocess.run(
        [*command, f'--workdir={folder / "runs"}', *more], capture_output=True, text=True
    )
