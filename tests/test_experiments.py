"""What experiments report of runs of known numbers, and of sweeps in which nothing has finished."""

import json

import pytest

from launch import sweep as sweeps
from tests.conftest import ROOT

FILES = sorted((ROOT / 'experiments').glob('*.py'))
DRAWN = [file for file in FILES if 'def report(' in file.read_text()]


@pytest.mark.parametrize('file', DRAWN, ids=lambda file: file.stem)
@pytest.mark.parametrize('state', [None, 'running'])
def test_a_sweep_in_which_nothing_has_finished_is_reported(file, state, tmp_path):
    """Before its first run has begun, and while all are under way."""
    members = sweeps.load(str(file), tmp_path)
    for member in members if state else []:
        run = tmp_path / member.name
        run.mkdir()
        seeds = member.overrides.get('seeds', (0, 1))
        (run / 'config.json').write_text(json.dumps({'seeds': seeds}))
        (run / 'status.json').write_text(json.dumps({'state': state}))
    out = tmp_path / 'report'
    out.mkdir()
    sweeps.report(str(file), tmp_path)
    for written in out.glob('*.md'):
        assert 'nan' not in written.read_text()
