"""Atari 2600 (Bellemare et al., 2013) through EnvPool, preprocessed as for DQN."""

from mi.rl.envs.host.envpool import GameSuite, Pools, import_envpool, make_pools, read_pixels
from mi.rl.envs.spec import Spec

# Game → score of the uniform random policy, and of a human tester; episodes of at most 30 minutes
# that begin with up to 30 no-ops (Wang et al., 2016). Read from dqn_zoo's atari_data.py (359945d).
SCORES = {
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
GAMES = GameSuite(
    name='atari',
    scores=SCORES,
    sources='random and human scores of Wang et al. (2016), from dqn_zoo; no sticky actions',
    pixels=(84, 84, 4),
    num_actions=18,  # the union over all games; each has some of them
    max_steps=27000,  # 108 000 frames, 30 minutes
)


def parse_suite(suite: str) -> tuple[str, ...]:
    """Return the games in a suite, as named in `make`.

    Raises:
      UserError: if a game is unknown.
    """
    return GAMES.parse_games(suite)


def make_spec(suite: str) -> Spec:
    """Return the spec of a suite, as named in `make`. A single game requires envpool.

    Raises:
      UserError: if a game is unknown, or envpool is required but not installed.
    """
    games = parse_suite(suite)
    if len(games) > 1:
        return GAMES.make_spec(games)
    action_space = import_envpool().make_spec(f'{games[0]}-v5').gymnasium_action_space
    return GAMES.make_spec(games, num_actions=int(action_space.n))


def make(
    suite: str,
    *,
    batch: int,
    seed: int = 0,
    threads: int = 0,
    timeout: float = 60.0,
    sticky: float = 0.0,
) -> Pools:
    """Make a batch of Atari games, preprocessed as for DQN (Mnih et al., 2015).

    Observations: 'pixels' [84, 84, 4] uint8, the last four grayscale frames, the newest last.
    Every action is repeated 4 times. An episode is a game, not a life, and rewards are not clipped.
    A single game has its minimal action set, and several games have all 18 actions.

    Args:
      suite: a game such as 'Breakout', several joined by commas, or 'all' or '' for all 57.
      sticky: probability of repeating the previous action (Machado et al., 2018: 0.25).
      batch, seed, threads, timeout: as in `mi.rl.envs.host.babyai.make`.

    Raises:
      UserError: if a game is unknown, there are too few rows, or envpool is not installed.
    """
    spec = make_spec(suite)
    pools = make_pools(
        spec,
        [f'{game}-v5' for game in spec.tasks],
        batch,
        seed,
        threads,
        frame_skip=4,
        stack_num=4,
        episodic_life=False,
        reward_clip=False,
        full_action_space=len(spec.tasks) > 1,
        repeat_action_probability=sticky,
        max_episode_steps=spec.episode,
    )
    return Pools(spec, pools, read_pixels, timeout=timeout)
