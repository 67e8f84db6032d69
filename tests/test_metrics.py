import json

import pytest

from launch import state
from mi import metrics
from mi.config import UserError


def lines(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def test_a_continued_file_loses_what_came_after_the_checkpoint(tmp_path):
    log = metrics.Metrics(tmp_path)
    log.write(1, 0, 'train', {'nats_per_token': 0.1 + 0.2, 'bits_per_byte': None})
    position = log.position()
    log.write(2, 0, 'train', {'nats_per_token': 9.0})
    log.close()

    log = metrics.Metrics(tmp_path, position, 1)
    assert log.position() == position  # of a checkpoint that is saved before another record
    log.write(2, 0, 'train', {'nats_per_token': 0.25, 'over': {'batch': 2}})
    log.timing(2, {'seconds': 1.5})
    log.close()
    first = {'step': 1, 'seed': 0, 'split': 'train', 'nats_per_token': 0.1 + 0.2}
    assert lines(tmp_path) == [
        {**first, 'bits_per_byte': None},
        {'step': 2, 'seed': 0, 'split': 'train', 'nats_per_token': 0.25, 'over': {'batch': 2}},
    ]
    assert json.loads((tmp_path / 'timing.jsonl').read_text()) == {'step': 2, 'seconds': 1.5}
    assert list((tmp_path / 'tensorboard').iterdir())


@pytest.mark.parametrize(
    'left, said',
    [
        (None, 'has 0 bytes and the checkpoint needs 27'),
        (b'{"step": 1}\n', 'has 12 bytes and the checkpoint needs 27'),
        (b'{"step": 1}\n' * 2 + b'{"step": 2', 'has no line that ends at byte 27'),
    ],
)
def test_a_file_without_the_lines_of_the_checkpoint_is_refused_as_it_is(tmp_path, left, said):
    file = tmp_path / 'metrics.jsonl'
    if left is not None:
        file.write_bytes(left)
    with pytest.raises(UserError, match=f'{said}.*; restore it, or name another --workdir'):
        metrics.Metrics(tmp_path, 27, 2)
    assert (file.read_bytes() if file.exists() else None) == left
    assert list(tmp_path.iterdir()) == ([] if left is None else [file])


def test_progress_without_a_terminal_is_a_line_now_and_then(capfd):
    progress = metrics.Progress(total=10, done=5, every=1000)
    for step in range(6, 11):
        progress.update(step, '1.5 nats', '7 tokens/s')
    progress.close()
    assert capfd.readouterr().err.strip() == 'step 10/10  1.5 nats  7 tokens/s  00:00:00 left'


def test_more_than_a_day_is_left(capfd):
    progress = metrics.Progress(total=1000, every=-1)
    progress._start -= 3600 * 100  # two of a thousand steps
    progress.update(2, '', '')
    progress.close()
    assert '  49900:' in capfd.readouterr().err
    row = state.cells('a', state.State('running', left=36 * 3600 + 61.9))
    assert '36:01:01' in row and '00:00:59' in state.cells('a', state.State('running', left=59.9))
