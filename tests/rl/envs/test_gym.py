import builtins
import re

import numpy as np
import pytest

from mi.config import UserError, suggest_install
from mi.rl.envs.host import gymnasium as host_gymnasium


def test_cartpole_is_the_package_itself_with_the_reset_one_step_later():
    gymnasium = pytest.importorskip('gymnasium', reason='the extra gym is not installed')
    environment = host_gymnasium.make_gym('CartPole-v1', batch=2, seed=5)
    theirs = [gymnasium.make('CartPole-v1') for _ in range(2)]
    step = environment.reset()
    seen = [env.reset(seed=5 + i)[0] for i, env in enumerate(theirs)]
    np.testing.assert_array_equal(step.observation['features'], seen)
    over = np.zeros(2, bool)
    ends = 0
    for action in np.random.default_rng(0).integers(0, 2, (60, 2)):
        environment.send(action)
        step = environment.recv()
        for i, env in enumerate(theirs):
            expected = (env.reset()[0], 0.0, False, False) if over[i] else env.step(action[i])[:4]
            np.testing.assert_array_equal(step.observation['features'][i], expected[0])
            assert step.reward[i] == expected[1]
            assert step.discount[i] == (0 if expected[2] else 1)
            assert step.is_first[i] == over[i]
            over[i] = expected[2] or expected[3]
            assert step.is_last[i] == over[i]
            ends += over[i]
    assert ends > 2
    environment.close()


def test_an_episode_that_is_cut_keeps_its_discount():
    pytest.importorskip('gymnasium', reason='the extra gym is not installed')
    environment = host_gymnasium.make_gym('MountainCar-v0', batch=1)
    assert environment.spec.episode == 200
    environment.reset()
    lasts = []
    for _ in range(201):
        environment.send(np.array([1]))
        step = environment.recv()
        lasts.append(bool(step.is_last[0]))
        assert step.discount[0] == 1
    assert lasts == [False] * 199 + [True, False]
    assert step.is_first[0] and step.reward[0] == 0
    environment.close()


@pytest.mark.slow
def test_processes_give_what_one_process_gives():
    pytest.importorskip('gymnasium', reason='the extra gym is not installed')
    here = host_gymnasium.make_gym('CartPole-v1', batch=2, seed=3)
    there = host_gymnasium.make_gym('CartPole-v1', batch=2, seed=3, asynchronous=True)
    pairs = [(here.reset(), there.reset())]
    for action in np.random.default_rng(0).integers(0, 2, (40, 2)):
        for environment in (here, there):
            environment.send(action)
        pairs.append((here.recv(), there.recv()))
    for mine, theirs in pairs:
        for name in mine.observation:
            np.testing.assert_array_equal(mine.observation[name], theirs.observation[name])
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            np.testing.assert_array_equal(a, b)
    here.close()
    there.close()


def test_spaces_that_no_network_takes_are_refused():
    pytest.importorskip('gymnasium', reason='the extra gym is not installed')
    with pytest.raises(UserError, match=r'Pendulum-v1: the action space .*is not discrete'):
        host_gymnasium.make_gym('Pendulum-v1', batch=1)
    with pytest.raises(UserError, match="did you mean 'CartPole-v1'"):
        host_gymnasium.make_gym('CartPol-v1', batch=1)


def test_a_missing_package_names_the_extra(monkeypatch):
    def without(name, *rest):
        if name.split('.')[0] == 'gymnasium':
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(UserError, match=re.escape(f'Try {suggest_install("gym")}')):
        host_gymnasium.make_gym('CartPole-v1', batch=1)
    with pytest.raises(UserError, match=re.escape(f'Try {suggest_install("vizdoom")}')):
        host_gymnasium.make_vizdoom('basic', batch=1)


def test_scenarios_share_their_buttons_by_name():
    pytest.importorskip('vizdoom', reason='the extra vizdoom is not installed')
    environment = host_gymnasium.make_vizdoom('basic,health_gathering', batch=2)
    # basic has MOVE_LEFT, MOVE_RIGHT, ATTACK; health_gathering TURN_LEFT, TURN_RIGHT, MOVE_FORWARD.
    assert environment.spec.actions == 7
    pressed = []
    for row, env in enumerate(environment._vector.envs):
        game = env.unwrapped.game
        names = [button.name for button in game.get_available_buttons()]
        environment.reset()
        for action in range(7):
            env.step(action)
            down = [name for name, on in zip(names, game.get_last_action(), strict=True) if on]
            pressed.append((row, action, down))
    buttons = ['MOVE_LEFT', 'MOVE_RIGHT', 'ATTACK', 'TURN_LEFT', 'TURN_RIGHT', 'MOVE_FORWARD']
    expected = [(0, 0, [])]
    expected += [(0, i, [b] if i <= 3 else []) for i, b in enumerate(buttons, start=1)]
    expected += [(1, 0, [])]
    expected += [(1, i, [b] if i > 3 else []) for i, b in enumerate(buttons, start=1)]
    assert pressed == expected
    environment.close()


def test_a_scenario_steps_with_the_shapes_of_its_spec():
    pytest.importorskip('vizdoom', reason='the extra vizdoom is not installed')
    environment = host_gymnasium.make_vizdoom('basic,take_cover', batch=3)
    step = environment.reset()
    lasts = np.zeros(3, bool)
    for _ in range(80):  # basic is cut after 300 tics of 4
        environment.send(np.zeros(3, np.int32))
        step = environment.recv()
        for name, value in step.observation.items():
            expected = environment.spec.observation[name]
            assert (value.shape, value.dtype) == ((3, *expected.shape), expected.dtype)
        lasts |= step.is_last
    np.testing.assert_array_equal(step.observation['task'], [0, 1, 0])
    assert lasts[0] and lasts[2]
    assert step.observation['pixels'].std() > 1
    environment.close()


def test_wrong_words_of_vizdoom_raise_user_errors():
    pytest.importorskip('vizdoom', reason='the extra vizdoom is not installed')
    with pytest.raises(UserError, match="did you mean 'basic'"):
        host_gymnasium.make_vizdoom('basics', batch=1)
    with pytest.raises(UserError, match='9 tasks but the batch has only 1'):
        host_gymnasium.make_vizdoom('all', batch=1)


def test_what_ends_at_the_time_limit_by_itself_has_ended():
    gymnasium = pytest.importorskip('gymnasium', reason='the extra gym is not installed')

    class TenSteps(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.ones(1, np.float32), 1.0, self.steps == 10, False, {}

    gymnasium.register('TenSteps-v0', TenSteps, max_episode_steps=10)
    environment = host_gymnasium.make_gym('TenSteps-v0', batch=1)
    environment.reset()
    for _ in range(10):
        environment.send(np.array([0]))
        step = environment.recv()
    assert step.is_last[0] and step.discount[0] == 0
    environment.close()


def test_every_evaluation_has_other_episodes():
    pytest.importorskip('gymnasium', reason='the extra gym is not installed')
    environment = host_gymnasium.make_gym('CartPole-v1', batch=2)
    starts = [environment.reset().observation['features'] for _ in range(2)]
    assert (starts[0] != starts[1]).all()
    environment.close()


def test_a_scenario_that_is_cut_shows_a_screen_from_which_it_goes_on():
    pytest.importorskip('vizdoom', reason='the extra vizdoom is not installed')
    environment = host_gymnasium.make_vizdoom('basic,health_gathering', batch=2)
    environment.reset()
    ends = {}
    for _ in range(120):  # basic is cut after 75 steps, health_gathering ends before by itself
        environment.send(np.zeros(2, np.int32))
        step = environment.recv()
        for row in np.flatnonzero(step.is_last):
            assert step.observation['pixels'][row].std() > 1  # not the package's black screen
            ends.setdefault(int(row), float(step.discount[row]))
    assert ends == {0: 1.0, 1: 0.0}
    environment.close()
