"""The environment registries JAX and HOST, and functions that make an environment by name.

A name is a key of a registry or 'package.module:maker'. It may end with a slash and a suite, as in
'babyai/goto' or 'my_package.rooms:make/small', which is passed to the maker:

    JAX    maker(suite, **options) → JaxEnvironment
    HOST   maker(suite, *, batch, seed, **options) → HostEnvironment

Options are keyword-only arguments with defaults. A config file can also add an entry, `JAX[name] =
maker`, except for actors of the topology 'ray', which do not read the config file.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from mi.config import ArgumentError, UserError, has_parameter, suggest
from mi.options import check_options, get_keyword_defaults
from mi.registry import Registry, is_reference
from mi.rl.envs.check import check_batch, check_environment, check_spec
from mi.rl.envs.host import atari, babyai, dmlab30, gymnasium, procgen
from mi.rl.envs.jax import actuator_inversion, catch, xland
from mi.rl.envs.jax.batched import Batched
from mi.rl.envs.spec import HostEnvironment, JaxEnvironment, Spec

Options = Mapping[str, object]  # argument of the maker → value
Made = TypeVar('Made')

JAX: Registry[Callable[..., JaxEnvironment]] = Registry(
    xland=xland.make,
    catch=catch.make,
    actuator_inversion=actuator_inversion.make,
)
HOST: Registry[Callable[..., HostEnvironment]] = Registry(
    babyai=babyai.make,
    atari=atari.make,
    procgen=procgen.make,
    gymnasium=gymnasium.make_gym,
    vizdoom=gymnasium.make_vizdoom,
    dmlab30=dmlab30.make,
)
# The maker of a host environment has the argument `batch`.
JAX.refuse = lambda maker: 'it runs on the host' if has_parameter(maker, 'batch') else ''
HOST.refuse = lambda maker: '' if has_parameter(maker, 'batch') else 'it has no argument batch'
# Makers of specs that need no simulator: (suite, options that change the spec) → spec.
SPECS: dict[str, Callable[..., Spec]] = {
    'atari': atari.make_spec,
    'procgen': procgen.make_spec,
    'dmlab30': dmlab30.make_spec,
}
# Suite → its tasks, for environments whose rows are cheap: a megabyte each and no process.
CHEAP: dict[str, Callable[[str], tuple[str, ...]]] = {
    'babyai': babyai.parse_levels,
    'atari': atari.parse_suite,
    'procgen': procgen.parse_suite,
}
MAX_EVALUATION_ROWS = 1024


def make(env_name: str, options: Options | None = None) -> JaxEnvironment:
    """Make a JAX environment.

    Args:
      env_name: a name in `JAX`, optionally followed by a slash and a suite.
      options: keyword arguments for the maker.

    Raises:
      ArgumentError: if the name or an option is unknown, the environment runs on the host, its
        maker raises an error, or the environment contradicts its spec.
    """
    maker_name = _parse_maker_name(env_name)
    if maker_name in HOST:
        raise ArgumentError(
            f'`env_name` = {env_name!r} runs on the host: expected an environment in JAX. Try '
            f'mi.rl.envs.pool'
        )
    return _make_jax(maker_name, env_name, options or {})


def pool(env_name: str, batch: int, seed: int, options: Options | None = None) -> HostEnvironment:
    """Make a batch of environments on the host, from either registry.

    Args:
      env_name: a name in `JAX` or `HOST`, optionally followed by a slash and a suite.
      batch: number of environments.
      seed: seed for all random numbers in the environments.
      options: keyword arguments for the maker.

    Raises:
      ArgumentError: if the name or an option is unknown, the maker raises an error, or the
        environment contradicts its spec.
    """
    maker_name, options = _parse_maker_name(env_name), options or {}
    if maker_name in JAX:
        return Batched(_make_jax(maker_name, env_name, options), batch, seed)
    environment: HostEnvironment = _call_maker(
        HOST[maker_name], env_name, options, batch=batch, seed=seed
    )
    with _name_in_errors(env_name):
        check_spec(environment.spec)
    return environment


def host_spec(env_name: str, batch: int, options: Options | None = None) -> Spec:
    """Return the spec of a host environment. Names in `SPECS` do not start their simulator.

    Args:
      env_name: a name in `HOST`, optionally followed by a slash and a suite.
      batch: number of environments, at least one for each task.
      options: keyword arguments for the maker.

    Raises:
      ArgumentError: under the same conditions as `pool`.
    """
    maker_name, _, suite = env_name.partition('/')
    options = options or {}
    if maker_name not in SPECS:
        with contextlib.closing(pool(env_name, batch, 0, options)) as environment:
            return environment.spec

    # Make the spec alone, from the options that change it, with the checks of `pool`.
    _check_options(HOST[maker_name], env_name, options)
    parameters = inspect.signature(SPECS[maker_name]).parameters
    with _name_in_errors(env_name):
        spec = SPECS[maker_name](
            suite,
            **{option: setting for option, setting in options.items() if option in parameters},
        )
        check_spec(spec)
        check_batch(spec.name, len(spec.tasks), batch)
    return spec


def is_on_host(env_name: str) -> bool:
    """Return whether an environment is stepped on the host rather than in a JAX program."""
    return env_name.partition('/')[0] in HOST


def count_evaluation_rows(env_name: str, batch: int, num_episodes: int) -> int:
    """Return the number of environments for an evaluation on the host.

    For cheap environments this is one per episode, up to `MAX_EVALUATION_ROWS`.

    Args:
      env_name: name of the environment.
      batch: number to return for environments that are not cheap.
      num_episodes: number of episodes for each task.

    Raises:
      ArgumentError: if the suite is unknown.
    """
    maker_name, _, suite = env_name.partition('/')
    if maker_name not in CHEAP:
        return batch
    with _name_in_errors(env_name):
        num_tasks = len(CHEAP[maker_name](suite))
    return num_tasks * max(1, min(num_episodes, MAX_EVALUATION_ROWS // num_tasks))


def _parse_maker_name(env_name: str) -> str:
    maker_name = env_name.partition('/')[0]
    if maker_name not in JAX and maker_name not in HOST:
        known_names = JAX if is_reference(maker_name) else (*JAX, *HOST)
        hint = suggest(maker_name, known_names)
        raise ArgumentError(f'`env_name` = {env_name!r} is unknown; {hint}')
    return maker_name


def _make_jax(maker_name: str, env_name: str, options: Options) -> JaxEnvironment:
    environment: JaxEnvironment = _call_maker(JAX[maker_name], env_name, options)
    with _name_in_errors(env_name):
        check_environment(environment)
    return environment


def _call_maker(maker: Callable[..., Made], env_name: str, options: Options, **rows: int) -> Made:
    """Check the options and call the maker, and add the environment's name to errors."""
    _check_options(maker, env_name, options)
    with _name_in_errors(env_name):
        return maker(env_name.partition('/')[2], **rows, **options)


def _check_options(maker: Callable[..., object], env_name: str, options: Options) -> None:
    """Raise an error if the maker does not have an option, or it has a different type."""
    defaults = get_keyword_defaults(maker)
    for reserved_option in ('batch', 'seed'):  # config keys of their own
        defaults.pop(reserved_option, None)
    parameter_kinds = [parameter.kind for parameter in inspect.signature(maker).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in parameter_kinds:  # the simulator checks them
        options = {option: setting for option, setting in options.items() if option in defaults}
    check_options(env_name, options, defaults)


@contextlib.contextmanager
def _name_in_errors(env_name: str) -> Iterator[None]:
    """Prefix errors with the name of the environment."""
    try:
        yield
    except UserError as error:
        raise ArgumentError(f'`env_name` = {env_name!r}: {error}') from error
