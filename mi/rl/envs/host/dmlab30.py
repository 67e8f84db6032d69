"""DMLab-30: thirty levels of DeepMind Lab (Beattie et al., 2016), one task each.

The engine, `deepmind_lab`, is built with bazel and installed by hand (docs/dmlab.md). A process can
run only one engine, so a batch of B rows consists of B spawned processes.

Observations: 'pixels' [72, 96, 3] uint8; 'instruction' [L], words hashed to 1000 tokens above the
padding; 'task'. Every action is repeated 4 times. Episodes end when their time is up, and the
engine has no observation after that. As in scalable_agent, a new episode starts immediately.

Levels, scores, the nine actions and the test levels are those of scalable_agent's dmlab30.py and
environments.py (Espeholt et al., 2018; read at commit cd66d00). The fifteen actions are those of
sample_factory's dmlab_gym.py (Petrenko et al., 2020; read), after Hessel et al. (2019; not read).
"""

import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mi.config import ArgumentError, UserError, suggest
from mi.rl.envs.check import check_batch
from mi.rl.envs.spec import Spec, Step
from mi.rl.envs.text import hashed

# Level → score of the uniform random policy, and of a human.
SCORES = {
    'rooms_collect_good_objects_train': (0.073, 10.0),
    'rooms_exploit_deferred_effects_train': (8.501, 85.65),
    'rooms_select_nonmatching_object': (0.312, 65.9),
    'rooms_watermaze': (4.065, 54.0),
    'rooms_keys_doors_puzzle': (4.135, 53.8),
    'language_select_described_object': (-0.07, 389.5),
    'language_select_located_object': (1.929, 280.7),
    'language_execute_random_task': (-5.913, 254.05),
    'language_answer_quantitative_question': (-0.33, 184.5),
    'lasertag_one_opponent_small': (-0.224, 12.65),
    'lasertag_three_opponents_small': (-0.214, 18.55),
    'lasertag_one_opponent_large': (-0.083, 18.6),
    'lasertag_three_opponents_large': (-0.102, 31.5),
    'natlab_fixed_large_map': (2.173, 36.9),
    'natlab_varying_map_regrowth': (2.989, 24.45),
    'natlab_varying_map_randomized': (7.346, 42.35),
    'skymaze_irreversible_path_hard': (0.1, 100.0),
    'skymaze_irreversible_path_varied': (14.4, 100.0),
    'psychlab_arbitrary_visuomotor_mapping': (0.163, 58.75),
    'psychlab_continuous_recognition': (0.224, 58.3),
    'psychlab_sequential_comparison': (0.129, 39.5),
    'psychlab_visual_search': (0.085, 78.5),
    'explore_object_locations_small': (3.575, 74.45),
    'explore_object_locations_large': (4.673, 65.65),
    'explore_obstructed_goals_small': (6.76, 206.0),
    'explore_obstructed_goals_large': (2.61, 119.5),
    'explore_goal_locations_small': (7.66, 267.5),
    'explore_goal_locations_large': (3.14, 194.5),
    'explore_object_rewards_few': (2.073, 77.7),
    'explore_object_rewards_many': (2.438, 106.7),
}
LEVELS = tuple(SCORES)
# The levels that are tested on held-out variants; the published scores were measured on those.
HELD_OUT = {
    'rooms_collect_good_objects_train': 'rooms_collect_good_objects_test',
    'rooms_exploit_deferred_effects_train': 'rooms_exploit_deferred_effects_test',
}
# look left/right, look down/up (pixels a frame), strafe, move, fire, jump, crouch
ACTIONS = {
    'impala': (
        (0, 0, 0, 1, 0, 0, 0),
        (0, 0, 0, -1, 0, 0, 0),
        (0, 0, -1, 0, 0, 0, 0),
        (0, 0, 1, 0, 0, 0, 0),
        (-20, 0, 0, 0, 0, 0, 0),
        (20, 0, 0, 0, 0, 0, 0),
        (-20, 0, 0, 1, 0, 0, 0),
        (20, 0, 0, 1, 0, 0, 0),
        (0, 0, 0, 0, 1, 0, 0),
    ),
    'extended': (
        (0, 0, 0, 1, 0, 0, 0),
        (0, 0, 0, -1, 0, 0, 0),
        (0, 0, -1, 0, 0, 0, 0),
        (0, 0, 1, 0, 0, 0, 0),
        (-10, 0, 0, 0, 0, 0, 0),
        (10, 0, 0, 0, 0, 0, 0),
        (-60, 0, 0, 0, 0, 0, 0),
        (60, 0, 0, 0, 0, 0, 0),
        (0, 10, 0, 0, 0, 0, 0),
        (0, -10, 0, 0, 0, 0, 0),
        (-10, 0, 0, 1, 0, 0, 0),
        (10, 0, 0, 1, 0, 0, 0),
        (-60, 0, 0, 1, 0, 0, 0),
        (60, 0, 0, 1, 0, 0, 0),
        (0, 0, 0, 0, 1, 0, 0),
    ),
}
LabArguments = dict[str, Any]  # of `deepmind_lab.Lab`, and 'cache', the folder of its maps

BUCKETS = 1000
REPEAT = 4
MIXER_SEED = 0x600D5EED  # of the test levels, in scalable_agent's experiment.py
HEIGHT, WIDTH = 72, 96


class LevelCache:
    """A cache of compiled maps on disk, with the interface of the engine's `level_cache`."""

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, key: str, pk3_path: str) -> bool:
        """Copy the map with this key to the path and return whether the cache has it."""
        try:
            shutil.copyfile(self._folder / key, pk3_path)
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, pk3_path: str) -> None:
        """Copy the map at the path into the cache, under the given key.

        The copy is atomic, because several processes may share the folder.
        """
        file_descriptor, temporary_path = tempfile.mkstemp(dir=self._folder)
        os.close(file_descriptor)
        shutil.copyfile(pk3_path, temporary_path)
        os.replace(temporary_path, self._folder / key)


def _serve_engine(
    connection: Connection, lab_arguments: LabArguments, seed: int, actions: np.ndarray
) -> None:
    """Run an engine that None resets and an action steps, and send errors as text."""
    try:
        import deepmind_lab

        cache_folder = lab_arguments.pop('cache')
        level_cache = LevelCache(cache_folder) if cache_folder else None
        lab = deepmind_lab.Lab(**lab_arguments, level_cache=level_cache)
        rng = np.random.default_rng(seed)
        while True:
            action = connection.recv()
            reward = 0.0
            if action is not None:
                reward = lab.step(actions[action], num_steps=REPEAT)
            is_first = action is None or not lab.is_running()
            if is_first:
                lab.reset(seed=int(rng.integers(2**31 - 1)))
            observation = lab.observations()
            words = observation['INSTR']
            instruction = words.decode() if isinstance(words, bytes) else str(words)
            connection.send((observation['RGB_INTERLEAVED'], instruction, reward, is_first))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent closed its end
        lab.close()
    except Exception as error:  # whatever the engine raises; the parent raises it
        connection.send(f'{type(error).__name__}: {error}')


class DMLab:
    """A `HostEnvironment` with an engine per row. Row i plays task i modulo the number of tasks."""

    def __init__(
        self,
        spec: Spec,
        engines: Sequence[LabArguments],
        actions: np.ndarray,
        seed: int,
        timeout: float,
    ):
        """Start an engine per row. `engines` has the arguments of each Lab and its cache folder."""
        # The levels and tasks of the rows.
        self.spec = spec
        self.batch = len(engines)
        self._timeout = timeout
        self._levels = [engine['level'] for engine in engines]
        self._task = np.arange(self.batch, dtype=np.int32) % len(spec.tasks)
        self._tokens = hashed(BUCKETS, spec.observation['instruction'].shape[0])

        # One process for each row: an engine must be alone in its process.
        spawn_context = multiprocessing.get_context('spawn')
        row_seeds = np.random.SeedSequence(seed).generate_state(self.batch)
        self._connections, self._processes = [], []
        self._is_idle = np.zeros(self.batch, bool)
        self._answers: list[Any] = [None] * self.batch  # the newest of each row
        for lab_arguments, row_seed in zip(engines, row_seeds, strict=True):
            connection, engine_connection = spawn_context.Pipe()
            process = spawn_context.Process(
                target=_serve_engine,
                args=(engine_connection, lab_arguments, int(row_seed), actions),
                daemon=True,
            )
            process.start()
            engine_connection.close()
            self._connections.append(connection)
            self._processes.append(process)

    def reset(self) -> Step:
        self._is_idle = np.zeros(self.batch, bool)
        self._send([None] * self.batch)
        return self.recv()._replace(discount=np.ones(self.batch, np.float32))

    def skip(self, rows: np.ndarray) -> None:
        """Skip rows until `reset`. See `SkipsRows`."""
        self._is_idle = np.array(rows)

    def send(self, actions: np.ndarray) -> None:
        self._send(actions.tolist())

    def recv(self) -> Step:
        """Wait for the step that was sent, and return it.

        Raises:
          ArgumentError: if an engine does not answer within the timeout.
          UserError: if an engine fails.
        """
        # Wait for all rows until one deadline.
        deadline = time.monotonic() + self._timeout
        for row in np.flatnonzero(~self._is_idle).tolist():
            connection, level = self._connections[row], self._levels[row]
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise ArgumentError(
                    f'{level} did not answer in {self._timeout:g} s. Raise '
                    f'`options.timeout`, or test the engine alone as described in docs/dmlab.md'
                )
            try:
                answer = connection.recv()
            except (EOFError, ConnectionResetError):
                answer = 'its process died'
            if isinstance(answer, str):
                raise UserError(f'{level}: {answer}. See docs/dmlab.md')
            self._answers[row] = answer

        # Skipped rows repeat their last answer, with reward 0.
        pixels, instructions, rewards, starts = zip(*self._answers, strict=True)
        is_first = np.array(starts) & ~self._is_idle
        return Step(
            observation={
                'pixels': np.stack(pixels),
                'instruction': np.stack(
                    [self._tokens(instruction) for instruction in instructions]
                ),
                'task': self._task,
            },
            reward=np.where(self._is_idle, 0, np.array(rewards)).astype(np.float32),
            discount=(~is_first).astype(np.float32),
            is_first=is_first,
            is_last=np.zeros(self.batch, bool),
            success=np.zeros(self.batch, bool),
        )

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
                process.join()

    def _send(self, requests: Sequence[int | None]) -> None:
        for row in np.flatnonzero(~self._is_idle).tolist():
            connection, request = self._connections[row], requests[row]
            with contextlib.suppress(BrokenPipeError):  # recv says that the process died
                connection.send(request)


def make_spec(suite: str = '', *, actions: str = 'impala', length: int = 16) -> Spec:
    """Return the spec of a suite without the engine. See `make` for the arguments.

    Raises:
      UserError: if a level or an action set is unknown.
    """
    # Check the names.
    if actions not in ACTIONS:
        raise UserError(f'`options.actions` = {actions!r} is unknown; {suggest(actions, ACTIONS)}')
    levels = LEVELS if suite in ('', 'train', 'test') else tuple(suite.split(','))
    for level in levels:
        if level not in SCORES:
            hint = suggest(level, (*LEVELS, 'train', 'test'))
            raise UserError(f'dmlab30/{level} is unknown; {hint}')
    return Spec(
        name='dmlab30',
        observation={
            'pixels': jax.ShapeDtypeStruct((HEIGHT, WIDTH, 3), np.uint8),
            'instruction': jax.ShapeDtypeStruct((length,), np.int32),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=len(ACTIONS[actions]),
        tasks=levels,
        random=tuple(SCORES[level][0] for level in levels),
        reference=tuple(SCORES[level][1] for level in levels),
        sources="random and human scores of scalable_agent's dmlab30.py (Espeholt et al., 2018)",
        vocabulary=BUCKETS + 1,
        has_success=False,
    )


def make(  # noqa: PLR0913 - the options of the environment
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    actions: str = 'impala',
    renderer: str = 'software',
    cache: str | None = None,
    dataset: str | None = None,
    length: int = 16,
    timeout: float = 600.0,
) -> DMLab:
    """Make a batch of DMLab-30 levels. Row i plays level i modulo the number of levels.

    Args:
      suite: 'train' or '' for the thirty levels, 'test' for the same with held-out variants where
        they exist, or levels joined by commas.
      batch: number of environments, B, at least one for each level.
      seed: seed of the engines.
      actions: action set, 'impala' (9 actions) or 'extended' (15).
      renderer: 'software' or 'hardware'.
      cache: folder for compiled maps.
      dataset: folder with the images of two psychlab levels, `datasetPath` of the engine.
      length: maximum length of an instruction, in words.
      timeout: maximum duration of a step, in seconds. Compiling a map takes long.

    Raises:
      UserError: if a level or action set is unknown, `batch` is too small, or the engine is not
        installed.
    """
    # Check the batch and the installation.
    spec = make_spec(suite, actions=actions, length=length)
    tasks = spec.tasks
    check_batch(spec.name, len(tasks), batch)
    if importlib.util.find_spec('deepmind_lab') is None:
        raise UserError('deepmind_lab is not installed. Build it as described in docs/dmlab.md')

    # The settings of an engine for each row.
    lab_settings = {'width': str(WIDTH), 'height': str(HEIGHT), 'logLevel': 'WARN'}
    if suite == 'test':
        lab_settings |= {'allowHoldOutLevels': 'true', 'mixerSeed': str(MIXER_SEED)}
    if dataset is not None:
        lab_settings['datasetPath'] = dataset
    level_names = [HELD_OUT.get(task, task) if suite == 'test' else task for task in tasks]
    engines = [
        {
            'level': f'contributed/dmlab30/{level_names[row % len(level_names)]}',
            'observations': ['RGB_INTERLEAVED', 'INSTR'],
            'config': lab_settings,
            'renderer': renderer,
            'cache': cache,
        }
        for row in range(batch)
    ]
    return DMLab(spec, engines, np.array(ACTIONS[actions], np.intc), seed, timeout)
