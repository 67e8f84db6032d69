"""Sweep files, and commands of small members, for the tests of the launchers."""

import json
import pathlib
import sys

MEMBER = str(pathlib.Path(__file__).with_name('member.py'))
SWEEP = """
from launch.sweep import product
CONFIG = 'configs/lm.py:tiny'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', {baseline!r}, []
def sweep():
    return {overrides!r}
"""


def write_sweep(folder, overrides, baseline=None):
    """Write a sweep file; return its path."""
    file = folder / 'a_sweep.py'
    file.write_text(SWEEP.format(overrides=overrides, baseline=baseline))
    return str(file)


def count_command(path, **options):
    """Return a command that counts to --steps in a run directory; see tests/launch/member.py."""
    flags = [f'--{name}={value}' for name, value in options.items()]
    return [sys.executable, MEMBER, f'--workdir={path}', *flags]


def read_status(path, name='status.json'):
    return json.loads((path / name).read_text())
