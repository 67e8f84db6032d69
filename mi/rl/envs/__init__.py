"""Registries of environments, JAX and HOST, and functions that make one by name.

A name may have a suite behind a slash, as in 'babyai/goto', which the environment's maker parses.
Add an environment in a config file with `JAX[name] = maker` or `HOST[name] = maker`:

    JAX    maker(suite, **options) → JaxEnvironment
    HOST   maker(suite, *, batch, seed, **options) → HostEnvironment

Options are keyword-only arguments with defaults. Actors of the topology 'ray' do not read the
config file, so they need the entry in this module.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mi.config import UserError, suggest
from mi.rl.envs.check import check_environment, check_spec
from mi.rl.envs.host import atari, babyai, dmlab30, gymnasium, procgen
from mi.rl.envs.jax import catch, xland
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.spec import HostEnvironment, JaxEnvironment, Spec
from mi.rl.options import check_options, get_keyword_defaults

JAX: dict[str, Callable[..., JaxEnvironment]] = {'xland': xland.make, 'catch': catch.make}
HOST: dict[str, Callable[..., HostEnvironment]] = {
    'babyai': babyai.make,
    'atari': atari.make,
    'procgen': procgen.make,
    'gymnasium': gymnasium.make_gym,
    'vizdoom': gymnasium.make_vizdoom,
    'dmlab30': dmlab30.make,
}
# Makers of specs that need no simulator: (suite, options that change the spec) → spec.
SPECS: dict[str, Callable[..., Spec]] = {
    'atari': atari.make_spec,
    'procgen': procgen.make_spec,
    'dmlab30': dmlab30.suite_spec,
}
# Suite → its tasks, for environments whose rows are cheap: a megabyte each and no process.
CHEAP: dict[str, Callable[[str], tuple[str, ...]]] = {
    'babyai': babyai.parse_levels,
    'atari': atari.parse_suite,
    'procgen': procgen.parse_suite,
}
MAX_EVALUATION_ROWS = 1024


def make(
    name: str, options: Mapping[str, Any] | None = None, key: str = 'env.name'
) -> JaxEnvironment:
    """Make an environment of pure functions of one row.

    Args:
      name: a name in JAX, with its suite behind a slash.
      options: arguments of its maker, by name.
      key: the config key that gives the name.

    Raises:
      UserError: if the name or an option is unknown, if the environment runs on the host, if its
        maker refuses, or if the environment contradicts its spec.
    """
    word = _word(name, key)
    if word in HOST:
        raise UserError(
            f'config.{key} = {name!r} runs on the host: expected an environment in JAX for the '
            f"topology 'fused'. Try config.train.topology = 'threads' or 'ray'"
        )
    return _make_jax(word, name, key, options or {})


def pool(
    name: str,
    batch: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    key: str = 'env.name',
) -> HostEnvironment:
    """Make `batch` rows of any environment on the host.

    Args:
      name: a name in JAX or HOST, with its suite behind a slash.
      batch: number of rows.
      seed: seed of everything random in them.
      options, key: as in `make`.

    Raises:
      UserError: if the name or an option is unknown, if its maker refuses, or if the environment
        contradicts its spec.
    """
    word, options = _word(name, key), options or {}
    if word in JAX:
        return Batched(_make_jax(word, name, key, options), batch, seed)
    environment: HostEnvironment = _call_maker(
        HOST[word], name, key, options, batch=batch, seed=seed
    )
    with _named(name, key):
        check_spec(environment.spec)
    return environment


def host_spec(
    name: str, batch: int, options: Mapping[str, Any] | None = None, key: str = 'env.name'
) -> Spec:
    """Return the spec of an environment on the host, without its simulator where `SPECS` has it.

    Args:
      name: a name in HOST, with its suite behind a slash.
      batch: number of rows, at least one for each task.
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
                f'{spec.name} has {len(spec.tasks)} tasks but the batch has only {batch} '
                f'environments: expected at least one per task. Raise config.actors.batch '
                f'or name fewer tasks'
            )
    return spec


def is_on_host(name: str) -> bool:
    """Return whether an environment is stepped on the host, outside of JAX's programs."""
    return name.partition('/')[0] in HOST


def count_evaluation_rows(name: str, batch: int, episodes: int, key: str = 'env.name') -> int:
    """Return the number of rows for evaluation on the host: one per episode if rows are cheap.

    Args:
      name: name of the environment.
      batch: number of rows if they are not cheap.
      episodes: number for each task.
      key: as in `make`.

    Raises:
      UserError: if the suite is unknown.
    """
    word, _, suite = name.partition('/')
    if word not in CHEAP:
        return batch
    with _named(name, key):
        tasks = len(CHEAP[word](suite))
    return tasks * max(1, min(episodes, MAX_EVALUATION_ROWS // tasks))


def _word(name: str, key: str) -> str:
    word = name.partition('/')[0]
    if word not in JAX and word not in HOST:
        known = suggest(word, (*JAX, *HOST))
        raise UserError(f'config.{key} = {name!r} is unknown; {known}')
    return word


def _make_jax(word: str, name: str, key: str, options: Mapping[str, Any]) -> JaxEnvironment:
    environment: JaxEnvironment = _call_maker(JAX[word], name, key, options)
    with _named(name, key):
        check_environment(environment)
    return environment


def _call_maker(
    maker: Callable[..., Any], name: str, key: str, options: Mapping[str, Any], **rows: int
) -> Any:
    """Call a maker with the suite and checked options; errors name the config key."""
    _check_options(maker, name, options)
    with _named(name, key):
        return maker(name.partition('/')[2], **rows, **options)


def _check_options(maker: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the maker does not have, or of another type."""
    defaults = get_keyword_defaults(maker)
    for reserved in ('batch', 'seed'):  # config keys of their own
        defaults.pop(reserved, None)
    kinds = [parameter.kind for parameter in inspect.signature(maker).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:  # the simulator checks them
        options = {option: value for option, value in options.items() if option in defaults}
    check_options('config.env.options', name, options, defaults)


@contextlib.contextmanager
def _named(name: str, key: str) -> Iterator[None]:
    """Put the config key that names the environment in front of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f'config.{key} = {name!r}: {error}') from error
