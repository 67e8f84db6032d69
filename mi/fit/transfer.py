"""What is learnt of a new task from a few of its examples, the rest left as it is."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

from mi.config import Rule, integer, number

SCHEMA: dict[str, Rule] = {
    'transfer.steps': integer(1),
    'transfer.learning_rate': number(0, exclusive=True),
}


def fitted(loss: Callable[[Any], Array], start: Any, steps: int, rate: float) -> Any:
    """Where so many steps of Adam lead from the start, the learning rate falling to 0 as a cosine.

    Args:
      loss: of what is fitted, any tree of arrays.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        fit, memory = state
        updates, memory = optimiser.update(jax.grad(loss)(fit), memory, fit)
        return (optax.apply_updates(fit, updates), memory), None

    (fit, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), None, steps)
    return fit
