import numpy as np
import pytest

from mi.rl import episode_metrics
from mi.rl.trajectory import Episodes
from mi.training import logger

TASKS = ('short', 'long', 'never')


def episodes(number, returns, lengths, successes):
    return Episodes(*(np.array(a, np.float32) for a in (number, returns, lengths, successes)))


def test_tasks_weigh_alike_however_many_episodes_they_have():
    ended = episodes([99, 1, 0], [99 * 4, 10, 0], [99 * 2, 200, 0], [99, 0, 0])
    record = episode_metrics.summarize_episodes(ended, TASKS)
    assert record['episodes'] == 100
    assert (record['return'], record['length'], record['success']) == (7.0, 101.0, 0.5)
    assert record['success/short'] == 1
    assert record['success/long'] == 0
    assert record['success/never'] is None
    assert record['return/long'] == 10


def test_what_is_unknown_is_none_and_the_line_shows_what_is_known():
    ended = episodes([2, 1, 0], [8, 10, 0], [4, 200, 0], [0, 0, 0])
    unknown = episode_metrics.summarize_episodes(ended, TASKS, has_success=False)
    assert all(unknown[name] is None for name in unknown if name.startswith('success'))
    assert unknown['return'] == 7.0
    assert episode_metrics.make_note(unknown) == 'return 7.000'
    assert (
        episode_metrics.make_note(episode_metrics.summarize_episodes(ended, TASKS))
        == 'success 0.000'
    )
    nothing = episode_metrics.summarize_episodes(episodes(*[[0, 0, 0]] * 4), TASKS)
    assert nothing['return'] is nothing['success'] is None
    assert episode_metrics.make_note(nothing) == 'no episode ended yet'


@pytest.mark.parametrize(
    ('after', 'end'),
    [
        ('{"step": 5}\n{"step": 5}\n{"step": 6}\n', 36),
        ('{"step": 5}\n{"step": 5}\n', 36),
        ('{"step": 5}\n{"step": 5}', None),
        ('{"step": 5}\n{"step": 6}\n', None),
        ('', None),
    ],
)
def test_an_evaluation_after_a_checkpoint_is_over_where_it_has_its_records(tmp_path, after, end):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 4}\n' + after)
    assert logger.find_records_end(tmp_path, 12, 5, 2) == end
    assert logger.find_records_end(tmp_path, 12, 5, 0) == 12
