import errno
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from mi.config import UserError
from mi.training import host, io, run_config, run_dir, versions


def config(**values):
    return ml_collections.ConfigDict({'seeds': (0,), 'model': {'width': 3}, **values})


def status(path):
    return json.loads((path / 'status.json').read_text())


def test_a_run_says_how_it_ended(tmp_path):
    with run_dir.open_run(tmp_path, config()) as run:
        run.step = 7
        assert status(tmp_path)['state'] == 'running'
    assert (status(tmp_path)['state'], status(tmp_path)['step']) == ('done', 7)
    assert json.loads((tmp_path / 'config.json').read_text())['model'] == {'width': 3}

    with pytest.raises(UserError), run_dir.open_run(tmp_path, config()):
        raise UserError('the loss is NaN')
    assert status(tmp_path)['state'] == 'failed'
    assert status(tmp_path)['reason'] == 'UserError: the loss is NaN'

    with pytest.raises(SystemExit) as stopped, run_dir.open_run(tmp_path, config()) as run:
        run.exit_preempted()
    assert stopped.value.code == 143
    assert status(tmp_path)['state'] == 'preempted'


def test_a_directory_has_one_writer(tmp_path):
    with run_dir.open_run(tmp_path, config()):
        code = (
            'import sys, ml_collections; from mi.training import run_dir\n'
            'with run_dir.open_run(sys.argv[1], ml_collections.ConfigDict()): pass'
        )
        other = subprocess.run(
            [sys.executable, '-c', code, tmp_path], capture_output=True, text=True
        )
        assert other.returncode == 1
        assert f'{tmp_path} is in use by process ' in other.stderr
    with run_dir.open_run(tmp_path, config()):
        pass  # free again


def test_another_config_is_refused_and_named(tmp_path):
    with run_dir.open_run(tmp_path, config()):
        pass
    before = (tmp_path / 'config.json').read_bytes()
    with (
        pytest.raises(
            UserError,
            match=r'extra was absent and is 1 now, model\.width was 3 and is 4 now, '
            r'seeds was \[0\] and is \[1\] now\. Use another',
        ),
        run_dir.open_run(tmp_path, config(model={'width': 4}, seeds=(1,), extra=1)),
    ):
        pass
    assert (tmp_path / 'config.json').read_bytes() == before


@pytest.mark.parametrize(
    'damaged, message',
    [
        (b'', r' is not JSON \(.*\)\.'),
        (b'[]', r': expected a JSON object, but got list\.'),
        (b'{"seeds": [0', r' is not JSON \(.*\)\.'),
        (b'\xff\xfe', r' is not JSON \(.*\)\.'),
    ],
)
def test_a_damaged_config_is_named(tmp_path, damaged, message):
    (tmp_path / 'config.json').write_bytes(damaged)
    said = pytest.raises(UserError, match=rf'config\.json{message} Restore it, or use another --w')
    with said, run_dir.open_run(tmp_path, config()):
        pass
    with said:
        run_config.merge_eval_config(tmp_path, config(), overridable=[], fixed=['model'])
    assert (tmp_path / 'config.json').read_bytes() == damaged


def test_a_run_is_evaluated_with_its_own_config_and_what_evaluation_may_change(tmp_path):
    trained = config(optim={'rate': 1.0}, train={'batch': 8}, eval={'length': 4, 'old': 1})
    with run_dir.open_run(tmp_path, trained):
        pass
    asked = config(optim={'rate': 2.0}, train={'batch': 9}, eval={'length': 6, 'new': 2})
    parts: Any = {'overridable': ['eval'], 'fixed': ['seeds', 'model']}
    merged = run_config.merge_eval_config(tmp_path, asked, **parts)
    assert merged.to_dict() == {
        'seeds': (0,),
        'model': {'width': 3},
        'optim': {'rate': 1.0},  # of the run, as evaluation does not read it
        'train': {'batch': 8},
        'eval': {'length': 6, 'new': 2},
    }
    said = r'config\.model\.width = 5: expected 3, as in the training .*\. Remove the option,'
    with pytest.raises(UserError, match=said):
        run_config.merge_eval_config(tmp_path, config(model={'width': 5}), **parts)
    with pytest.raises(UserError, match=r'config\.seeds = \(1,\): expected \(0,\), as in'):
        run_config.merge_eval_config(tmp_path, config(seeds=(1,)), **parts)
    assert run_config.read_config(tmp_path).seeds == (0,)  # a tuple, as it was


@pytest.mark.parametrize(
    ('trained', 'requested'),
    [({'act': 'silu'}, {}), ({}, {'act': 'silu'}), ({'act': 'silu'}, {'act': 'relu'})],
)
def test_an_option_that_only_one_config_has_is_a_difference(tmp_path, trained, requested):
    """It has its default in the other one, which no newer code has added."""
    trained_config = config(model={'width': 3, 'options': trained}, loss={'options': trained})
    requested_config = config(model={'width': 3, 'options': requested}, loss={'options': {'a': 1}})
    with run_dir.open_run(tmp_path, trained_config):
        pass
    with (
        pytest.raises(UserError, match=r'model\.options\.act was .* and is .* now'),
        run_dir.open_run(tmp_path, requested_config),
    ):
        pass
    parts: Any = {'overridable': ['eval'], 'fixed': ['seeds', 'model']}
    with pytest.raises(UserError, match=r'config\.model\.options\.act = .*: expected .*, as in'):
        run_config.merge_eval_config(tmp_path, requested_config, **parts)

    # Options that an evaluation does not read are those of the run.
    requested_config.model.options = ml_collections.ConfigDict(trained)
    merged = run_config.merge_eval_config(tmp_path, requested_config, **parts)
    assert merged.loss.options.to_dict() == trained


def test_signals_ask_once_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with run_dir.open_run(tmp_path, config()) as run:
        assert not run.should_stop(recorded=False)
        signal.raise_signal(signal.SIGTERM)
        assert run.should_stop(recorded=False)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends immediately
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / 'lock').mkdir()  # as good as read-only, also for root
    said = pytest.raises(UserError, match=r'/lock: Is a directory\. Use another --workdir')
    with said, run_dir.open_run(tmp_path, config()):
        pass


def test_a_file_in_the_way(tmp_path):
    (tmp_path / 'taken').write_text('')
    with (
        pytest.raises(UserError, match='Use another directory'),
        run_dir.open_run(tmp_path / 'taken', config()),
    ):
        pass


def test_xla_flags_avoid_known_faults_and_leave_given_flags_alone():
    scheduler = '--xla_cpu_enable_concurrency_optimized_scheduler'
    ynn = '--xla_cpu_experimental_ynn_fusion_type'
    assert host.safe_xla_flags('', '0.10.1') == f'{scheduler}=false'
    assert host.safe_xla_flags('--xla_a=1', '0.10.1') == f'--xla_a=1 {scheduler}=false'
    for version in ('0.10.2', '0.11.0', '0.12.0.1'):
        flags = host.safe_xla_flags('', version)
        assert flags == f'{scheduler}=false {ynn}='
    given = f'{scheduler}=true {ynn}=LIBRARY_FUSION_TYPE_REDUCE'
    assert host.safe_xla_flags(given, '0.10.2') == given


def test_a_sum_over_several_axes_beside_one_of_length_1_does_not_crash():
    """jaxlib 0.10.2 ends in a segmentation fault here, on CPUs without AVX-512."""
    code = (
        'from mi.training import host; host.set_xla_flags()\n'
        'import jax, jax.numpy as jnp\n'
        'for axis in range(7):\n'
        '    product_sum = jax.jit(lambda a, b: (a * b).sum(axis))\n'
        '    ones = jnp.ones((2, 1, 32, 3, 3, 2, 4))\n'
        '    assert (product_sum(ones, ones) == ones.shape[axis]).all()'
    )
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    subprocess.run([sys.executable, '-c', code], check=True, env=environment)


def full(*arguments):
    return OSError(errno.ENOSPC, 'No space left on device', 'metrics.jsonl')


def wrapped(words):
    """As orbax has it: another exception, whose words are those of the operating system."""
    return ValueError(f'RESOURCE_EXHAUSTED: Failed writing: {words} [os_error_code=28]')


@pytest.mark.parametrize(
    'error, said',
    [
        (full(), r'metrics\.jsonl: No space left on device'),
        (OSError(errno.EDQUOT, 'quota'), 'Disk quota exceeded'),
        (OSError(errno.EFBIG, 'big'), 'File too large'),
        (OSError(errno.EROFS, 'read-only'), 'Read-only file system'),
        (wrapped('No space left on device'), 'No space left on device'),
    ],
    ids=str,
)
def test_a_full_disk_is_one_line_and_the_status_says_it(tmp_path, error, said):
    line = rf'--workdir={tmp_path}: {said}\. .* Free some space, then run'
    with pytest.raises(UserError, match=line), run_dir.open_run(tmp_path, config()) as run:
        run.step = 7
        raise error
    assert status(tmp_path)['state'] == 'failed' and status(tmp_path)['step'] == 7
    assert re.search(said, status(tmp_path)['reason'])


def test_errors_that_come_of_a_full_disk_are_known_by_what_they_came_of(tmp_path):
    with pytest.raises(UserError, match='No space left'), run_dir.open_run(tmp_path, config()):
        try:
            raise full()
        finally:
            raise RuntimeError('handle is closed')


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), run_dir.open_run(tmp_path, config()):
        open(tmp_path / 'none')  # noqa: SIM115
    assert status(tmp_path)['reason'].startswith('FileNotFoundError')


def test_the_status_is_written_where_no_other_file_can_be(tmp_path, monkeypatch):
    def fill(patched):  # every file but those that are there
        patched.setattr(run_dir.pathlib.Path, 'write_text', raising_full)

    said = pytest.raises(UserError, match='No space left')
    with monkeypatch.context() as patched, said, run_dir.open_run(tmp_path, config()) as run:
        run.step = 3
        fill(patched)
        run.write('cost.json', {})
    assert status(tmp_path)['state'] == 'failed' and status(tmp_path)['step'] == 3
    with monkeypatch.context() as patched, run_dir.open_run(tmp_path, config()):
        assert status(tmp_path)['state'] == 'running'
        fill(patched)  # when all of it is saved
    assert status(tmp_path)['state'] == 'done'
    stopped = pytest.raises(SystemExit)
    with monkeypatch.context() as patched, stopped, run_dir.open_run(tmp_path, config()) as run:
        fill(patched)
        run.exit_preempted()
    assert status(tmp_path)['state'] == 'preempted'


@pytest.mark.parametrize('name', ['lock', 'config.json', 'versions.json', 'status.json'])
def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path, monkeypatch, name):
    def write(path, value):
        if path.name == name:
            raise full()
        io.write_json(path, value)

    monkeypatch.setattr(run_dir, 'write_json', write)
    monkeypatch.setattr(run_config, 'write_json', write)
    if name == 'lock':
        monkeypatch.setattr(run_dir.platform, 'node', raising_full)
    said = pytest.raises(UserError, match=f'--workdir={tmp_path}: .*No space left on device')
    with said, run_dir.open_run(tmp_path, config()):
        pass


def raising_full(*arguments):
    raise full()


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    """Also where writing stops half-way: a reader sees the old one, and nothing is left beside."""
    io.write_json(tmp_path / 'a.json', {'old': 1})
    write = run_dir.pathlib.Path.write_text

    def half(path, text):
        write(path, text[: len(text) // 2])
        raise full()

    with monkeypatch.context() as patched, pytest.raises(OSError, match='No space'):
        patched.setattr(run_dir.pathlib.Path, 'write_text', half)
        io.write_json(tmp_path / 'a.json', {'new': 2})
    assert json.loads((tmp_path / 'a.json').read_text()) == {'old': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']
    with pytest.raises(UserError, match=r'a\.json: .*not JSON compliant'):
        io.write_json(tmp_path / 'a.json', {'new': float('nan')})
    assert json.loads((tmp_path / 'a.json').read_text()) == {'old': 1}


def checkpointed(path):
    (path / 'checkpoints' / '00000040').mkdir(parents=True)


@pytest.mark.parametrize(
    'setting, other',
    [
        ('jax_default_prng_impl', 'rbg'),
        ('jax_enable_x64', True),
        ('jax_default_matmul_precision', 'highest'),
        ('jax_threefry_partitionable', False),
    ],
)
def test_settings_that_give_other_numbers_are_refused_when_a_run_is_continued(
    tmp_path, setting, other
):
    with run_dir.open_run(tmp_path, config()):
        pass
    before = getattr(jax.config, setting)
    jax.config.update(setting, other)
    try:
        with run_dir.open_run(
            tmp_path, config()
        ):  # without a checkpoint it starts, with what is set now
            pass
        checkpointed(tmp_path)
        with run_dir.open_run(tmp_path, config()):
            pass
        jax.config.update(setting, before)
        said = f'{setting} = {before!r}: expected {other!r}, .*Try {setting.upper()}={other}'
        with pytest.raises(UserError, match=said), run_dir.open_run(tmp_path, config()):
            pass
    finally:
        jax.config.update(setting, before)


def test_versions_are_recorded_and_another_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    with run_dir.open_run(tmp_path, config()):
        pass
    record = json.loads((tmp_path / 'versions.json').read_text())
    assert record['jax'] == jax.__version__ and record['numpy'] == np.__version__
    assert record['python'] == '.'.join(map(str, sys.version_info[:3]))
    assert record['jax_default_prng_impl'] == 'threefry2x32' and record['continued'] == []
    assert {'commit', 'dirty', 'xla_flags', 'device', 'flax', 'optax', 'jaxlib'} <= record.keys()
    checkpointed(tmp_path)
    with run_dir.open_run(tmp_path, config()):
        pass
    assert capsys.readouterr().err == ''
    current = versions.describe_environment()
    monkeypatch.setattr(
        versions, 'describe_environment', lambda: current | {'jax': '9.9', 'dirty': 'yes'}
    )
    for _ in range(2):  # the second time it is as it was before
        with run_dir.open_run(tmp_path, config()):
            pass
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f'warning: {tmp_path} continues with a different ')
    assert f"jax was '{jax.__version__}' and is '9.9' now" in line
    again = json.loads((tmp_path / 'versions.json').read_text())
    changed = {'step': 40, 'changed': {'jax': '9.9', 'dirty': 'yes'}}
    assert again == record | {'continued': [changed]}


def test_a_run_that_was_begun_before_a_key_was_there_goes_on_and_says_so(tmp_path, capsys):
    with run_dir.open_run(tmp_path, config()):
        pass
    newer = config(model={'width': 3, 'depth': 1})
    with run_dir.open_run(tmp_path, newer):
        pass
    [line] = capsys.readouterr().err.splitlines()
    assert 'has no value for config.model.depth = 1; it continues with this value' in line
    with run_dir.open_run(tmp_path, newer):
        pass
    assert capsys.readouterr().err == ''
    for model, now in (({'width': 3, 'depth': 2}, '2'), ({'width': 3}, 'absent')):
        said = pytest.raises(UserError, match=rf'model\.depth was 1 and is {now} now')
        with said, run_dir.open_run(tmp_path, config(model=model)):
            pass
