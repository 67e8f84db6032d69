"""What a user sees of a mistake: one line that says what to mend, and exit code 1."""

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
        ([], '--config=FILE and --workdir=DIRECTORY are both needed'),
        ([CONFIG], '--config=FILE and --workdir=DIRECTORY are both needed'),
        ([CONFIG, '--workdir={0}', 'more'], "unexpected argument 'more'"),
        (['--config=configs/none.py', '--workdir={0}'], 'configs/none.py'),
        ([CONFIG + ',quikstart', '--workdir={0}'], "did you mean 'quickstart'"),
        ([CONFIG + ',fusion=fim', '--workdir={0}'], "did you mean 'film'"),
        ([CONFIG + ',site=decoderr', '--workdir={0}'], "did you mean 'decoder'"),
        ([CONFIG, '--config.model.hiden=3', '--workdir={0}'], 'hiden'),
        ([CONFIG, '--config.model.hidden=big', '--workdir={0}'], 'config.model.hidden=big'),
        (
            [CONFIG, '--config.optim.learning_rate=nan', '--workdir={0}'],
            'config.optim.learning_rate = nan',
        ),
        ([CONFIG, '--config.train.batch=-1', '--workdir={0}'], 'config.train.batch = -1'),
        ([CONFIG, '--config.data.source=/no/text', '--workdir={0}'], 'no such file or directory'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_mistakes(arguments, said, tmp_path):
    code, err = run(*(a.format(tmp_path / 'run') for a in arguments))
    assert code == 1
    assert err.startswith('error: ') and '\n' not in err
    assert said in err
    assert not (tmp_path / 'run').exists()  # refused before anything was made
