"""JAX and HOST: one config word → one environment.

A word may go on after a slash, as in 'babyai/goto': what stands there is the environment's to read.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mi.config import UserError, suggest
from mi.rl.envs.check import check_environment, check_spec
from mi.rl.envs.host import dmlab30, envpool, gymnasium
from mi.rl.envs.jax import catch, xland
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.spec import HostEnvironment, JaxEnvironment, Spec

JAX: dict[str, Callable[..., JaxEnvironment]] = {'xland': xland.make, 'catch': catch.make}
HOST: dict[str, Callable[..., HostEnvironment]] = {
    'babyai': envpool.make_babyai,
    'atari': envpool.make_atari,
    'procgen': envpool.make_procgen,
    'gymnasium': gymnasium.make_gym,
    'vizdoom': gymnasium.make_vizdoom,
    'dmlab30': dmlab30.make,
}


# Specs that are known without the simulator: suite, options that change them → spec.
SPECS: dict[str, Callable[..., Spec]] = {
    'atari': envpool.atari_spec,
    'procgen': envpool.procgen_spec,
    'dmlab30': dmlab30.suite_spec,
}
# Names of a suite's tasks, for environments whose rows are cheap: a megabyte each and no process.
CHEAP: dict[str, Callable[[str], tuple[str, ...]]] = {
    'babyai': envpool.babyai_levels,
    'atari': envpool.atari_games,
    'procgen': envpool.procgen_games,
}
MOST_ROWS = 1024  # of an evaluation


def make(
    name: str, options: Mapping[str, Any] | None = None, key: str = 'env.name'
) -> JaxEnvironment:
    """Make an environment of pure functions of one row.

    Args:
      name: a word of JAX, with its suite after a slash.
      options: arguments of its maker, by name.
      key: of the config, that gives the name.

    Raises:
      UserError: on an unknown name or option, one that runs on the host, for what its maker
        refuses, or if the environment is not what its spec says.
    """
    word = _word(name, key)
    if word in HOST:
        raise UserError(
            f'config.{key} = {name!r} runs on the host and cannot be compiled into the update; '
            f"set config.train.topology = 'threads' or 'ray'"
        )
    return _made_jax(word, name, key, options or {})


def pool(
    name: str,
    batch: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    key: str = 'env.name',
) -> HostEnvironment:
    """Make `batch` rows of any environment on the host.

    Args:
      name: a word of JAX or HOST, with its suite after a slash.
      batch, seed: of the rows.
      options, key: as in `make`.

    Raises:
      UserError: on an unknown name or option, for what its maker refuses, or if the environment is
        not what its spec says.
    """
    word, options = _word(name, key), options or {}
    if word in JAX:
        return Batched(_made_jax(word, name, key, options), batch, seed)
    environment: HostEnvironment = _made(HOST[word], name, key, options, batch=batch, seed=seed)
    with _named(name, key):
        check_spec(environment.spec)
    return environment


def host_spec(
    name: str, batch: int, options: Mapping[str, Any] | None = None, key: str = 'env.name'
) -> Spec:
    """Return the spec of an environment on the host, without its simulator where `SPECS` has it.

    Args:
      name: a word of HOST, with its suite after a slash.
      batch: rows, at least one for each task.
      options, key: as in `make`.

    Raises:
      UserError: as in `pool`.
    """
    word, _, suite = name.partition('/')
    options = options or {}
    if word not in SPECS:
        with contextlib.closing(pool(name, batch, 0, options, key)) as environment:
            return environment.spec
    _check_options(HOST[word], name, options)
    parameters = inspect.signature(SPECS[word]).parameters
    with _named(name, key):
        spec = SPECS[word](suite, **{k: v for k, v in options.items() if k in parameters})
        check_spec(spec)
        if batch < len(spec.tasks):
            raise UserError(
                f'{batch} rows for {len(spec.tasks)} tasks: expected a row for each; raise '
                f'config.actors.batch or name fewer tasks'
            )
    return spec


def on_host(name: str) -> bool:
    """Whether an environment is stepped outside of JAX's programs."""
    return name.partition('/')[0] in HOST


def evaluation_rows(name: str, batch: int, episodes: int, key: str = 'env.name') -> int:
    """Return how many rows evaluation has on the host: one for each episode where they are cheap.

    Args:
      name: of the environment.
      batch: rows where they are not cheap.
      episodes: of each task.
      key: as in `make`.

    Raises:
      UserError: for an unknown suite.
    """
    word, _, suite = name.partition('/')
    if word not in CHEAP:
        return batch
    with _named(name, key):
        tasks = len(CHEAP[word](suite))
    return tasks * max(1, min(episodes, MOST_ROWS // tasks))


def _word(name: str, key: str) -> str:
    word = name.partition('/')[0]
    if word not in JAX and word not in HOST:
        known = suggest(word, (*JAX, *HOST))
        raise UserError(f'config.{key} = {name!r} is unknown; {known}')
    return word


def _made_jax(word: str, name: str, key: str, options: Mapping[str, Any]) -> JaxEnvironment:
    environment: JaxEnvironment = _made(JAX[word], name, key, options)
    with _named(name, key):
        check_environment(environment)
    return environment


def _made(
    maker: Callable[..., Any], name: str, key: str, options: Mapping[str, Any], **rows: int
) -> Any:
    """What a maker makes of the suite, with options that it has; its errors name the key."""
    _check_options(maker, name, options)
    with _named(name, key):
        return maker(name.partition('/')[2], **rows, **options)


def _check_options(maker: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a maker has not, or of another type."""
    parameters = inspect.signature(maker).parameters
    known = {
        parameter: default.default
        for parameter, default in parameters.items()
        if default.kind is default.KEYWORD_ONLY and parameter not in ('batch', 'seed')
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option, value in options.items():
        if option not in known and not takes_any:
            hint = suggest(option, known) if known else 'it has no options'
            raise UserError(f'config.env.options.{option} is unknown to {name!r}; {hint}')
        default = known.get(option)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and (type(value) not in kinds):
            raise UserError(
                f'config.env.options.{option} = {value!r}: expected {type(default).__name__}, as '
                f'its default {default!r}'
            )


@contextlib.contextmanager
def _named(name: str, key: str) -> Iterator[None]:
    """Puts the key that names the environment in front of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f'config.{key} = {name!r}: {error}') from error
