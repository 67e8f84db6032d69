"""The tool that puts faults into the code: on a small project with one good and one weak test."""

import subprocess

import pytest

from tools import mutate

FAULTS = """
[[fault]]
name = 'sum for difference'
file = 'code.py'
old = 'a - b'
new = 'a + b'
tests = ['tests/test_code.py', '-k', 'difference']

[[fault]]
name = 'nobody looks at zero'
file = 'code.py'
old = 'a == 0'
new = 'a == 1'
tests = ['tests/test_code.py', '-k', 'zero']

[[fault]]
name = 'no test is selected'
file = 'code.py'
old = 'a == 0'
new = 'a == 2'
tests = ['tests/test_code.py', '-k', 'absent']

[[fault]]
name = 'its test fails anyway'
file = 'code.py'
old = 'a == 0'
new = 'a == 3'
tests = ['tests/test_code.py::test_broken']
"""
CODE = 'def difference(a, b):\n    return a - b\n\n\ndef is_zero(a):\n    return a == 0\n'
TESTS = """
import code

def test_difference():
    assert difference(3, 1) == 2

def test_zero():
    is_zero(0)

def test_broken():
    assert False
"""


@pytest.fixture
def project(tmp_path):
    """A project under git with three tests, and the faults beside it."""
    root, faults = tmp_path / 'project', tmp_path / 'faults'
    (root / 'tests').mkdir(parents=True)
    faults.mkdir()
    (root / 'code.py').write_text(CODE)
    imports = 'import pathlib\nexec((pathlib.Path(__file__).parents[1] / "code.py").read_text())\n'
    (root / 'tests/test_code.py').write_text(TESTS.replace('import code\n', imports))
    (faults / 'area.toml').write_text(FAULTS)
    subprocess.run(['git', 'init', '-q', root], check=True)
    return root, faults


def test_each_fault_is_noticed_survives_or_is_invalid(project, tmp_path, capsys):
    root, faults = project
    results = tmp_path / 'results.json'
    options = [f'--root={root}', f'--faults={faults}', f'--results={results}', '--jobs=1']
    assert mutate.main(options) == 1
    printed = capsys.readouterr().out
    assert '| area | 4 | 1 | 1 | 2 |' in printed
    assert '- survived: area/nobody looks at zero (code.py)' in printed
    assert '- invalid: area/no test is selected' in printed
    assert '- invalid: area/its test fails anyway' in printed
    assert '1 of 4 noticed: 25.0 %' in printed
    assert (root / 'code.py').read_text() == CODE

    # A second run takes the results of the first, and asks for less.
    assert mutate.main([*options, '--least=25']) == 0
    assert 'sum for difference' not in capsys.readouterr().out


def test_faults_that_cannot_be_applied_are_named(project, capsys):
    root, faults = project
    (root / 'code.py').write_text(CODE.replace('a - b', '0 + a'))
    assert mutate.main([f'--root={root}', f'--faults={faults}', '--check']) == 2
    assert 'area/sum for difference: old text occurs 0 times in code.py' in capsys.readouterr().err


def test_every_fault_of_the_project_can_be_applied(capsys):
    """Code that moves would leave a fault behind, which then guards nothing."""
    assert mutate.main(['--check']) == 0, capsys.readouterr().err
