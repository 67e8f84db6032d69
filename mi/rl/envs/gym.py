"""Gymnasium (Towers et al., 2024): any environment with discrete actions, and ViZDoom's scenarios.

A new episode starts one step later (see `spec`), as in gymnasium's AutoresetMode.NEXT_STEP.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mi.config import UserError, nearest
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
        self._asynchronous = asynchronous
        self._entry = next(name for name in spec.observation if name != 'task')
        self._task = np.array(tasks, np.int32)
        self._last = np.zeros(self.batch, bool)
        self._actions = np.zeros(self.batch, np.int64)
        options: dict[str, Any] = {'autoreset_mode': gymnasium.vector.AutoresetMode.NEXT_STEP}
        if asynchronous:  # a fork would copy the locks of JAX's threads
            self._vector: Any = gymnasium.vector.AsyncVectorEnv(makers, context='spawn', **options)
        else:
            self._vector = gymnasium.vector.SyncVectorEnv(makers, **options)

    def reset(self) -> Step:
        seen, _ = self._vector.reset(seed=self._seed)
        self._seed = None  # the next time, other episodes
        zero, no = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        self._last = no
        return Step(self._observe(seen), zero, zero + 1, ~no, no, no)

    def send(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions, np.int64)
        if self._asynchronous:
            self._vector.step_async(self._actions)

    def recv(self) -> Step:
        if self._asynchronous:
            seen, reward, terminated, truncated, _ = self._vector.step_wait()
        else:
            seen, reward, terminated, truncated, _ = self._vector.step(self._actions)
        first, last = self._last, terminated | truncated
        self._last = last
        return Step(
            observation=self._observe(seen),
            reward=reward.astype(np.float32),
            discount=np.where(terminated, 0, 1).astype(np.float32),
            is_first=first,
            is_last=last,
            success=np.zeros(self.batch, bool),
        )

    def close(self) -> None:
        self._vector.close()

    def _observe(self, seen: np.ndarray) -> dict[str, np.ndarray]:
        dtype = self.spec.observation[self._entry].dtype
        return {self._entry: seen.astype(dtype, copy=False), 'task': self._task}


def make_gym(suite: str, *, batch: int, seed: int = 0, asynchronous: bool = False) -> GymVector:
    """B rows of one gymnasium id, as 'CartPole-v1'.

    A one-dimensional box is 'features' [n] float32, a box [h, w, c] of uint8 is 'pixels'.

    Args:
      suite: the id.
      batch: B.
      seed: of row 0; row i has seed + i.
      asynchronous: whether each row runs in a process of its own.

    Raises:
      UserError: on an unknown id, other spaces, or if gymnasium is not installed.
    """
    gymnasium = _gymnasium('gym')
    try:
        one = gymnasium.make(suite)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f'gymnasium/{suite}: {error}') from error
    except gymnasium.error.Error as error:
        known = [name for name in gymnasium.registry if '/' not in name]
        raise UserError(f'gymnasium/{suite} is unknown; {nearest(suite, known)}') from error
    space, actions = one.observation_space, one.action_space
    limit = one.spec.max_episode_steps or 0
    one.close()
    if not isinstance(actions, gymnasium.spaces.Discrete) or actions.start != 0:
        raise UserError(
            f'gymnasium/{suite} has actions {actions}: expected Discrete, counted from 0'
        )
    if not isinstance(space, gymnasium.spaces.Box) or not (
        len(space.shape) == 1 or (len(space.shape) == 3 and space.dtype == np.uint8)
    ):
        raise UserError(
            f'gymnasium/{suite} observes {space}: expected a Box [n], or [h, w, c] of uint8'
        )
    entry, dtype = ('features', np.float32) if len(space.shape) == 1 else ('pixels', np.uint8)
    spec = Spec(
        name='gym',
        observation={
            entry: jax.ShapeDtypeStruct(space.shape, dtype),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=int(actions.n),
        tasks=(suite,),
        episode=limit,
    )
    makers = [_Maker(suite)] * batch
    return GymVector(spec, makers, [0] * batch, seed=seed, asynchronous=asynchronous)


def make_vizdoom(suite: str, *, batch: int, seed: int = 0, asynchronous: bool = False) -> GymVector:
    """Scenarios of ViZDoom (Kempka et al., 2016) as tasks, through its gymnasium wrappers.

    Observations: 'pixels' [60, 80, 3] uint8, the screen of 320 × 240 averaged over 4 × 4 pixels.
    Every action is repeated 4 times. Action 0 presses nothing; the others press one button each:
    those that any of the tasks has, by name. Where a task lacks the button, nothing is pressed.

    Args:
      suite: words of VIZDOOM joined by commas; 'all' or '' for all.
      batch: B, at least one row for each task; row i has task i modulo their number.
      seed, asynchronous: as in `make_gym`.

    Raises:
      UserError: on an unknown word, too few rows, or if vizdoom is not installed.
    """
    _gymnasium('vizdoom')
    _doom()
    tasks = tuple(VIZDOOM) if suite in ('', 'all') else tuple(dict.fromkeys(suite.split(',')))
    for task in tasks:
        if task not in VIZDOOM:
            raise UserError(f'vizdoom/{task} is unknown; {nearest(task, (*VIZDOOM, "all"))}')
    if batch < len(tasks):
        raise UserError(
            f'{batch} rows for the {len(tasks)} tasks of vizdoom: expected a row for each; raise '
            f'config.actors.batch or name fewer tasks'
        )
    buttons: dict[str, None] = {}
    for task in tasks:
        one = _make(_doom_id(task), **_DOOM_OPTIONS)
        buttons |= dict.fromkeys(_buttons(one))
        one.close()
    spec = Spec(
        name='vizdoom',
        observation={
            'pixels': jax.ShapeDtypeStruct((60, 80, 3), np.uint8),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=1 + len(buttons),
        tasks=tasks,
    )
    rows = [row % len(tasks) for row in range(batch)]
    makers = [_DoomMaker(tasks[task], tuple(buttons)) for task in rows]
    return GymVector(spec, makers, rows, seed=seed, asynchronous=asynchronous)


_DOOM_OPTIONS = {'frame_skip': VIZDOOM_REPEAT, 'max_buttons_pressed': 1}


class _Maker:
    """Makes an environment by its id, in whatever process it is called."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> Any:
        return _make(self.name)


class _DoomMaker:
    """Makes a scenario with the pixels and the buttons that all tasks share."""

    def __init__(self, task: str, buttons: tuple[str, ...]):
        self.task, self.buttons = task, buttons

    def __call__(self) -> Any:
        import gymnasium

        _doom()
        env = _make(_doom_id(self.task), **_DOOM_OPTIONS)
        env.unwrapped.game.set_doom_config_path(os.devnull)  # else written where the user stands
        own = _buttons(env)
        # The package's action k presses the buttons of row k of its map.
        presses = [tuple(row) for row in env.unwrapped.button_map]
        table = [0] + [
            presses.index(tuple(int(name == button) for name in own)) if button in own else 0
            for button in self.buttons
        ]
        env = gymnasium.wrappers.TransformAction(
            env, lambda action: table[action], gymnasium.spaces.Discrete(len(table))
        )
        pixels = gymnasium.spaces.Box(0, 255, (60, 80, 3), np.uint8)
        return gymnasium.wrappers.TransformObservation(_ends(env), _screen, pixels)


def _ends(env: Any) -> Any:
    """ViZDoom's episodes end as gymnasium's do.

    Its wrapper shows a black screen after the last step, from whose value an episode that was cut
    would be bootstrapped: the screen before is shown instead. And it calls an episode that was cut
    by the time limit terminated too.
    """
    import gymnasium

    class Ends(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
        def reset(self, **arguments: Any) -> Any:
            self._seen, info = self.env.reset(**arguments)
            return self._seen, info

        def step(self, action: Any) -> Any:
            seen, reward, terminated, truncated, info = self.env.step(action)
            if not (terminated or truncated):
                self._seen = seen
            return self._seen, reward, terminated and not truncated, truncated, info

    return Ends(env)


def _screen(seen: dict[str, np.ndarray]) -> np.ndarray:
    blocks = seen['screen'].reshape(60, 4, 80, 4, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float32).astype(np.uint8)


def _buttons(env: Any) -> list[str]:
    return [button.name for button in env.unwrapped.game.get_available_buttons()]


def _doom_id(task: str) -> str:
    return f'Vizdoom{VIZDOOM[task]}-v1'


def _make(name: str, **options: Any) -> Any:
    import gymnasium

    with warnings.catch_warnings():  # that there is a newer version of an id
        warnings.simplefilter('ignore', DeprecationWarning)
        return gymnasium.make(name, **options)


def _doom() -> None:
    """Registers ViZDoom's ids."""
    try:
        import vizdoom.gymnasium_wrapper  # noqa: F401
    except ImportError as error:
        raise UserError(
            'vizdoom is not installed; pip install multiplicative-interactions[vizdoom]'
        ) from error


def _gymnasium(extra: str) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(
            f'gymnasium is not installed; pip install multiplicative-interactions[{extra}]'
        ) from error
    return gymnasium
