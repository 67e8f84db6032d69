import json
import os
import signal
import subprocess
import sys
from typing import Any

import ml_collections
import pytest

from mi import run
from mi.config import UserError


def config(**values):
    return ml_collections.ConfigDict({'seeds': (0,), 'model': {'width': 3}, **values})


def status(path):
    return json.loads((path / 'status.json').read_text())


def test_a_run_says_how_it_ended(tmp_path):
    with run.start(tmp_path, config()) as this:
        this.step = 7
        assert status(tmp_path)['state'] == 'running'
    assert (status(tmp_path)['state'], status(tmp_path)['step']) == ('done', 7)
    assert json.loads((tmp_path / 'config.json').read_text())['model'] == {'width': 3}

    with pytest.raises(UserError), run.start(tmp_path, config()):
        raise UserError('the loss is NaN')
    assert status(tmp_path)['state'] == 'failed'
    assert status(tmp_path)['reason'] == 'UserError: the loss is NaN'

    with pytest.raises(SystemExit) as stopped, run.start(tmp_path, config()) as this:
        this.preempted()
    assert stopped.value.code == 143
    assert status(tmp_path)['state'] == 'preempted'


def test_a_directory_has_one_writer(tmp_path):
    with run.start(tmp_path, config()):
        code = (
            'import sys, ml_collections; from mi import run\n'
            'with run.start(sys.argv[1], ml_collections.ConfigDict()): pass'
        )
        other = subprocess.run(
            [sys.executable, '-c', code, tmp_path], capture_output=True, text=True
        )
        assert other.returncode == 1
        assert f'{tmp_path} is in use by process ' in other.stderr
    with run.start(tmp_path, config()):
        pass  # free again


def test_another_config_is_refused_and_named(tmp_path):
    with run.start(tmp_path, config()):
        pass
    before = (tmp_path / 'config.json').read_bytes()
    with (
        pytest.raises(
            UserError,
            match=r'extra was absent and is 1 now, model\.width was 3 and is 4 now, '
            r'seeds was \[0\] and is \[1\] now; name another',
        ),
        run.start(tmp_path, config(model={'width': 4}, seeds=(1,), extra=1)),
    ):
        pass
    assert (tmp_path / 'config.json').read_bytes() == before


@pytest.mark.parametrize('damaged', [b'', b'[]', b'{"seeds": [0', b'\xff\xfe'])
def test_a_damaged_config_is_named(tmp_path, damaged):
    (tmp_path / 'config.json').write_bytes(damaged)
    said = pytest.raises(
        UserError, match=r'config\.json is no.* JSON.*; restore it, or name another'
    )
    with said, run.start(tmp_path, config()):
        pass
    with said:
        run.config_to_evaluate(tmp_path, config(), own=[], fixed=['model'])
    assert (tmp_path / 'config.json').read_bytes() == damaged


def test_a_run_is_evaluated_with_its_own_config_and_what_evaluation_may_change(tmp_path):
    trained = config(optim={'rate': 1.0}, train={'batch': 8}, eval={'length': 4, 'old': 1})
    with run.start(tmp_path, trained):
        pass
    asked = config(optim={'rate': 2.0}, train={'batch': 9}, eval={'length': 6, 'new': 2})
    parts: Any = {'own': ['eval'], 'fixed': ['seeds', 'model']}
    merged = run.config_to_evaluate(tmp_path, asked, **parts)
    assert merged.to_dict() == {
        'seeds': (0,),
        'model': {'width': 3},
        'optim': {'rate': 1.0},  # of the run, as evaluation does not read it
        'train': {'batch': 8},
        'eval': {'length': 6, 'new': 2},
    }
    said = r'config\.model\.width = 5: .* was trained with 3; remove it, or name the --workdir of'
    with pytest.raises(UserError, match=said):
        run.config_to_evaluate(tmp_path, config(model={'width': 5}), **parts)
    with pytest.raises(UserError, match=r'config\.seeds = \(1,\): .* was trained with \(0,\)'):
        run.config_to_evaluate(tmp_path, config(seeds=(1,)), **parts)
    assert run.recorded_config(tmp_path).seeds == (0,)  # a tuple, as it was


def test_signals_ask_once_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with run.start(tmp_path, config()) as this:
        assert not this.stops(recorded=False)
        signal.raise_signal(signal.SIGTERM)
        assert this.stops(recorded=False)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends at once
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / 'lock').mkdir()  # as good as read-only, also for root
    said = pytest.raises(UserError, match=r'/lock: Is a directory; name another --workdir')
    with said, run.start(tmp_path, config()):
        pass


def test_a_file_in_the_way(tmp_path):
    (tmp_path / 'taken').write_text('')
    with (
        pytest.raises(UserError, match='name another directory'),
        run.start(tmp_path / 'taken', config()),
    ):
        pass


def test_xla_flags_avoid_known_faults_and_leave_given_flags_alone():
    scheduler = '--xla_cpu_enable_concurrency_optimized_scheduler'
    ynn = '--xla_cpu_experimental_ynn_fusion_type'
    assert run.safe_xla_flags('', '0.10.1') == f'{scheduler}=false'
    assert run.safe_xla_flags('--xla_a=1', '0.12.0.1') == f'--xla_a=1 {scheduler}=false'
    assert run.safe_xla_flags('', '0.10.2') == (f'{scheduler}=false {ynn}=LIBRARY_FUSION_TYPE_DOT')
    given = f'{scheduler}=true {ynn}=LIBRARY_FUSION_TYPE_REDUCE'
    assert run.safe_xla_flags(given, '0.10.2') == given


def test_a_sum_over_several_axes_beside_one_of_length_1_does_not_crash():
    """jaxlib 0.10.2 ends in a segmentation fault here, on CPUs without AVX-512."""
    code = (
        'from mi import run; run.set_xla_flags()\n'
        'import jax, jax.numpy as jnp\n'
        'for axis in range(7):\n'
        '    product_sum = jax.jit(lambda a, b: (a * b).sum(axis))\n'
        '    ones = jnp.ones((2, 1, 32, 3, 3, 2, 4))\n'
        '    assert (product_sum(ones, ones) == ones.shape[axis]).all()'
    )
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    subprocess.run([sys.executable, '-c', code], check=True, env=environment)
