"""What a run of mi.fit learns: pure functions of one seed, which the trainer maps over all seeds.

To add a problem, write a module with SCHEMA, the rules of its keys of the config, and `make`, and
give it a line in mi.fit.factory.PROBLEMS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

Metrics = dict[str, Array]


class Problem(NamedTuple):
    """A problem and the model that is to learn it.

    Attributes:
      world: key → what a seed draws once, such as its tasks and their data; {} for nothing.
      init: (key, world) → parameters.
      loss: (parameters, world, key) → the loss of the batch that the key draws, and metrics of it.
      evaluations: split → (parameters, world, key) → metrics, scalars; `metric/TASK` for those of
        one task. The key is the same at every evaluation of a seed.
      costs: () → 'parameters' and 'flops_per_example', each {'model': …, 'fusion': …}; of one
        network where a seed trains several, as in experiments.seq2seq.problem.
      examples: in a batch.
      artefacts: (parameters, world, key) → arrays to keep at the end of training, as what a figure
        is drawn from; None for none.
      model: all parameters → those that count as the model's, as in `costs`; of all networks.
    """

    world: Callable[[Array], Any]
    init: Callable[[Array, Any], Any]
    loss: Callable[[Any, Any, Array], tuple[Array, Metrics]]
    evaluations: dict[str, Callable[[Any, Any, Array], Metrics]]
    costs: Callable[[], dict[str, dict[str, int]]]
    examples: int
    artefacts: Callable[[Any, Any, Array], Metrics] | None = None
    model: Callable[[Any], Any] = lambda params: params
