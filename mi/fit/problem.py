"""The interface of a small supervised problem and its model.

To add a problem, write a module with `SCHEMA`, the rules for its config keys, and `make(config)`,
which returns a `Problem`. Set `config.problem.name` to the path of the module, or to
'package.module:Object' for a class or another object with both.
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
    """A problem, as pure functions for one seed that the trainer maps over all seeds.

    Attributes:
      examples: number of examples in a batch.
    """

    examples: int

    def draw_world(self, key: PRNGKey) -> World:
        """Draw the data that is fixed for a seed, such as its tasks."""
        return {}

    @abc.abstractmethod
    def init_params(self, key: PRNGKey, world: World) -> Params:
        """Draw the initial parameters."""

    @abc.abstractmethod
    def loss(self, params: Params, world: World, key: PRNGKey) -> tuple[Array, Metrics]:
        """Return the loss and the metrics of a batch drawn with the key."""

    @abc.abstractmethod
    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        """Return scalar metrics by split, named `metric/TASK` if they are for a single task.

        The key is the same for every evaluation of a seed.
        """

    @abc.abstractmethod
    def costs(self) -> Costs:
        """Count 'parameters' and 'flops_per_example', each {'model': …, 'fusion': …}.

        If a seed trains several networks, these are the counts of one of them.
        """

    def artifacts(self, params: Params, world: World, key: PRNGKey) -> Metrics:
        """Return arrays to save at the end of training, such as the data of a figure."""
        return {}

    def model_params(self, params: Params) -> Params:
        """Return the parameters of all networks, which determine the size of the model."""
        return params
