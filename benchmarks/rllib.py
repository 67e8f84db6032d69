"""RLlib's IMPALA on the environments of `benchmarks.rl`, in an ordinary configuration.

Each of RLlib's sub-environments is one EnvPool game or level. For Pong, the network has the
convolutions of DQN and 512 features, like ours. RLlib's models cannot encode instructions, so for
BabyAI the network reads the one-hot grid and a bag of the instruction's words through two dense
layers and an LSTM-128. That is less work than ours.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

import envpool
import gymnasium
import ml_collections
import numpy as np

from mi.rl import envs
from mi.rl.envs.spec import Step


class Pong(gymnasium.Env[np.ndarray, int]):
    """One EnvPool game of Pong, with frames [84, 84, 4] in [0, 1]."""

    def __init__(self, config: Any):
        del config
        self._pool = envpool.make('Pong-v5', 'gymnasium', num_envs=1, stack_num=4)
        self.action_space = gymnasium.spaces.Discrete(int(self._pool.action_space.n))
        self.observation_space = gymnasium.spaces.Box(0, 1, (84, 84, 4), np.float32)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        del options
        return self._frames(self._pool.reset()[0]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        frames, reward, terminated, truncated, _ = self._pool.step(np.array([action]))
        ended = bool(terminated[0]), bool(truncated[0])
        return self._frames(frames), float(reward[0]), *ended, {}

    def _frames(self, frames: np.ndarray) -> np.ndarray:
        return frames[0].transpose(1, 2, 0).astype(np.float32) / 255


class BabyAI(gymnasium.Env[np.ndarray, int]):
    """One BabyAI environment from our pools. Successive instances cycle through the levels."""

    instances = itertools.count()

    def __init__(self, config: Any):
        instance = next(self.instances)
        suite, _, levels = config['name'].partition('/')
        level = levels.split(',')[instance % len(levels.split(','))]
        self._pool = envs.pool(f'{suite}/{level}', 1, 1000 * config.worker_index + instance)
        spec = self._pool.spec
        self._vocabulary = spec.vocabulary
        self.action_space = gymnasium.spaces.Discrete(spec.actions)
        num_features = len(self._observe(self._pool.reset()))
        self.observation_space = gymnasium.spaces.Box(0, 1, (num_features,), np.float32)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        del options
        return self._observe(self._pool.reset()), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._pool.send(np.array([action], np.int32))
        env_step = self._pool.recv()
        is_terminated = bool(env_step.discount[0] == 0)
        is_truncated = bool(env_step.is_last[0] and env_step.discount[0] != 0)
        reward = float(env_step.reward[0])
        return self._observe(env_step), reward, is_terminated, is_truncated, {}

    def _observe(self, env_step: Step) -> np.ndarray:
        observation = env_step.observation
        grid = observation['grid'][0]
        one_hots = [grid[..., channel, None] == np.arange(11) for channel in range(grid.shape[-1])]
        words = np.zeros(self._vocabulary)
        words[observation['instruction'][0]] = 1
        return np.concatenate([*(one_hot.ravel() for one_hot in one_hots), words]).astype(
            np.float32
        )


def make_step(set_name: str, config: ml_collections.ConfigDict) -> Callable[[], float]:
    """Return a function that trains until the next update and returns the number of updates.

    The number is in units of our batches.
    """
    import ray
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    # By default the priority of its processes is so low that they starve on two cores.
    os.environ.update({'RAY_worker_niceness': '0'})
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)  # processes, not cores
    num_steps, batch_size, loss = config.train.length, config.train.batch, config.loss
    # Environment and network.
    if set_name == 'pong':
        environment, env_config = Pong, {}
        model_config = DefaultModelConfig(
            conv_filters=[[32, 8, 4], [64, 4, 2], [64, 3, 1]],
            conv_activation='relu',
            head_fcnet_hiddens=[512],
            vf_share_layers=True,
        )
    else:
        environment, env_config = BabyAI, {'name': config.env.name}
        model_config = DefaultModelConfig(
            fcnet_hiddens=[128, 128], use_lstm=True, lstm_cell_size=128, max_seq_len=num_steps,
            vf_share_layers=True,
        )  # fmt: skip
    # The algorithm, with our sizes and losses.
    algorithm = (
        IMPALAConfig()
        .environment(environment, env_config=env_config)
        .env_runners(
            num_env_runners=2,
            num_envs_per_env_runner=batch_size // 4,
            rollout_fragment_length=num_steps,
        )
        .learners(num_learners=0)
        .rl_module(model_config=model_config)
        .training(
            train_batch_size_per_learner=batch_size * num_steps,
            lr=config.optim.learning_rate,
            gamma=loss.discount,
            entropy_coeff=loss.entropy_cost,
            vf_loss_coeff=loss.baseline_cost,
            grad_clip=config.optim.clip_norm,
        )
        .reporting(min_time_s_per_iteration=2)
        .build_algo()
    )
    trained_steps = 0

    def step() -> float:
        nonlocal trained_steps
        start_steps = trained_steps
        while trained_steps == start_steps:
            learners = algorithm.train().get('learners', {})  # empty until the first update
            trained_counts = learners.get('__all_modules__', {})
            trained_steps = trained_counts.get('num_env_steps_trained_lifetime', start_steps)
        return (trained_steps - start_steps) / (batch_size * num_steps)

    return step
