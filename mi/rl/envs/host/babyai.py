"""BabyAI (Chevalier-Boisvert et al., 2019) through EnvPool: instructions in a grid world."""

import jax
import numpy as np

from mi.config import UserError, suggest
from mi.rl.envs import text
from mi.rl.envs.host.envpool import EnvPoolObservation, Pools, import_envpool, make_pools
from mi.rl.envs.spec import Observation, Spec

# Suite → prefixes of its levels. Each of the 96 levels is in 'all' and in one other suite.
SUITES = {
    'all': ('',),
    'goto': ('GoTo',),
    'open': ('Open',),
    'pickup': ('Pickup', 'UnblockPickup', 'OneRoom', 'FindObj', 'KeyCorridor'),
    'putnext': ('PutNext', 'MoveTwoAcross'),
    'unlock': ('Unlock', 'BlockedUnlock', 'KeyInBox'),
    'synth': ('Synth', 'ActionObjDoor', 'MiniBoss', 'Boss'),
}
# Prefixes of the levels whose instructions have several clauses.
CLAUSE_LEVELS = (
    *('GoToSeq', 'SynthSeq', 'Boss', 'MiniBoss', 'MoveTwoAcross'),
    *('OpenDoorsOrder', 'OpenTwoDoors', 'OpenRedBlueDoors'),
)
# Numbers of objects, colors and states of a cell, as in minigrid (Chevalier-Boisvert et al., 2023).
CATEGORIES = (11, 6, 3)


class _ObservationReader:
    """A function from EnvPool's observation to 'grid', 'features' and 'instruction'.

    Missions are tokenized only in the first step of an episode.
    """

    def __init__(self, batch: int, length: int):
        self._tokenize = text.babyai(length)
        self._instruction = np.zeros((batch, length), np.int32)
        self._directions = np.eye(4, dtype=np.float32)

    def __call__(self, observation: EnvPoolObservation, is_first: np.ndarray) -> Observation:
        self._instruction = self._instruction.copy()  # the previous step keeps its array
        for row in np.flatnonzero(is_first):
            mission = observation['mission'][row].tobytes().rstrip(b'\0').decode()
            self._instruction[row] = self._tokenize(mission)
        return {
            'grid': observation['image'],
            'features': self._directions[observation['direction']],
            'instruction': self._instruction,
        }


def parse_levels(suite: str) -> tuple[str, ...]:
    """Return the levels in a suite, as named in `make`.

    Raises:
      UserError: if a name is unknown, or envpool is not installed.
    """
    known_levels = _list_level_ids()
    levels: list[str] = []
    for suite_or_level in (suite or 'all').split(','):
        if suite_or_level in known_levels:
            levels.append(suite_or_level)
        elif suite_or_level in SUITES:
            levels += [level for level in known_levels if level.startswith(SUITES[suite_or_level])]
        else:
            hint = suggest(suite_or_level, (*SUITES, *known_levels))
            raise UserError(f'babyai/{suite_or_level} is unknown; {hint}')
    return tuple(dict.fromkeys(levels))


def _list_level_ids() -> dict[str, str]:
    """Return level → EnvPool id, for example 'GoToLocal' → 'BabyAI-GoToLocal-v0'."""
    env_ids = import_envpool().list_all_envs()
    return {env_id[7:-3]: env_id for env_id in env_ids if env_id.startswith('BabyAI-')}


def make(
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    threads: int = 0,
    timeout: float = 60.0,
    length: int = 0,
) -> Pools:
    """Make a batch of BabyAI environments, from any of 96 levels.

    Observations: 'grid' [7, 7, 3] uint8, the agent's view as minigrid encodes it, indexed [column,
    row] with the agent at [3, 6] facing row 0; 'features' [4], the one-hot direction (right, down,
    left, up); 'instruction' [length]. Actions: left, right, forward, pick up, drop, toggle, done.
    The reward is 1 − 0.9 t / limit at success and 0 otherwise.

    Args:
      suite: a name in `SUITES`, a level such as 'GoToLocal', or several joined by commas. '' is
        'all'.
      batch: number of environments, B, at least one for each level.
      seed: seed of row 0. Row i has seed + i.
      threads: total number of threads, at least one for each level, or 0 for one per core.
      timeout: maximum duration of a step, in seconds.
      length: maximum length of an instruction, in words, or 0 for the longest in the grammar.

    Raises:
      UserError: if a name is unknown, there are too few rows, or envpool is not installed.
    """
    # Levels, and the longest instruction that they can give.
    level_ids, levels = _list_level_ids(), parse_levels(suite)
    has_clauses = any(level.startswith(CLAUSE_LEVELS) for level in levels)
    length = length or (text.BABYAI_LENGTH if has_clauses else text.BABYAI_CLAUSE)
    spec = Spec(
        name='babyai',
        observation={
            'grid': jax.ShapeDtypeStruct((7, 7, 3), np.uint8),
            'features': jax.ShapeDtypeStruct((4,), np.float32),
            'instruction': jax.ShapeDtypeStruct((length,), np.int32),
            'task': jax.ShapeDtypeStruct((), np.int32),
        },
        actions=7,
        tasks=levels,
        reference=(1.0,) * len(levels),
        sources='a return is 1 − 0.9 t / limit when solved at step t, 0 otherwise',
        categories=CATEGORIES,
        vocabulary=text.BABYAI_VOCABULARY,
        words=text.BABYAI_WORDS,
    )

    # One pool of environments for each level.
    pools = make_pools(spec, [level_ids[level] for level in levels], batch, seed, threads)
    reader = _ObservationReader(batch, length)
    return Pools(spec, pools, reader, rewards_success=True, timeout=timeout)
