"""JAX and HOST: one config word → one environment.

A word may go on after a slash, as in 'babyai/goto': what stands there is the environment's to read.
"""

from collections.abc import Callable

from mi.config import UserError, nearest
from mi.rl.envs import catch, dmlab30, gym, pools, xland
from mi.rl.envs.batched import Batched
from mi.rl.envs.spec import HostEnvironment, JaxEnvironment

JAX: dict[str, Callable[[str], JaxEnvironment]] = {'xland': xland.make, 'catch': catch.make}
HOST: dict[str, Callable[..., HostEnvironment]] = {
    'babyai': pools.make_babyai,
    'atari': pools.make_atari,
    'procgen': pools.make_procgen,
    'gymnasium': gym.make_gym,
    'vizdoom': gym.make_vizdoom,
    'dmlab30': dmlab30.make,
}


def make(name: str) -> JaxEnvironment:
    """The environment of a config's `env.name`, as pure functions of one row.

    Raises:
      UserError: on an unknown name, one that runs on the host, or for what its maker refuses.
    """
    word, _, suite = name.partition('/')
    if word in HOST:
        raise UserError(
            f'config.env.name = {name!r} runs on the host and cannot be compiled into the update; '
            f"set config.train.topology = 'threads' or 'ray'"
        )
    _known(name, word)
    return JAX[word](suite)


def pool(name: str, batch: int, seed: int) -> HostEnvironment:
    """`batch` rows of any environment on the host.

    Raises:
      UserError: on an unknown name, or for what its maker refuses.
    """
    word, _, suite = name.partition('/')
    _known(name, word)
    if word in JAX:
        return Batched(JAX[word](suite), batch, seed)
    return HOST[word](suite, batch=batch, seed=seed)


def on_host(name: str) -> bool:
    """Whether an environment is stepped outside of JAX's programs."""
    return name.partition('/')[0] in HOST


def _known(name: str, word: str) -> None:
    if word not in JAX and word not in HOST:
        known = nearest(word, (*JAX, *HOST))
        raise UserError(f'config.env.name = {name!r} is unknown; {known}')
