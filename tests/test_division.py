"""Devices divide the work: FLOPs of products and communication of compiled programs."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests import division
from tests.conftest import ROOT, forced, printed_on_devices

SMALL = 64_000  # bytes of all reductions but those of gradients


def check_division(*cases):
    for case, rows in printed_on_devices(8, 'tests.division', *cases).items():
        one = rows.pop('1')
        assert one['sent'] == 0 and rows.keys() == {str(n) for n in division.COUNTS[case][1:]}
        for devices, row in rows.items():
            n = int(devices)
            assert 0.9 / n < row['flops'] / one['flops'] <= 1.05 / n, (case, n, row)
            check_communication(case, n, row)


def test_each_device_computes_its_share_and_sends_no_more_than_gradients():
    check_division(*division.FIRST)


# A process imports jax once for all of its cases.
@pytest.mark.slow
@pytest.mark.parametrize('cases', [division.OTHERS[first::7] for first in range(7)], ids=' '.join)
def test_each_device_computes_its_share_of_every_other_program(cases):
    check_division(*cases)


def check_communication(case, n, row):
    """On a ring a reduction of P bytes sends 2 (n − 1) / n of P from each device."""
    kinds = {each['kind'] for each in row['collectives']}
    reduction = 2 * (n - 1) / n * row['params']
    if case.startswith('seeds/'):
        assert row['sent'] == 0, (case, n, row)
    elif case.endswith('evaluation') and not case.startswith('fsdp/'):
        assert kinds <= {'all-reduce'} and row['sent'] <= 64, (case, n, row)
    elif case.startswith('fsdp/'):
        assert {'all-gather'} <= kinds <= {'all-reduce', 'all-gather', 'reduce-scatter'}, (case, n)
        # Parameters once forward and once backward, and their gradients once.
        assert row['sent'] <= 3 * row['params'] + SMALL, (case, n, row)
    else:
        updates = 2 if case in ('rl/fused', 'rl/transformer') else 1
        assert kinds == {'all-reduce'}, (case, n, row)
        assert 0.9 * reduction < row['sent'] / updates <= reduction + SMALL, (case, n, row)


def compiled_programs(workdir, config, devices):
    """Return how often each program was compiled by a run on this number of devices."""
    done = subprocess.run(
        [sys.executable, '-m', 'mi.main', *config, f'--workdir={workdir}'],
        cwd=ROOT,
        env=os.environ
        | {'XLA_FLAGS': forced(devices), 'JAX_PLATFORMS': 'cpu', 'JAX_LOG_COMPILES': '1'},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return Counter(re.findall(r'Finished XLA compilation of (\S+)', done.stderr))


@pytest.mark.slow
@pytest.mark.parametrize('config', ['configs/lm.py:tiny', 'configs/rl.py:tiny'])
def test_no_program_splits_or_joins_arrays_on_several_devices(tmp_path, texts, config):
    arguments = [f'--config={config}']
    if 'lm' in config:
        arguments.append(f'--config.data.source={texts}')
    one, four = (compiled_programs(tmp_path / str(n), arguments, n) for n in (1, 4))
    assert four and four == one
