"""The contract of `deepmind_lab`, enforced: what the real engine refuses, this one refuses.

A level's episodes last 3 steps of 4 frames; a step's reward is the sum of the action's entries
times `num_steps`. The pixels are filled with the number of the step.
"""

import os

import numpy as np


class Lab:
    def __init__(self, level, observations, config=None, renderer='software', level_cache=None):
        for value in (level, renderer):
            if type(value) is not str:
                raise TypeError(f'must be str, not {type(value).__name__}')
        if type(observations) is not list or not set(observations) <= {'RGB_INTERLEAVED', 'INSTR'}:
            raise ValueError(f'Unknown observations {observations!r}')
        for key, value in config.items():
            if type(key) is not str or type(value) is not str:
                raise TypeError('config must be a dict of str to str')
        if renderer not in ('software', 'hardware'):
            raise ValueError(f'unknown renderer {renderer}')
        name = level.removeprefix('contributed/dmlab30/')
        if name == level:
            raise RuntimeError(f'Level not found: {level}')
        if name.endswith('_test') and config.get('allowHoldOutLevels') != 'true':
            raise RuntimeError('Hold-out levels are not allowed')
        if renderer == 'hardware':
            os._exit(1)  # as an engine without its libraries
        self._name, self._observations, self._cache = name, observations, level_cache
        self._shape = (int(config['height']), int(config['width']), 3)
        self._running = False

    def reset(self, episode=-1, seed=None):
        if seed is not None and type(seed) is not int:
            raise TypeError('seed must be int')
        if self._cache is not None:
            path = f'{os.getcwd()}/{os.getpid()}.pk3'
            if not self._cache.fetch(self._name, path):
                with open(path, 'w') as file:
                    file.write(self._name)
                self._cache.write(self._name, path)
            os.remove(path)
        self._running, self._steps = True, 0

    def step(self, action, num_steps=1):
        if not self._running:
            raise RuntimeError('Environment in wrong status, call reset before stepping.')
        if not isinstance(action, np.ndarray) or action.dtype != np.intc or action.shape != (7,):
            raise ValueError('action must have shape (7) and dtype np.intc')
        self._steps += 1
        self._running = self._steps < 3
        return float(action.sum() * num_steps)

    def observations(self):
        if not self._running:
            raise RuntimeError('Environment in wrong status for call to observations()')
        values = {
            'RGB_INTERLEAVED': np.full(self._shape, self._steps, np.uint8),
            'INSTR': 'Pick the red key' if self._name.startswith('language') else '',
        }
        return {name: values[name] for name in self._observations}

    def is_running(self):
        return self._running

    def close(self):
        self._running = False
