"""Transfer to a new task, which is learned from a few of its examples."""

from collections.abc import Callable

import jax
import optax
from chex import Array

from mi.config import Rule, integer, number
from mi.fit.problem import Params

SCHEMA: dict[str, Rule] = {
    'transfer.steps': integer(1),
    'transfer.learning_rate': number(0, exclusive=True),
}


def fit(
    loss: Callable[[Params], Array], params: Params, steps: int, learning_rate: float
) -> Params:
    """Minimize a loss with Adam and a cosine learning-rate schedule that ends at 0.

    Args:
      loss: function from the parameters to a scalar.
      params: initial parameters.
      steps: number of steps of Adam.
      learning_rate: learning rate of the first step.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(
        carry: tuple[Params, optax.OptState], _: None
    ) -> tuple[tuple[Params, optax.OptState], None]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, steps)
    return params
