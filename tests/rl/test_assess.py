import json

import numpy as np
import pytest
from PIL import Image

from mi.config import UserError
from mi.rl import train, video
from mi.rl.assess import assess
from mi.rl.envs.jax import xland
from tests.rl.test_train import records, tiny


@pytest.mark.slow
def test_a_run_is_scored_and_filmed(tmp_path, capsys):
    config = tiny(**{'train.steps': 40 * 5, 'seeds': (0, 1), 'eval.greedy': True})
    train.train(config, str(tmp_path))
    assess(config, str(tmp_path))
    scores = json.loads((tmp_path / 'evaluation' / 'scores.json').read_text())
    assert scores['step'] == 5
    recorded = {
        (record['split'], str(record['seed'])): record
        for record in records(tmp_path)
        if record['step'] == 5 and record['split'].startswith('eval')
    }
    for (split, seed), record in recorded.items():  # each seed draws what it drew in training
        assert scores[split][seed].items() <= record.items()
    assert len(recorded) == 2 * len(scores['eval'])
    for split in ('eval', 'eval_greedy'):
        assert set(scores[split]) == {'0', '1'}
        assert scores[split]['0']['length'] == 9  # every game of Catch
        assert abs(scores[split]['0']['return']) <= 1
    with Image.open(tmp_path / 'evaluation' / 'catch.gif') as film:
        assert film.n_frames >= 10
    assert 'greedy' in capsys.readouterr().out
    # What decides neither the parameters nor the episodes may be another.
    unread = {'train.batch': 16, 'optim.name': 'sgd', 'loss.discount': 0.5}
    before = (tmp_path / 'evaluation' / 'scores.json').read_bytes()
    assess(tiny(seeds=(0, 1), **unread), str(tmp_path))
    assert (tmp_path / 'evaluation' / 'scores.json').read_bytes() == before
    other = tiny(**{'train.steps': 40 * 5, 'seeds': (0, 1), 'model.hidden': 8})
    with pytest.raises(UserError, match=r'config\.model\.hidden = 8: expected 16, as in'):
        assess(other, str(tmp_path))


@pytest.mark.slow
def test_an_agent_of_threads_is_scored_whatever_the_batch_is_now(tmp_path, capsys):
    config = tiny(**{'train.topology': 'threads', 'train.steps': 40 * 5})
    train.train(config, str(tmp_path))
    assess(config, str(tmp_path))
    scores = (tmp_path / 'evaluation' / 'scores.json').read_bytes()
    assess(tiny(**{'train.batch': 16}), str(tmp_path))  # fused, as the default is
    assert (tmp_path / 'evaluation' / 'scores.json').read_bytes() == scores
    capsys.readouterr()
    for manifest in (tmp_path / 'checkpoints').glob('*/manifest.json'):
        manifest.unlink()
    with pytest.raises(UserError, match=r'no checkpoint in .* is intact'):
        assess(config, str(tmp_path))
    assert 'has no manifest.json' in capsys.readouterr().err


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'no config\.json'):
        assess(tiny(), str(tmp_path))


def test_a_picture_has_the_instruction_and_the_cells():
    spec = xland.make('hold red ball').spec
    grid = np.full((5, 5, 2), (1, 7), np.uint8)  # floor
    empty = {'grid': grid, 'instruction': np.array([1, 7, 10])}
    with_ball = {**empty, 'grid': grid.copy()}
    with_ball['grid'][0, 0] = 3, 1  # a ball, red
    assert video.get_instruction(spec, 'hold red ball', empty) == 'hold red ball'
    pictures = [np.asarray(video.draw_frame(spec, 'task', o, 0.5, 3)) for o in (empty, with_ball)]
    cell = video.SIDE // 5
    changed = (pictures[0] != pictures[1]).any(-1)
    assert changed[:cell, :cell].any()
    assert not changed[cell:].any()
    assert not changed[:, cell:].any()
    assert (pictures[1][cell // 2, cell // 2] == (255, 0, 0)).all()
    assert pictures[0][video.SIDE :].any()  # what is written below
