"""Search spaces, which map config keys to distributions, and random search in them.

SPACE = {
    'optim.learning_rate': log_uniform(1e-4, 1e-1),
    'dropout.word': uniform(0.0, 0.5),
    'model.hidden': integer(32, 512, log=True),
    'model.fusion.name': choice('concat', 'mi'),
    'seeds': (0, 1, 2),                              # any other value is the same in every member
}

Source: Bergstra & Bengio, *Random Search for Hyper-Parameter Optimization* (JMLR 2012).
"""

import abc
import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any

from launch.members import Overrides
from mi.config import UserError

DIGITS = 6  # significant digits of a float that is drawn, so that it can be part of a name


class Distribution(abc.ABC):
    """A distribution of values, defined by its quantile function."""

    @abc.abstractmethod
    def quantile(self, probability: float) -> Any:
        """Return the value below which draws fall with the given probability in [0, 1)."""


@dataclasses.dataclass(frozen=True)
class Uniform(Distribution):
    """A uniform distribution over floats in [low, high], or a log-uniform one if `log` is True."""

    low: float
    high: float
    log: bool = False

    def quantile(self, probability: float) -> float:
        if self.log:
            log_low, log_high = math.log(self.low), math.log(self.high)
            drawn = math.exp(log_low + probability * (log_high - log_low))
        else:
            drawn = self.low + probability * (self.high - self.low)
        return round_float(drawn, self)


@dataclasses.dataclass(frozen=True)
class Integer(Distribution):
    """A uniform distribution over integers in [low, high], or a log-uniform one if `log` is True.

    If `log` is True, a float that is log-uniform in [low − 1/2, high + 1/2] is rounded.
    """

    low: int
    high: int
    log: bool = False

    def quantile(self, probability: float) -> int:
        if self.log:
            log_low, log_high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            drawn = round(math.exp(log_low + probability * (log_high - log_low)))
        else:
            drawn = self.low + math.floor(probability * (self.high - self.low + 1))
        return min(max(drawn, self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Choice(Distribution):
    """The distribution that draws one of several values with equal probability."""

    values: tuple[Any, ...]

    def quantile(self, probability: float) -> Any:
        return self.values[math.floor(probability * len(self.values))]


Space = Mapping[str, Any]  # config key → Distribution, or a constant value


def uniform(low: float, high: float) -> Uniform:
    """Return the distribution of a float that is uniform in [low, high].

    Raises:
      UserError: unless low < high and both are finite.
    """
    _check_bounds('uniform', low, high)
    return Uniform(float(low), float(high))


def log_uniform(low: float, high: float) -> Uniform:
    """Return the distribution of a float whose logarithm is uniform in [log low, log high].

    Raises:
      UserError: unless 0 < low < high and both are finite.
    """
    _check_bounds('log_uniform', low, high, above=0)
    return Uniform(float(low), float(high), log=True)


def integer(low: int, high: int, *, log: bool = False) -> Integer:
    """Return the distribution of an integer in [low, high], including both bounds. See `Integer`.

    Raises:
      UserError: unless both are integers with low < high, and 0 < low for a log-uniform one.
    """
    if not (isinstance(low, int) and isinstance(high, int)):
        raise UserError(f'integer({low!r}, {high!r}): expected two integers. Try uniform')
    _check_bounds('integer', low, high, above=0 if log else -math.inf)
    return Integer(low, high, log)


def choice(*values: Any) -> Choice:
    """Return the distribution over several values, as in choice('concat', 'mi').

    Raises:
      UserError: unless there are at least two values, and all differ.
    """
    if len({repr(value) for value in values}) < max(2, len(values)):
        raise UserError(f'choice{values!r}: expected two or more different values')
    return Choice(values)


def sample(space: Space, count: int, seed: int = 0) -> list[Overrides]:
    """Draw the members of a random search, as in sample(SPACE, 20, seed=0).

    A value depends only on the seed, the index of the member and the key. The first members
    therefore stay the same if `count` is raised, and the other keys keep their values if a key is
    added.

    Raises:
      UserError: if the count is less than 1, or nothing in the space has a distribution.
    """
    if count < 1:
        raise UserError(f'sample: count = {count!r}: expected 1 or more members')
    if not list_searched_keys(space):
        raise UserError(
            'sample: expected at least one distribution in the space, such as '
            'log_uniform(1e-4, 1e-1)'
        )
    return [
        {key: _draw(entry, f'{seed} {index} {key}') for key, entry in space.items()}
        for index in range(count)
    ]


def round_float(drawn: float, distribution: Uniform) -> float:
    """Round a draw to `DIGITS` significant digits, within the bounds."""
    return min(max(float(f'{drawn:.{DIGITS}g}'), distribution.low), distribution.high)


def derive_seed(seed: int, name: str) -> int:
    """Return a seed in [0, 2³²) that depends on a seed and a name."""
    return random.Random(f'{seed} {name}').getrandbits(32)


def list_searched_keys(space: Space) -> list[str]:
    """Return the keys of a space whose values are distributions."""
    return [key for key, entry in space.items() if isinstance(entry, Distribution)]


def describe_space(space: Space) -> dict[str, str]:
    """Return key → text for its distribution or constant, for sweep.json."""
    return {key: repr(entry) for key, entry in space.items()}


def _draw(entry: Any, draw_seed: str) -> Any:
    # Python guarantees that a seed gives the same `random()` in every version.
    is_drawn = isinstance(entry, Distribution)
    return entry.quantile(random.Random(draw_seed).random()) if is_drawn else entry


def _check_bounds(name: str, low: float, high: float, above: float = -math.inf) -> None:
    if not (above < low < high and math.isfinite(high) and math.isfinite(low)):
        expected = f'{above} < low < high' if math.isfinite(above) else 'low < high, both finite'
        raise UserError(f'{name}({low!r}, {high!r}): expected {expected}')
