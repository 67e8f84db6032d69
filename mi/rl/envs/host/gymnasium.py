"""Gymnasium environments (Towers et al., 2024) with discrete actions, and ViZDoom's scenarios.

A new episode starts one step later (see `spec`), as in gymnasium's AutoresetMode.NEXT_STEP.
"""

import functools
import os
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import chex
import jax
import numpy as np

from mi.config import UserError, format_error, suggest, suggest_install
from mi.rl.envs import spaces
from mi.rl.envs.check import check_batch
from mi.rl.envs.spec import Spec, Step

# Task → the middle of the package's id. Deathmatch is left out: some of its buttons are continuous.
SCENARIOS = {
    'basic': 'Basic',
    'deadly_corridor': 'DeadlyCorridor',
    'defend_center': 'DefendCenter',
    'defend_line': 'DefendLine',
    'health_gathering': 'HealthGathering',
    'health_gathering_supreme': 'HealthGatheringSupreme',
    'my_way_home': 'MyWayHome',
    'predict_position': 'PredictPosition',
    'take_cover': 'TakeCover',
}
VIZDOOM_REPEAT = 4
_VIZDOOM_OPTIONS = {'frame_skip': VIZDOOM_REPEAT, 'max_buttons_pressed': 1}

Env = Any  # gymnasium.Env; the package is optional
EnvMaker = Callable[[], Env]
Arguments = Mapping[str, object]  # of an environment's constructor
Info = dict[str, Any]
EnvStep = tuple[chex.ArrayTree, SupportsFloat, bool, bool, Info]


class GymVector:
    """A `HostEnvironment` made of B gymnasium environments with the same spaces."""

    def __init__(
        self,
        spec: Spec,
        env_makers: Sequence[EnvMaker],
        tasks: Sequence[int],
        *,
        seed: int,
        asynchronous: bool,
    ):
        """Make the environments, from one maker and one task for each row.

        `spec.observation` must have exactly one entry besides 'task'.
        """
        import gymnasium

        self.spec = spec
        self.batch = len(env_makers)
        self._seed: int | None = seed
        self._asynchronous, self._skips = asynchronous, False
        self._entry = next(name for name in spec.observation if name != 'task')
        self._task = np.array(tasks, np.int32)
        self._was_last = np.zeros(self.batch, bool)
        self._actions = np.zeros(self.batch, np.int64)
        make_vector: Callable[..., Env] = gymnasium.vector.SyncVectorEnv
        if asynchronous:  # a fork would copy the locks of JAX's threads
            make_vector = functools.partial(gymnasium.vector.AsyncVectorEnv, context='spawn')
        self._vector = make_vector(
            [_SkippableMaker(maker) for maker in env_makers],
            autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP,
        )

    def reset(self) -> Step:
        if self._skips:
            self.skip(np.zeros(self.batch, bool))
        observation, _ = self._vector.reset(seed=self._seed)
        self._seed = None  # later resets begin other episodes
        zero_reward, no_flag = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        self._was_last = no_flag
        return Step(
            self._observe(observation), zero_reward, zero_reward + 1, ~no_flag, no_flag, no_flag
        )

    def skip(self, rows: np.ndarray) -> None:
        """Skip rows until `reset`. See `SkipsRows`."""
        self._skips = bool(rows.any())
        self._vector.set_attr('is_idle', rows.tolist())
        self._was_last = self._was_last & ~rows

    def send(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions, np.int64)
        if self._asynchronous:
            self._vector.step_async(self._actions)

    def recv(self) -> Step:
        if self._asynchronous:
            observation, reward, terminated, truncated, _ = self._vector.step_wait()
        else:
            observation, reward, terminated, truncated, _ = self._vector.step(self._actions)
        is_first, is_last = self._was_last, terminated | truncated
        self._was_last = is_last
        with np.errstate(over='ignore'):  # what is too large is inf, and refused as such
            reward = reward.astype(np.float32)
        return Step(
            observation=self._observe(observation),
            reward=reward,
            discount=np.where(terminated, 0, 1).astype(np.float32),
            is_first=is_first,
            is_last=is_last,
            success=np.zeros(self.batch, bool),
        )

    def close(self) -> None:
        self._vector.close()

    def _observe(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        dtype = self.spec.observation[self._entry].dtype
        return {self._entry: observation.astype(dtype, copy=False), 'task': self._task}


def make_gym(
    suite: str, *, batch: int, seed: int = 0, asynchronous: bool = False, **env_arguments: Any
) -> GymVector:
    """Make a batch of gymnasium environments with one id, such as 'CartPole-v1' or 'module:Id-v0'.

    A module before the colon is imported first, so that it can register its own ids. Observations
    become 'pixels' or 'features', and actions are numbered from 0. See `mi.rl.envs.spaces`.

    Args:
      suite: the id.
      batch: number of environments, B.
      seed: seed of row 0. Row i has seed + i.
      asynchronous: whether each row runs in its own process.
      env_arguments: arguments of the environment's constructor.

    Raises:
      UserError: if the environment cannot be made, its spaces are not supported, or gymnasium is
        not installed.
    """
    # Read the spaces from one environment.
    gymnasium = _import_gymnasium('gym')
    probe_env = _make_probe_env(gymnasium, suite, env_arguments)
    try:
        entry, shape, _ = spaces.observation(probe_env.observation_space)
        actions, _ = spaces.actions(probe_env.action_space)
    except UserError as error:
        raise UserError(f'gymnasium/{suite}: {error}') from error
    finally:
        probe_env.close()

    # Describe them, and make one environment for each row.
    spec = Spec(
        name=f'gymnasium/{suite}',
        observation={
            entry: jax.ShapeDtypeStruct(shape, np.uint8 if entry == 'pixels' else np.float32),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=actions,
        tasks=(suite,),
        episode=probe_env.spec.max_episode_steps or 0,
        has_success=False,
    )
    env_makers = [_GymMaker(suite, env_arguments)] * batch
    return GymVector(spec, env_makers, [0] * batch, seed=seed, asynchronous=asynchronous)


def _make_probe_env(gymnasium: types.ModuleType, env_id: str, arguments: Arguments) -> Env:
    """Make an environment by its id, and shorten an error from its code to one line."""
    if not env_id:
        raise UserError("'gymnasium': expected an id after a slash, as in 'gymnasium/CartPole-v1'")
    try:
        return _make_env(env_id, **arguments)
    except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound) as error:
        known_ids = [known_id for known_id in gymnasium.registry if '/' not in known_id]
        raise UserError(
            f'gymnasium/{env_id} is unknown; {suggest(env_id, known_ids)}. To use your own id, '
            f"add its module, as in 'my_module:MyEnv-v0'"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f'gymnasium/{env_id}: {format_error(error).rstrip(".")}. Install it, or put its '
            f'directory on PYTHONPATH'
        ) from error
    except Exception as error:  # foreign code may raise anything
        given_arguments = ' '.join(repr(dict(arguments)).split())
        raise UserError(
            f'gymnasium/{env_id} cannot be made: {type(error).__name__}: {format_error(error)}. '
            f'Check the arguments of its constructor, `options` = {given_arguments}'
        ) from error


def make_vizdoom(suite: str, *, batch: int, seed: int = 0, asynchronous: bool = False) -> GymVector:
    """Make a batch of ViZDoom scenarios (Kempka et al., 2016), one task each.

    Observations: 'pixels' [60, 80, 3] uint8, the screen of 320 × 240 averaged over 4 × 4 pixels.
    Every action is repeated 4 times. Action 0 presses nothing. Each other action presses one of the
    buttons that any of the tasks has, or nothing in a task without that button.

    Args:
      suite: names in `SCENARIOS` joined by commas, or 'all' or '' for all.
      batch: number of environments, B, at least one for each task. Row i has task i modulo the
        number of tasks.
      seed, asynchronous: as in `make_gym`.

    Raises:
      UserError: if a scenario is unknown, `batch` is too small, or vizdoom is not installed.
    """
    # Check the tasks and the batch.
    _import_gymnasium('vizdoom')
    _register_vizdoom()
    scenarios = tuple(SCENARIOS) if suite in ('', 'all') else tuple(dict.fromkeys(suite.split(',')))
    for scenario in scenarios:
        if scenario not in SCENARIOS:
            raise UserError(
                f'vizdoom/{scenario} is unknown; {suggest(scenario, (*SCENARIOS, "all"))}'
            )
    check_batch('vizdoom', len(scenarios), batch)

    # Collect the buttons of all tasks.
    buttons: dict[str, None] = {}
    for scenario in scenarios:
        probe_env = _make_env(_scenario_id(scenario), **_VIZDOOM_OPTIONS)
        buttons |= dict.fromkeys(_list_buttons(probe_env))
        probe_env.close()
    spec = Spec(
        name='vizdoom',
        observation={
            'pixels': jax.ShapeDtypeStruct((60, 80, 3), np.uint8),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=1 + len(buttons),
        tasks=scenarios,
        has_success=False,
    )

    # Deal the tasks out to the rows, in turn.
    row_tasks = [row % len(scenarios) for row in range(batch)]
    env_makers = [_ScenarioMaker(scenarios[task], tuple(buttons)) for task in row_tasks]
    return GymVector(spec, env_makers, row_tasks, seed=seed, asynchronous=asynchronous)


class _GymMaker:
    """A picklable function that makes an environment by its id, with the agent's spaces."""

    def __init__(self, env_id: str, arguments: Arguments):
        self.env_id, self.arguments = env_id, dict(arguments)

    def __call__(self) -> Env:
        import gymnasium

        env = _make_env(self.env_id, **self.arguments)
        entry, shape, convert = spaces.observation(env.observation_space)
        num_actions, decode = spaces.actions(env.action_space)
        agent_space = (
            gymnasium.spaces.Box(0, 255, shape, np.uint8)
            if entry == 'pixels'
            else gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        )
        env = gymnasium.wrappers.TransformObservation(env, convert, agent_space)
        return gymnasium.wrappers.TransformAction(
            env, decode, gymnasium.spaces.Discrete(num_actions)
        )


class _SkippableMaker:
    """A picklable function that makes an environment that can be skipped.

    While `is_idle` is True, the environment repeats its last observation.
    """

    def __init__(self, env_maker: EnvMaker):
        self.env_maker = env_maker

    def __call__(self) -> Env:
        import gymnasium

        class Skippable(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
            is_idle = False
            _last_observation: chex.ArrayTree = None

            def reset(self, **arguments: Any) -> tuple[chex.ArrayTree, Info]:
                if self.is_idle:
                    return self._last_observation, {}
                self._last_observation, info = self.env.reset(**arguments)
                return self._last_observation, info

            def step(self, action: chex.ArrayTree) -> EnvStep:
                if self.is_idle:
                    return self._last_observation, 0.0, False, False, {}
                env_step: EnvStep = self.env.step(action)
                self._last_observation = env_step[0]
                return env_step

        return Skippable(self.env_maker())


class _ScenarioMaker:
    """A picklable function that makes a scenario with the pixels and buttons of all tasks."""

    def __init__(self, scenario: str, buttons: tuple[str, ...]):
        self.scenario, self.buttons = scenario, buttons

    def __call__(self) -> Env:
        import gymnasium

        _register_vizdoom()
        env = _make_env(_scenario_id(self.scenario), **_VIZDOOM_OPTIONS)
        env.unwrapped.game.set_doom_config_path(os.devnull)  # otherwise written to the cwd

        # The package's action k presses the buttons of row k of its map.
        env_buttons = _list_buttons(env)
        pressed_buttons = [tuple(row) for row in env.unwrapped.button_map]
        package_actions = [0]
        for button in self.buttons:
            presses = tuple(int(env_button == button) for env_button in env_buttons)
            package_actions.append(pressed_buttons.index(presses) if any(presses) else 0)

        # Number the actions by the shared buttons, and shrink the screen.
        env = gymnasium.wrappers.TransformAction(
            env,
            lambda action: package_actions[action],
            gymnasium.spaces.Discrete(len(package_actions)),
        )
        pixel_space = gymnasium.spaces.Box(0, 255, (60, 80, 3), np.uint8)
        return gymnasium.wrappers.TransformObservation(
            _report_truncation(env), _downsample_screen, pixel_space
        )


def _report_truncation(env: Env) -> Env:
    """Wrap a ViZDoom environment so that its episodes end as in gymnasium.

    ViZDoom's own wrapper returns a black screen after the last step, from which a truncated episode
    would bootstrap. This one returns the previous screen. It also reports episodes that end at the
    time limit as truncated only, not as terminated.
    """
    import gymnasium

    class ReportsTruncation(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
        _last_observation: chex.ArrayTree = None

        def reset(self, **arguments: Any) -> tuple[chex.ArrayTree, Info]:
            self._last_observation, info = self.env.reset(**arguments)
            return self._last_observation, info

        def step(self, action: chex.ArrayTree) -> EnvStep:
            observation, reward, terminated, truncated, info = self.env.step(action)
            if not (terminated or truncated):
                self._last_observation = observation
            is_terminated = terminated and not truncated
            return self._last_observation, reward, is_terminated, truncated, info

    return ReportsTruncation(env)


def _downsample_screen(observation: dict[str, np.ndarray]) -> np.ndarray:
    blocks = observation['screen'].reshape(60, 4, 80, 4, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float32).astype(np.uint8)


def _list_buttons(env: Env) -> list[str]:
    return [button.name for button in env.unwrapped.game.get_available_buttons()]


def _scenario_id(scenario: str) -> str:
    return f'Vizdoom{SCENARIOS[scenario]}-v1'


def _make_env(env_id: str, **arguments: Any) -> Env:
    import gymnasium

    with warnings.catch_warnings():  # about newer versions of an id
        warnings.simplefilter('ignore', DeprecationWarning)
        return gymnasium.make(env_id, **arguments)


def _register_vizdoom() -> None:
    """Register ViZDoom's ids with gymnasium."""
    try:
        import vizdoom.gymnasium_wrapper  # noqa: F401
    except ImportError as error:
        raise UserError(f'vizdoom is not installed. Try {suggest_install("vizdoom")}') from error


def _import_gymnasium(extra: str) -> types.ModuleType:
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f'gymnasium is not installed. Try {suggest_install(extra)}') from error
    return gymnasium
