"""Gymnasium ids of one's own, for the tests: 'tests.rl.envs.foreign:Id-v0'."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Foreign(gymnasium.Env):
    """Any spaces; episodes of five steps with reward 1 a step."""

    def __init__(self, observation_space=None, action_space=None, reward=1.0, ends=True):
        features, number = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(3)
        self.observation_space = features if observation_space is None else observation_space
        self.action_space = number if action_space is None else action_space
        self._reward, self._ends = reward, ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self._time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self._time += 1
        is_over = self._ends and self._time >= 5
        return self.observation_space.sample(), self._reward, is_over, False, {}


class Raises(Foreign):
    def __init__(self):
        raise RuntimeError('no display\nis there')


class Wants(Foreign):
    def __init__(self, size):
        super().__init__(spaces.Box(-1, 1, (size,), np.float32))


gymnasium.register('Foreign-v0', entry_point=Foreign, disable_env_checker=True)
gymnasium.register('Raises-v0', entry_point=Raises)
gymnasium.register('Wants-v0', entry_point=Wants)
