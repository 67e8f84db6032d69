"""A small supervised problem and the model that learns it.

To add a problem, write a module with `SCHEMA`, the rules of its config keys, and `make(config)`,
which returns a `Problem`, and give its path as `config.problem.name`. A class with both, or another
object, has the name 'package.module:Object'.
"""

import abc
import dataclasses
from typing import TypeAlias

import chex
from chex import Array, PRNGKey

Metrics = dict[str, Array]
Params: TypeAlias = chex.ArrayTree
World: TypeAlias = chex.ArrayTree
Costs = dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Problem(abc.ABC):
    """Pure functions of one seed; the trainer maps them over all seeds.

    Attributes:
      examples: number of examples in a batch.
    """

    examples: int

    def draw_world(self, key: PRNGKey) -> World:
        """Draw what stays fixed for a seed, such as its tasks and their data."""
        return {}

    @abc.abstractmethod
    def init_params(self, key: PRNGKey, world: World) -> Params:
        """Draw the initial parameters."""

    @abc.abstractmethod
    def loss(self, params: Params, world: World, key: PRNGKey) -> tuple[Array, Metrics]:
        """Return the loss and the metrics of the batch that the key draws."""

    @abc.abstractmethod
    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        """Return scalar metrics by split, `metric/TASK` for those of one task.

        Every evaluation of a seed has the same key.
        """

    @abc.abstractmethod
    def costs(self) -> Costs:
        """Count 'parameters' and 'flops_per_example', each {'model': …, 'fusion': …}.

        They are those of one network if a seed trains several.
        """

    def artifacts(self, params: Params, world: World, key: PRNGKey) -> Metrics:
        """Return arrays to keep at the end of training, such as the data of a figure."""
        return {}

    def model_params(self, params: Params) -> Params:
        """Return the parameters that count as the model's, those of all its networks."""
        return params
