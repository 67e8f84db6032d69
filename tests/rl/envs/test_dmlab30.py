import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mi.config import UserError
from mi.rl import evaluate
from mi.rl.envs import text
from mi.rl.envs.host import dmlab30

LEVELS = 'rooms_watermaze,language_execute_random_task'


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The fake engine, where this process and those it spawns look for deepmind_lab."""
    source = Path(__file__).with_name('fake_deepmind_lab.py')
    shutil.copyfile(source, tmp_path / 'deepmind_lab.py')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop('deepmind_lab', None)


def test_two_engines_run_through_an_episode_and_into_the_next(fake):
    environment = dmlab30.make(LEVELS, batch=2, cache=str(fake / 'cache'))
    try:
        step = environment.reset()
        assert step.is_first.all() and (step.discount == 1).all() and not step.reward.any()
        for name, value in step.observation.items():
            expected = environment.spec.observation[name]
            assert (value.shape, value.dtype) == ((2, *expected.shape), expected.dtype)
        for t in range(1, 7):
            environment.send(np.array([0, 5], np.int32))
            step = environment.recv()
            ended = t % 3 == 0
            np.testing.assert_array_equal(step.reward, [4, 80])
            np.testing.assert_array_equal(step.is_first, ended)
            np.testing.assert_array_equal(step.discount, 0 if ended else 1)
            np.testing.assert_array_equal(step.observation['pixels'], t % 3)
            assert not step.is_last.any()
        expected = [text.hashed(1000, 16)(''), text.hashed(1000, 16)('pick the red key')]
        np.testing.assert_array_equal(step.observation['instruction'], expected)
        np.testing.assert_array_equal(step.observation['task'], [0, 1])
    finally:
        environment.close()
    cached = sorted(path.name for path in (fake / 'cache').iterdir())
    assert cached == sorted(LEVELS.split(','))
    assert not any(process.is_alive() for process in environment._processes)


def test_an_engine_that_dies_is_named(fake):
    environment = dmlab30.make('rooms_watermaze', batch=1, renderer='hardware')
    with pytest.raises(UserError, match='rooms_watermaze: its process died'):
        environment.reset()
    environment.close()


def test_what_the_engine_refuses_is_the_users_to_read(fake):
    environment = dmlab30.make('rooms_watermaze', batch=1, renderer='cuda')
    with pytest.raises(UserError, match='rooms_watermaze: ValueError: unknown renderer cuda'):
        environment.reset()
    environment.close()


def test_a_silent_engine_is_named_after_the_timeout(fake):
    environment = dmlab30.make('rooms_watermaze', batch=1, timeout=0.2)
    with pytest.raises(
        UserError, match=r'rooms_watermaze did not answer in 0\.2 s\. Raise `options\.timeout`'
    ):
        environment.recv()  # nothing was sent, so that nothing comes
    environment.close()


def test_the_test_suite_runs_the_held_out_levels(fake, monkeypatch):
    seen = []
    monkeypatch.setattr(dmlab30, 'DMLab', lambda spec, engines, *rest: seen.extend(engines))
    dmlab30.make('test', batch=30)
    names = [engine['level'].removeprefix('contributed/dmlab30/') for engine in seen]
    assert len(set(names)) == 30
    assert [name for name in names if name.endswith('_test')] == list(dmlab30.HELD_OUT.values())
    assert not any(name.endswith('_train') for name in names)
    assert all(engine['config']['allowHoldOutLevels'] == 'true' for engine in seen)
    assert {engine['config']['mixerSeed'] for engine in seen} == {str(0x600D5EED)}


def test_the_capped_score_is_0_for_random_1_for_human_and_not_above():
    """The mean over levels of min(1, (s − r) / (h − r)), as scalable_agent computes it."""
    spec = dmlab30.make_spec()
    random, human = np.array(spec.random), np.array(spec.reference)

    def score(returns):
        episodes = [np.array([value]) for value in returns]
        return evaluate.summarize(spec, episodes, episodes, episodes)['capped_mean']

    assert score(random) == 0
    assert score(human) == pytest.approx(1)
    assert score(human + 1000) == 1
    level = spec.tasks.index('rooms_watermaze')
    one, below = random.copy(), random.copy()
    one[level] = (4.065 + 54.0) / 2
    assert score(one) == pytest.approx(0.5 / 30)
    below[level] = 4.065 - (54.0 - 4.065)
    assert score(below) == pytest.approx(-1 / 30)


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    cache = dmlab30.LevelCache(str(tmp_path / 'cache'))
    (tmp_path / 'made').write_bytes(b'map')
    assert not cache.fetch('key', str(tmp_path / 'got'))
    assert not (tmp_path / 'got').exists()
    cache.write('key', str(tmp_path / 'made'))
    assert cache.fetch('key', str(tmp_path / 'got'))
    assert (tmp_path / 'got').read_bytes() == b'map'


def test_there_are_thirty_levels_and_the_two_action_sets():
    assert len(dmlab30.LEVELS) == 30
    assert [len(dmlab30.ACTIONS[name]) for name in ('impala', 'extended')] == [9, 15]
    for actions in dmlab30.ACTIONS.values():
        assert {len(action) for action in actions} == {7}
        assert len(set(actions)) == len(actions)


def test_wrong_words_raise_user_errors(fake):
    with pytest.raises(UserError, match="did you mean 'rooms_watermaze'"):
        dmlab30.make('room_watermaze', batch=1)
    with pytest.raises(UserError, match="did you mean 'impala'"):
        dmlab30.make('', batch=30, actions='impla')
    with pytest.raises(UserError, match='30 tasks but the batch has only 29'):
        dmlab30.make('train', batch=29)


def test_a_missing_engine_points_to_the_page_that_builds_it():
    if 'deepmind_lab' in sys.modules or dmlab30.importlib.util.find_spec('deepmind_lab'):
        pytest.skip('deepmind_lab is installed')
    with pytest.raises(UserError, match=r'docs/dmlab\.md'):
        dmlab30.make('', batch=30)
