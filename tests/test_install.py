"""What messages say to install: commands that work where they are read."""

import importlib.metadata
import shlex
import subprocess

import pytest

from mi import config
from tests.conftest import ROOT
from tools import extras

REQUIRES = ['jax>=0.10', 'gymnasium>=1.2; extra == "vizdoom"', "vizdoom>=1.3 ; extra == 'vizdoom'"]
REQUIRES += ['gymnasium>=1.2; extra == "gym"', 'jax[cuda13]; extra == "cuda"']


def test_in_a_clone_the_extra_is_installed_from_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert config.suggest_install('gym') == "pip install -e '.[gym]'"


def test_elsewhere_the_clone_is_named(monkeypatch, tmp_path):
    """Quoted, so that no shell takes the brackets for a pattern, or a space for an end."""
    monkeypatch.chdir(tmp_path)
    *pip, path = shlex.split(config.suggest_install('ray'))
    assert pip == ['pip', 'install', '-e'] and path == f'{ROOT.resolve()}[ray]'


@pytest.mark.parametrize(
    ('extra', 'command'),
    [
        ('vizdoom', "pip install 'gymnasium>=1.2' 'vizdoom>=1.3'"),
        ('cuda', "pip install 'jax[cuda13]'"),
    ],
)
def test_without_a_clone_the_packages_are_named(monkeypatch, tmp_path, extra, command):
    """The name of the project itself is on no index."""
    monkeypatch.setattr(config, '__file__', str(tmp_path / 'site-packages/mi/config.py'))
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: REQUIRES)
    assert config.suggest_install(extra) == command


def test_an_extra_that_includes_another_names_the_packages_of_both(monkeypatch, tmp_path):
    requires = [
        "multiplicative-interactions[gym,hub]; extra == 'all'",
        "jax>=0.10; extra == 'all'",
        "gymnasium>=1.2; extra == 'gym'",
        "multiplicative-interactions[gym]; extra == 'hub'",
        "datasets>=4.0; extra == 'hub'",
    ]
    monkeypatch.setattr(config, '__file__', str(tmp_path / 'site-packages/mi/config.py'))
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: requires)
    command = config.suggest_install('all')
    assert shlex.split(command)[2:] == ['gymnasium>=1.2', 'datasets>=4.0', 'jax>=0.10']


def test_modules_of_every_extra_are_imported_from_the_installation(monkeypatch):
    """Outside of the clone, whose modules Python would find first."""
    assert extras.MODULES.keys() == extras.read_extras().keys()
    calls = []

    def run(command, cwd, **options):
        calls.append((command, cwd))
        return subprocess.CompletedProcess(command, 0, '', '')

    monkeypatch.setattr(subprocess, 'run', run)
    assert extras.try_extra('uv', 'optuna', locked=True, dry=False)[1] == ''
    *installing, (importing, cwd) = calls
    assert importing[1:] == ['-c', 'import mi.layers, launch.optuna, optuna']
    assert {folder for _, folder in installing} == {ROOT} and ROOT not in (cwd, cwd.parent)


@pytest.mark.parametrize('argument', ['--only=sweep,rya', '--installers=pipx'])
def test_an_unknown_extra_or_installer_is_refused(argument, capsys):
    with pytest.raises(SystemExit, match='2'):
        extras.main([argument])
    assert 'is unknown; known: ' in capsys.readouterr().err
