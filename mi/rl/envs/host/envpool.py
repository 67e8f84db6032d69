"""EnvPool (Weng et al., 2022): BabyAI, Atari and Procgen, simulated in C++ threads.

One pool per task, the rows spread evenly over them, task by task: row i keeps its task for ever.
A new episode starts one step later (see `spec`): EnvPool ignores the action after the last
observation, and answers it with the first observation of the next episode and reward 0.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mi.config import UserError, suggest, suggest_install
from mi.rl.envs import text
from mi.rl.envs.spec import Observation, Spec, Step

# Suite → how the names of its levels start; each of the 96 levels is in one of these, or in 'all'.
BABYAI_SUITES = {
    'all': ('',),
    'goto': ('GoTo',),
    'open': ('Open',),
    'pickup': ('Pickup', 'UnblockPickup', 'OneRoom', 'FindObj', 'KeyCorridor'),
    'putnext': ('PutNext', 'MoveTwoAcross'),
    'unlock': ('Unlock', 'BlockedUnlock', 'KeyInBox'),
    'synth': ('Synth', 'ActionObjDoor', 'MiniBoss', 'Boss'),
}
# How the names of levels start whose instructions have several clauses.
BABYAI_SEQUENCES = (
    *('GoToSeq', 'SynthSeq', 'Boss', 'MiniBoss', 'MoveTwoAcross'),
    *('OpenDoorsOrder', 'OpenTwoDoors', 'OpenRedBlueDoors'),
)
# Object, colour and state of a cell, as in minigrid (Chevalier-Boisvert et al., 2023).
BABYAI_CATEGORIES = (11, 6, 3)

# Game → score of the uniform random policy, and of a human tester; episodes of at most 30 minutes
# that begin with up to 30 no-ops (Wang et al., 2016). Read from dqn_zoo's atari_data.py (359945d).
ATARI = {
    'Alien': (227.8, 7127.7),
    'Amidar': (5.8, 1719.5),
    'Assault': (222.4, 742.0),
    'Asterix': (210.0, 8503.3),
    'Asteroids': (719.1, 47388.7),
    'Atlantis': (12850.0, 29028.1),
    'BankHeist': (14.2, 753.1),
    'BattleZone': (2360.0, 37187.5),
    'BeamRider': (363.9, 16926.5),
    'Berzerk': (123.7, 2630.4),
    'Bowling': (23.1, 160.7),
    'Boxing': (0.1, 12.1),
    'Breakout': (1.7, 30.5),
    'Centipede': (2090.9, 12017.0),
    'ChopperCommand': (811.0, 7387.8),
    'CrazyClimber': (10780.5, 35829.4),
    'Defender': (2874.5, 18688.9),
    'DemonAttack': (152.1, 1971.0),
    'DoubleDunk': (-18.6, -16.4),
    'Enduro': (0.0, 860.5),
    'FishingDerby': (-91.7, -38.7),
    'Freeway': (0.0, 29.6),
    'Frostbite': (65.2, 4334.7),
    'Gopher': (257.6, 2412.5),
    'Gravitar': (173.0, 3351.4),
    'Hero': (1027.0, 30826.4),
    'IceHockey': (-11.2, 0.9),
    'Jamesbond': (29.0, 302.8),
    'Kangaroo': (52.0, 3035.0),
    'Krull': (1598.0, 2665.5),
    'KungFuMaster': (258.5, 22736.3),
    'MontezumaRevenge': (0.0, 4753.3),
    'MsPacman': (307.3, 6951.6),
    'NameThisGame': (2292.3, 8049.0),
    'Phoenix': (761.4, 7242.6),
    'Pitfall': (-229.4, 6463.7),
    'Pong': (-20.7, 14.6),
    'PrivateEye': (24.9, 69571.3),
    'Qbert': (163.9, 13455.0),
    'Riverraid': (1338.5, 17118.0),
    'RoadRunner': (11.5, 7845.0),
    'Robotank': (2.2, 11.9),
    'Seaquest': (68.4, 42054.7),
    'Skiing': (-17098.1, -4336.9),
    'Solaris': (1236.3, 12326.7),
    'SpaceInvaders': (148.0, 1668.7),
    'StarGunner': (664.0, 10250.0),
    'Surround': (-10.0, 6.5),
    'Tennis': (-23.8, -8.3),
    'TimePilot': (3568.0, 5229.2),
    'Tutankham': (11.4, 167.6),
    'UpNDown': (533.4, 11693.2),
    'Venture': (0.0, 1187.5),
    'VideoPinball': (16256.9, 17667.9),
    'WizardOfWor': (563.5, 4756.5),
    'YarsRevenge': (3092.9, 54576.9),
    'Zaxxon': (32.5, 9173.3),
}
ATARI_ACTIONS = 18  # of all games; each has some of them
ATARI_STEPS = 27000  # 108 000 frames, 30 minutes

# Game → R_min and R_max of the easy mode (Cobbe et al., 2020, appendix); as public code gives them,
# agreeing with memory; the paper was not read. R_min is a blind policy's score, not a random one's.
PROCGEN = {
    'Bigfish': (1.0, 40.0),
    'Bossfight': (0.5, 13.0),
    'Caveflyer': (3.5, 12.0),
    'Chaser': (0.5, 13.0),
    'Climber': (2.0, 12.6),
    'Coinrun': (5.0, 10.0),
    'Dodgeball': (1.5, 19.0),
    'Fruitbot': (-1.5, 32.4),
    'Heist': (3.5, 10.0),
    'Jumper': (3.0, 10.0),
    'Leaper': (3.0, 10.0),
    'Maze': (5.0, 10.0),
    'Miner': (1.5, 13.0),
    'Ninja': (3.5, 10.0),
    'Plunder': (4.5, 30.0),
    'Starpilot': (2.5, 64.0),
}

Read = Callable[[Any, np.ndarray], Observation]


class Pools:
    """A `HostEnvironment` of EnvPool's pools, stepped together."""

    def __init__(
        self,
        spec: Spec,
        pools: Sequence[Any],
        read: Read,
        *,
        goal: bool = False,
        timeout: float = 60.0,
    ):
        """Takes the pools over.

        Args:
          spec: its tasks are the pools', in their order.
          pools: of the gymnasium interface, with batch_size = num_envs.
          read: (EnvPool's observation of all rows, is_first [B]) → observation, without 'task'.
          goal: whether a positive reward at the end of an episode is success.
          timeout: most seconds that `recv` and `reset` wait.
        """
        sizes = [pool.config['num_envs'] for pool in pools]
        self.spec = spec
        self.batch = sum(sizes)
        self._pools = pools
        self._ends = np.cumsum(sizes)[:-1]
        self._task = np.repeat(np.arange(len(pools), dtype=np.int32), sizes)
        self._read = read
        self._goal = goal
        self._timeout = timeout
        self._last = np.zeros(self.batch, bool)
        self._idle = np.zeros(self.batch, bool)
        self._seen: Any = None  # EnvPool's observation of all rows
        # EnvPool can only wait for ever: so a thread does that can be left behind.
        self._asked: queue.SimpleQueue[list[Callable[[], Any]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._wait, daemon=True).start()

    def reset(self) -> Step:
        answers = self._ask('reset', range(len(self._pools)))
        zero, no = np.zeros(self.batch, np.float32), np.zeros(self.batch, bool)
        self._last, self._idle = no, no
        self._seen = _joined([observation for observation, _ in answers])
        return Step(self._observe(~no), zero, zero + 1, ~no, no, no)

    def skip(self, rows: np.ndarray) -> None:
        """As in `SkipsRows`; EnvPool steps the rows that it is given."""
        self._idle = np.array(rows)

    def send(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions, np.int32)
        parts = zip(
            self._pools,
            np.split(actions, self._ends),
            np.split(self._idle, self._ends),
            strict=True,
        )
        for pool, part, idle in parts:
            if not idle.any():
                pool.send(part)
            elif not idle.all():
                pool.send(part[~idle], np.flatnonzero(~idle).astype(np.int32))

    def recv(self) -> Step:
        """Raises UserError if a pool does not answer within the timeout."""
        idle = np.split(self._idle, self._ends)
        playing = [i for i, rows in enumerate(idle) if not rows.all()]
        parts = [part[:5] for part in self._ask('recv', playing)]
        seen, *step, info = (list(part) for part in zip(*parts, strict=True))
        reward, terminated, truncated = (_joined(part) for part in step)
        if self._idle.any():
            starts = np.concatenate([[0], self._ends])
            rows = np.concatenate(
                [starts[i] + part['env_id'] for i, part in zip(playing, info, strict=True)]
            )
            self._seen = _replaced(self._seen, _joined(seen), rows)
            reward, terminated, truncated = (
                _spread(part, rows, self.batch) for part in (reward, terminated, truncated)
            )
        else:
            self._seen = _joined(seen)
        first, last = self._last & ~self._idle, terminated | truncated
        self._last = last
        return Step(
            observation=self._observe(first),
            reward=reward.astype(np.float32),
            discount=np.where(terminated & ~truncated, 0, 1).astype(np.float32),
            is_first=first,
            is_last=last,
            success=last & (reward > 0) if self._goal else np.zeros(self.batch, bool),
        )

    def close(self) -> None:
        self._asked.put(None)
        for pool in self._pools:
            pool.close()

    def _observe(self, first: np.ndarray) -> Observation:
        return {**self._read(self._seen, first), 'task': self._task}

    def _ask(self, method: str, pools: Iterable[int]) -> list[Any]:
        """What the method of each of these pools returns; the pools work at the same time."""
        self._asked.put([getattr(self._pools[i], method) for i in pools])
        deadline = time.monotonic() + self._timeout
        answers: list[Any] = []
        for task in (self.spec.tasks[i] for i in pools):
            try:
                answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise UserError(
                    f'{self.spec.name}/{task} did not answer in {self._timeout:g} s: expected a '
                    f'step of its {self.batch} rows; raise config.env.options.timeout, or run with '
                    f'fewer rows'
                ) from None
            if isinstance(answer, Exception):
                raise answer
            answers.append(answer)
        return answers

    def _wait(self) -> None:
        while (methods := self._asked.get()) is not None:
            for method in methods:
                try:
                    self._answers.put(method())
                except Exception as error:
                    self._answers.put(error)


def babyai_levels(suite: str) -> tuple[str, ...]:
    """Return the levels of a suite of `make_babyai`.

    Raises:
      UserError: on an unknown word, or if envpool is not installed.
    """
    known = _babyai_ids()
    levels: list[str] = []
    for word in (suite or 'all').split(','):
        starts = BABYAI_SUITES.get(word, ())
        levels += (
            [word] if word in known else [level for level in known if level.startswith(starts)]
        )
        if word not in known and word not in BABYAI_SUITES:
            raise UserError(f'babyai/{word} is unknown; {suggest(word, (*BABYAI_SUITES, *known))}')
    return tuple(dict.fromkeys(levels))


def _babyai_ids() -> dict[str, str]:
    """Level → EnvPool's id."""
    names = _envpool().list_all_envs()
    return {name[7:-3]: name for name in names if name.startswith('BabyAI-')}


def atari_games(suite: str) -> tuple[str, ...]:
    """Return the games of a suite of `make_atari`; an unknown one raises UserError."""
    return _games('atari', suite, ATARI)


def procgen_games(suite: str) -> tuple[str, ...]:
    """Return the games of a suite of `make_procgen`; an unknown one raises UserError."""
    return _procgen(suite)[1]


def make_babyai(
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    threads: int = 0,
    timeout: float = 60.0,
    length: int = 0,
) -> Pools:
    """BabyAI (Chevalier-Boisvert et al., 2019): instructions in a grid world, 96 levels.

    Observations: 'grid' [7, 7, 3] uint8, what the agent sees as minigrid encodes it: indexed
    [column, row], itself at [3, 6] looking at row 0; 'features' [4], the direction as one-hot
    (right, down, left, up); 'instruction' [length]. Actions: left, right, forward, pick up, drop,
    toggle, done. The reward is 1 − 0.9 t / limit at success and 0 elsewhere.

    Args:
      suite: a word of BABYAI_SUITES, a level as 'GoToLocal', or several joined by commas; '' is
        'all'.
      batch: B, at least one row for each level.
      seed: of row 0; row i has seed + i.
      threads: in all, at least one for each level; 0 for as many as there are cores.
      timeout: most seconds of a step.
      length: most words of an instruction; 0 for what the levels' grammar needs.

    Raises:
      UserError: on an unknown word, too few rows, or if envpool is not installed.
    """
    ids, tasks = _babyai_ids(), babyai_levels(suite)
    clauses = any(task.startswith(BABYAI_SEQUENCES) for task in tasks)
    length = length or (text.BABYAI_LENGTH if clauses else text.BABYAI_CLAUSE)
    tokens = text.babyai(length)
    instruction = np.zeros((batch, length), np.int32)
    directions = np.eye(4, dtype=np.float32)

    def read(seen: Any, first: np.ndarray) -> Observation:
        nonlocal instruction
        instruction = instruction.copy()  # the step before keeps its own
        for row in np.flatnonzero(first):
            mission = seen['mission'][row].tobytes().rstrip(b'\0').decode()
            instruction[row] = tokens(mission)
        return {
            'grid': seen['image'],
            'features': directions[seen['direction']],
            'instruction': instruction,
        }

    spec = Spec(
        name='babyai',
        observation={
            'grid': jax.ShapeDtypeStruct((7, 7, 3), np.uint8),
            'features': jax.ShapeDtypeStruct((4,), np.float32),
            'instruction': jax.ShapeDtypeStruct((length,), np.int32),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=7,
        tasks=tasks,
        reference=(1.0,) * len(tasks),
        sources='a return is 1 − 0.9 t / limit when solved at step t, 0 otherwise',
        categories=BABYAI_CATEGORIES,
        vocabulary=text.BABYAI_VOCABULARY,
        words=text.BABYAI_WORDS,
    )
    pools = _pools(spec, [ids[task] for task in tasks], batch, seed, threads)
    return Pools(spec, pools, read, goal=True, timeout=timeout)


def atari_spec(suite: str) -> Spec:
    """Return the spec of a suite of `make_atari`; that of a single game needs envpool.

    Raises:
      UserError: on an unknown game, or if envpool is needed and not installed.
    """
    games = atari_games(suite)
    actions = ATARI_ACTIONS
    if len(games) == 1:
        actions = int(_envpool().make_spec(f'{games[0]}-v5').gymnasium_action_space.n)
    return Spec(
        name='atari',
        observation={
            'pixels': jax.ShapeDtypeStruct((84, 84, 4), np.uint8),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=actions,
        tasks=games,
        random=tuple(ATARI[game][0] for game in games),
        reference=tuple(ATARI[game][1] for game in games),
        sources='random and human scores of Wang et al. (2016), from dqn_zoo; no sticky actions',
        has_success=False,
        episode=ATARI_STEPS,
    )


def make_atari(
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    threads: int = 0,
    timeout: float = 60.0,
    sticky: float = 0.0,
) -> Pools:
    """Atari 2600 (Bellemare et al., 2013): 57 games, preprocessed as for DQN (Mnih et al., 2015).

    Observations: 'pixels' [84, 84, 4] uint8, the last four grey frames, the newest last. Every
    action is repeated 4 times. An episode is a game, not a life, and rewards are not clipped.
    One game has its minimal actions; several have all 18.

    Args:
      suite: a game as 'Breakout', several joined by commas, or 'all' or '' for the 57.
      sticky: probability that the emulator repeats the action before (Machado et al., 2018: 0.25).
      batch, seed, threads, timeout: as in `make_babyai`.

    Raises:
      UserError: on an unknown game, too few rows, or if envpool is not installed.
    """
    spec = atari_spec(suite)
    options = {
        'frame_skip': 4,
        'stack_num': 4,
        'episodic_life': False,
        'reward_clip': False,
        'full_action_space': len(spec.tasks) > 1,
        'repeat_action_probability': sticky,
        'max_episode_steps': ATARI_STEPS,
    }
    ids = [f'{game}-v5' for game in spec.tasks]
    pools = _pools(spec, ids, batch, seed, threads, **options)
    return Pools(spec, pools, _channels_last, timeout=timeout)


def procgen_spec(suite: str) -> Spec:
    """Return the spec of a suite of `make_procgen`; an unknown one raises UserError."""
    games = procgen_games(suite)
    return Spec(
        name='procgen',
        observation={
            'pixels': jax.ShapeDtypeStruct((64, 64, 3), np.uint8),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=15,
        tasks=games,
        random=tuple(PROCGEN[game][0] for game in games),
        reference=tuple(PROCGEN[game][1] for game in games),
        sources='R_min and R_max of the easy mode, Cobbe et al. (2020), from public code',
        has_success=False,
        episode=6000,  # of Bigfish; 1000 of most
    )


def make_procgen(
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    threads: int = 0,
    timeout: float = 60.0,
) -> Pools:
    """Procgen (Cobbe et al., 2020): 16 games of the easy mode, levels made from a seed.

    Observations: 'pixels' [64, 64, 3] uint8. 15 actions.

    Args:
      suite: 'train' (or '') for levels 0 to 199 of all games, 'test' for all levels; either may be
        followed by games, as 'test/Coinrun,Maze'.
      batch, seed, threads, timeout: as in `make_babyai`.

    Raises:
      UserError: on an unknown word, too few rows, or if envpool or Qt 5 is not installed.
    """
    spec = procgen_spec(suite)
    split, games = _procgen(suite)
    try:
        pools = _pools(
            spec,
            [f'{game}Easy-v0' for game in games],
            batch,
            seed,
            threads,
            num_levels=200 if split == 'train' else 0,
            start_level=0,
        )
    except ImportError as error:
        raise UserError(f'{error}') from error
    return Pools(spec, pools, _channels_last, timeout=timeout)


def _envpool() -> Any:
    try:
        import envpool
    except ImportError as error:
        raise UserError(f'envpool is not installed. Try {suggest_install("envpool")}') from error
    return envpool


def _procgen(suite: str) -> tuple[str, tuple[str, ...]]:
    """'train' or 'test', and the games of a suite."""
    split, _, names = (suite or 'train').partition('/')
    if split not in ('train', 'test'):
        raise UserError(
            f'procgen/{suite} is unknown; {suggest(split, ("train", "test"))}, each with games '
            f"behind it if not all are wanted, as 'procgen/train/Coinrun,Maze'"
        )
    return split, _games('procgen', names, PROCGEN)


def _games(name: str, words: str, known: Iterable[str]) -> tuple[str, ...]:
    if words in ('', 'all'):
        return tuple(known)
    games = tuple(dict.fromkeys(words.split(',')))
    for game in games:
        if game not in known:
            raise UserError(f'{name}/{game} is unknown; {suggest(game, (*known, "all"))}')
    return games


def _pools(
    spec: Spec, ids: Sequence[str], batch: int, seed: int, threads: int, **options: Any
) -> list[Any]:
    """A pool of each id, with batch // len(ids) rows or one more."""
    if batch < len(ids):
        raise UserError(
            f'{batch} rows for the {len(ids)} tasks of {spec.name}: expected a row for each; raise '
            f'config.actors.batch or name fewer tasks'
        )
    envpool = _envpool()
    pools, row = [], 0
    threads = threads or min(batch, len(os.sched_getaffinity(0)))
    for i, name in enumerate(ids):
        rows = batch // len(ids) + (i < batch % len(ids))
        pool = envpool.make(
            name,
            env_type='gymnasium',
            num_envs=rows,
            batch_size=rows,
            num_threads=max(1, threads * rows // batch),
            seed=seed + row,
            **options,
        )
        pools.append(pool)
        row += rows
    return pools


def _channels_last(seen: np.ndarray, first: np.ndarray) -> Observation:
    del first
    return {'pixels': np.ascontiguousarray(np.moveaxis(seen, 1, -1))}


def _replaced(whole: Any, part: Any, rows: np.ndarray) -> Any:
    """An observation of all rows, with new values of some."""
    if isinstance(whole, dict):
        return {name: _replaced(whole[name], part[name], rows) for name in whole}
    whole = whole.copy()  # the step before keeps its own
    whole[rows] = part
    return whole


def _spread(part: np.ndarray, rows: np.ndarray, batch: int) -> np.ndarray:
    """The values of some rows, [B], and 0 of the others."""
    whole = np.zeros(batch, part.dtype)
    whole[rows] = part
    return whole


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)
