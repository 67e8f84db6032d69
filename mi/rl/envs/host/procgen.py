"""Procgen (Cobbe et al., 2020) through EnvPool: games with procedurally generated levels."""

from mi.config import UserError, suggest
from mi.rl.envs.host.envpool import GameSuite, Pools, make_pools, read_pixels
from mi.rl.envs.spec import Spec

# Game → R_min and R_max of the easy mode (Cobbe et al., 2020, appendix); as public code gives them,
# agreeing with memory; the paper was not read. R_min is a blind policy's score, not a random one's.
SCORES = {
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
GAMES = GameSuite(
    name='procgen',
    scores=SCORES,
    sources='R_min and R_max of the easy mode, Cobbe et al. (2020), from public code',
    pixels=(64, 64, 3),
    num_actions=15,
    max_steps=6000,  # the limit in Bigfish; most games have 1000
)


def parse_suite(suite: str) -> tuple[str, ...]:
    """Return the games in a suite, as named in `make`.

    Raises:
      UserError: if a name is unknown.
    """
    return _split_suite(suite)[1]


def make_spec(suite: str) -> Spec:
    """Return the spec of a suite, as named in `make`, or raise UserError if it is unknown."""
    return GAMES.make_spec(parse_suite(suite))


def make(
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    threads: int = 0,
    timeout: float = 60.0,
) -> Pools:
    """Make a batch of Procgen's 16 games, in the easy mode.

    Observations are 'pixels' [64, 64, 3] uint8, and there are 15 actions.

    Args:
      suite: 'train' (or '') for levels 0 to 199 of all games, 'test' for all levels. Either may be
        followed by games, as in 'test/Coinrun,Maze'.
      batch, seed, threads, timeout: as in `mi.rl.envs.host.babyai.make`.

    Raises:
      UserError: if a name is unknown, there are too few rows, or envpool or Qt 5 is not installed.
    """
    spec = make_spec(suite)
    split, games = _split_suite(suite)
    try:
        pools = make_pools(
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
    return Pools(spec, pools, read_pixels, timeout=timeout)


def _split_suite(suite: str) -> tuple[str, tuple[str, ...]]:
    """Return the split of a suite, 'train' or 'test', and its games."""
    split, _, games = (suite or 'train').partition('/')
    if split not in ('train', 'test'):
        raise UserError(
            f'procgen/{suite} is unknown; {suggest(split, ("train", "test"))}. Try '
            f"'procgen/train', or 'procgen/train/Coinrun,Maze' for some games"
        )
    return split, GAMES.parse_games(games)
