"""Gymnasium (Towers et al., 2024): environments with discrete actions, and ViZDoom's scenarios.

A new episode starts one step later (see `spec`), as in gymnasium's AutoresetMode.NEXT_STEP.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mi.config import UserError, format_error, suggest, suggest_install
from mi.rl.envs import spaces
from mi.rl.envs.spec import Spec, Step

# Task → the middle of the package's id. Deathmatch is left out: some of its buttons are continuous.
VIZDOOM = {
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


class GymVector:
    """A `HostEnvironment` of B gymnasium environments with the same spaces."""

    def __init__(
        self,
        spec: Spec,
        makers: Sequence[Callable[[], Any]],
        tasks: Sequence[int],
        *,
        seed: int,
        asynchronous: bool,
    ):
        """One maker and one task for each row; `spec.observation` has one entry beside 'task'."""
        import gymnasium

        self.spec = spec
        self.batch = len(makers)
        self._seed: int | None = seed
        self._asynchronous, self._skips = asynchronous, False
        self._entry = next(name for name in spec.observation if name != 'task')
        self._task = np.array(tasks, np.int32)
        self._last = np.zeros(self.batch, bool)
        self._actions = np.zeros(self.batch, np.int64)
        makers = [_Skippable(maker) for maker in makers]
        options: dict[str, Any] = {'autoreset_mode': gymnasium.vector.AutoresetMode.NEXT_STEP}
        if asynchronous:  # a fork would copy the locks of JAX's threads
            self._vector: Any = gymnasium.vector.AsyncVectorEnv(makers, context='spawn', **options)
        else:
            self._vector = gymnasium.vector.SyncVectorEnv(makers, **options)

    def reset(self) -> Step:
        if self._skips:
            self.skip(np.zeros(self.batch, bool))
        observation, _ = self._vector.reset(seed=self._seed)
        self._seed = None  # the next time, other episodes
        zero, no = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        self._last = no
        return Step(self._observe(observation), zero, zero + 1, ~no, no, no)

    def skip(self, rows: np.ndarray) -> None:
        """As in `SkipsRows`."""
        self._skips = bool(rows.any())
        self._vector.set_attr('is_idle', rows.tolist())
        self._last = self._last & ~rows

    def send(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions, np.int64)
        if self._asynchronous:
            self._vector.step_async(self._actions)

    def recv(self) -> Step:
        if self._asynchronous:
            observation, reward, terminated, truncated, _ = self._vector.step_wait()
        else:
            observation, reward, terminated, truncated, _ = self._vector.step(self._actions)
        first, last = self._last, terminated | truncated
        self._last = last
        with np.errstate(over='ignore'):  # what is too large is inf, and refused as such
            reward = reward.astype(np.float32)
        return Step(
            observation=self._observe(observation),
            reward=reward,
            discount=np.where(terminated, 0, 1).astype(np.float32),
            is_first=first,
            is_last=last,
            success=np.zeros(self.batch, bool),
        )

    def close(self) -> None:
        self._vector.close()

    def _observe(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        dtype = self.spec.observation[self._entry].dtype
        return {self._entry: observation.astype(dtype, copy=False), 'task': self._task}


def make_gym(
    suite: str, *, batch: int, seed: int = 0, asynchronous: bool = False, **arguments: Any
) -> GymVector:
    """Make B rows of one gymnasium id, as 'CartPole-v1' or 'module:Id-v0'.

    A module is imported first, so that it can register ids of its own. What is seen is 'pixels' or
    'features', and actions are numbered from 0: see `mi.rl.envs.spaces`.

    Args:
      suite: the id.
      batch: B.
      seed: seed of row 0; row i has seed + i.
      asynchronous: whether each row runs in a process of its own.
      arguments: arguments of the environment's own constructor.

    Raises:
      UserError: if the environment cannot be made, has other spaces, or gymnasium is not installed.
    """
    # Read the spaces from one environment.
    gymnasium = _gymnasium('gym')
    probe_env = _first(gymnasium, suite, arguments)
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
    makers = [_Maker(suite, arguments)] * batch
    return GymVector(spec, makers, [0] * batch, seed=seed, asynchronous=asynchronous)


def _first(gymnasium: Any, suite: str, arguments: Mapping[str, Any]) -> Any:
    """Make an environment by its id; an error of its module or constructor becomes one line."""
    if not suite:
        raise UserError("gymnasium needs an id, as in 'gymnasium/CartPole-v1'")
    try:
        return _make(suite, **arguments)
    except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound) as error:
        known = [name for name in gymnasium.registry if '/' not in name]
        raise UserError(
            f"gymnasium/{suite} is unknown; {suggest(suite, known)}. An id of one's own has its "
            f"module in front, as 'my_module:MyEnv-v0'"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f'gymnasium/{suite}: {format_error(error).rstrip(".")}; install it, or put its '
            f'directory on PYTHONPATH'
        ) from error
    except Exception as error:  # foreign code may raise anything
        given_arguments = ' '.join(repr(dict(arguments)).split())
        raise UserError(
            f'gymnasium/{suite} cannot be made: {type(error).__name__}: {format_error(error)}; the '
            f'arguments of its constructor are config.env.options = {given_arguments}'
        ) from error


def make_vizdoom(suite: str, *, batch: int, seed: int = 0, asynchronous: bool = False) -> GymVector:
    """Make scenarios of ViZDoom (Kempka et al., 2016) as tasks, through its gymnasium wrappers.

    Observations: 'pixels' [60, 80, 3] uint8, the screen of 320 × 240 averaged over 4 × 4 pixels.
    Every action is repeated 4 times. Action 0 presses nothing; the others press one button each:
    those that any of the tasks has, by name. Where a task lacks the button, nothing is pressed.

    Args:
      suite: names in VIZDOOM joined by commas; 'all' or '' for all.
      batch: B, at least one row for each task; row i has task i modulo their number.
      seed, asynchronous: as in `make_gym`.

    Raises:
      UserError: on an unknown word, too few rows, or if vizdoom is not installed.
    """
    # Check the tasks and the batch.
    _gymnasium('vizdoom')
    _doom()
    tasks = tuple(VIZDOOM) if suite in ('', 'all') else tuple(dict.fromkeys(suite.split(',')))
    for task in tasks:
        if task not in VIZDOOM:
            raise UserError(f'vizdoom/{task} is unknown; {suggest(task, (*VIZDOOM, "all"))}')
    if batch < len(tasks):
        raise UserError(
            f'vizdoom has {len(tasks)} tasks but the batch has only {batch} environments: expected '
            f'at least one per task. Raise config.actors.batch or name fewer tasks'
        )

    # Collect the buttons of all tasks.
    buttons: dict[str, None] = {}
    for task in tasks:
        probe_env = _make(_doom_id(task), **_DOOM_OPTIONS)
        buttons |= dict.fromkeys(_buttons(probe_env))
        probe_env.close()
    spec = Spec(
        name='vizdoom',
        observation={
            'pixels': jax.ShapeDtypeStruct((60, 80, 3), np.uint8),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=1 + len(buttons),
        tasks=tasks,
        has_success=False,
    )
    rows = [row % len(tasks) for row in range(batch)]
    makers = [_DoomMaker(tasks[task], tuple(buttons)) for task in rows]
    return GymVector(spec, makers, rows, seed=seed, asynchronous=asynchronous)


_DOOM_OPTIONS = {'frame_skip': VIZDOOM_REPEAT, 'max_buttons_pressed': 1}


class _Maker:
    """A picklable maker of an environment by its id, with the agent's spaces."""

    def __init__(self, name: str, arguments: Mapping[str, Any]):
        self.name, self.arguments = name, dict(arguments)

    def __call__(self) -> Any:
        import gymnasium

        env = _make(self.name, **self.arguments)
        entry, shape, convert = spaces.observation(env.observation_space)
        number, decode = spaces.actions(env.action_space)
        low, high, dtype = (
            (0, 255, np.uint8) if entry == 'pixels' else (-np.inf, np.inf, np.float32)
        )
        space = gymnasium.spaces.Box(low, high, shape, dtype)
        env = gymnasium.wrappers.TransformObservation(env, convert, space)
        return gymnasium.wrappers.TransformAction(env, decode, gymnasium.spaces.Discrete(number))


class _Skippable:
    """A picklable maker of an environment that repeats its last observation while `is_idle`."""

    def __init__(self, maker: Callable[[], Any]):
        self.maker = maker

    def __call__(self) -> Any:
        import gymnasium

        class Skippable(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
            is_idle = False
            _seen: Any = None

            def reset(self, **arguments: Any) -> Any:
                if self.is_idle:
                    return self._seen, {}
                self._seen, info = self.env.reset(**arguments)
                return self._seen, info

            def step(self, action: Any) -> Any:
                if self.is_idle:
                    return self._seen, 0.0, False, False, {}
                self._seen, *rest = self.env.step(action)
                return self._seen, *rest

        return Skippable(self.maker())


class _DoomMaker:
    """A picklable maker of a scenario with the pixels and buttons that all tasks share."""

    def __init__(self, task: str, buttons: tuple[str, ...]):
        self.task, self.buttons = task, buttons

    def __call__(self) -> Any:
        import gymnasium

        _doom()
        env = _make(_doom_id(self.task), **_DOOM_OPTIONS)
        env.unwrapped.game.set_doom_config_path(os.devnull)  # otherwise written to the cwd
        env_buttons = _buttons(env)
        # The package's action k presses the buttons of row k of its map.
        presses = [tuple(row) for row in env.unwrapped.button_map]
        table = [0] + [
            presses.index(tuple(int(name == button) for name in env_buttons))
            if button in env_buttons
            else 0
            for button in self.buttons
        ]
        env = gymnasium.wrappers.TransformAction(
            env, lambda action: table[action], gymnasium.spaces.Discrete(len(table))
        )
        pixels = gymnasium.spaces.Box(0, 255, (60, 80, 3), np.uint8)
        return gymnasium.wrappers.TransformObservation(_ends(env), _screen, pixels)


def _ends(env: Any) -> Any:
    """Wrap ViZDoom's environment so that its episodes end as gymnasium's do.

    Its own wrapper returns a black screen after the last step, from which a truncated episode would
    bootstrap: this one returns the previous screen. It also reports episodes that the time limit
    cut as truncated only, not as terminated.
    """
    import gymnasium

    class Ends(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
        _seen: Any = None

        def reset(self, **arguments: Any) -> Any:
            self._seen, info = self.env.reset(**arguments)
            return self._seen, info

        def step(self, action: Any) -> Any:
            observation, reward, terminated, truncated, info = self.env.step(action)
            if not (terminated or truncated):
                self._seen = observation
            return self._seen, reward, terminated and not truncated, truncated, info

    return Ends(env)


def _screen(observation: dict[str, np.ndarray]) -> np.ndarray:
    blocks = observation['screen'].reshape(60, 4, 80, 4, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float32).astype(np.uint8)


def _buttons(env: Any) -> list[str]:
    return [button.name for button in env.unwrapped.game.get_available_buttons()]


def _doom_id(task: str) -> str:
    return f'Vizdoom{VIZDOOM[task]}-v1'


def _make(name: str, **options: Any) -> Any:
    import gymnasium

    with warnings.catch_warnings():  # about newer versions of an id
        warnings.simplefilter('ignore', DeprecationWarning)
        return gymnasium.make(name, **options)


def _doom() -> None:
    """Register ViZDoom's ids."""
    try:
        import vizdoom.gymnasium_wrapper  # noqa: F401
    except ImportError as error:
        raise UserError(f'vizdoom is not installed. Try {suggest_install("vizdoom")}') from error


def _gymnasium(extra: str) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f'gymnasium is not installed. Try {suggest_install(extra)}') from error
    return gymnasium
