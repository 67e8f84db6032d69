"""A user error ends with one line that says what to change, and exit code 1."""

import subprocess
import sys

import pytest

CONFIG = '--config=configs/lm.py:tiny'


def run(*arguments):
    done = subprocess.run(
        [sys.executable, '-m', 'mi.main', *arguments], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    'arguments, said',
    [
        ([], '--config=FILE and --workdir=DIRECTORY are both required'),
        ([CONFIG], '--config=FILE and --workdir=DIRECTORY are both required'),
        ([CONFIG, '--workdir={0}', 'more'], "unexpected argument 'more'"),
        (['--config=configs/none.py', '--workdir={0}'], 'configs/none.py: no such file'),
        ([CONFIG + ',quikstart', '--workdir={0}'], "did you mean 'quickstart'"),
        ([CONFIG + ',fusion=fim', '--workdir={0}'], "did you mean 'film'"),
        ([CONFIG + ',site=decoderr', '--workdir={0}'], "did you mean 'decoder'"),
        ([CONFIG, '--config.model.hiden=3', '--workdir={0}'], 'did you mean config.model.hidden?'),
        (['--config={1}', '--config.seeds=(1,)', '--workdir={0}'], '(broken.py, line 2)'),
        (
            [CONFIG, '--config.model.hidden=big', '--workdir={0}'],
            "'big': expected an integer",
        ),
        (
            [CONFIG, '--config.optim.learning_rate=nan', '--workdir={0}'],
            'config.optim.learning_rate = nan',
        ),
        ([CONFIG, '--workdr={0}'], "'workdr'. Did you mean: workdir ?"),
        ([CONFIG, '--workdir='], '--config=FILE and --workdir=DIRECTORY are both required'),
        (['--mode=eval'], '--mode=eval requires --workdir=DIRECTORY'),
        (['--mode=eval', '--workdir={0}'], 'expected a run directory, but found no config.json'),
        ([CONFIG, '--config.train.batch=-1', '--workdir={0}'], 'config.train.batch = -1'),
        ([CONFIG, '--config.data.source=/no/text', '--workdir={0}'], 'no such file or directory'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_mistakes(arguments, said, tmp_path):
    broken = tmp_path / 'broken.py'
    broken.write_text('def get_config():\n    return (\n')
    code, err = run(*(a.format(tmp_path / 'run', broken) for a in arguments))
    assert code == 1
    assert err.startswith('error: ') and '\n' not in err and '\\n' not in err
    assert said in err
    assert not (tmp_path / 'run').exists()  # refused before anything was made


@pytest.mark.slow
def test_no_warning_reaches_a_user_who_turns_warnings_into_errors(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, '-W', 'error', '-m', 'mi.main', CONFIG, f'--workdir={tmp_path}'),
            *('--config.train.steps=2', f'--config.data.cache={tmp_path / "cache"}'),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
