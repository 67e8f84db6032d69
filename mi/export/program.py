"""Export of a trained model's step to a StableHLO program, which runs without this package.

The parameters are constants of the program. The batch size is symbolic unless it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax import Array, export

from mi.config import UserError, suggest_install
from mi.lm.model import LanguageModel
from mi.rl.agent import Agent, Inputs, forward

Step = Callable[..., Any]

SYMBOLIC_ERRORS = (jax.errors.InconclusiveDimensionOperation, TypeError, ValueError)
"""What jax and NumPy raise where a size has to be known."""

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def make_lm_step(
    model: LanguageModel, params: ArrayTree, length: int
) -> tuple[Step, Callable[[int], Any]]:
    """Return the step of a language model, and a function that makes its first arguments.

        (state, tokens int32 [B]) → (state, logits [B, V] of the next token)

    The state holds the carry, and for a Transformer the cached keys and values. It is zero before
    the first token. After `length` tokens, the logits of a Transformer are NaN.

    Args:
      model: the language model. A Transformer must have a memory.
      params: its parameters for one seed.
      length: maximum number of tokens that a Transformer can read.
    """
    model, params = model.decoder(), jax.tree.map(jnp.asarray, params)

    def step(state: Mapping[str, Any], tokens: Array) -> tuple[dict[str, Any], Array]:
        variables = {'params': params, 'cache': state['cache']}
        (carry, logits), updated = model.apply(
            variables, state['carry'], tokens[None], mutable=['cache']
        )
        return {'carry': carry, 'cache': dict(updated.get('cache', {}))}, logits[0]

    def make_args(batch_size: int) -> tuple[dict[str, Any], Array]:
        tokens = jnp.zeros(batch_size, jnp.int32)
        carry = model.initial_carry(batch_size)
        text = jnp.zeros((length, batch_size), jnp.int32)
        shapes: Any = jax.eval_shape(model.init, jax.random.key(0), carry, text)
        cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.get('cache', {}))
        return {'carry': carry, 'cache': cache}, tokens

    return step, make_args


def make_policy_step(agent: Agent, params: ArrayTree) -> tuple[Step, Callable[[int], Any]]:
    """Return the step of a policy, and a function that makes its first arguments.

        (carry, observation, action [B], reward [B], is_first [B]) → (carry, logits [B, A],
        value [B])

    The action and the reward are those of the previous step, and are ignored where an episode
    starts. The value is in the units of PopArt. The carry is zero before the first step.

    Args:
      agent: the agent.
      params: its parameters for one seed.
    """
    params = jax.tree.map(jnp.asarray, params)

    def step(
        carry: ArrayTree,
        observation: dict[str, Array],
        action: Array,
        reward: Array,
        is_first: Array,
    ) -> tuple[ArrayTree, Array, Array]:
        inputs = Inputs(observation, action, reward, is_first)
        one_step = jax.tree.map(lambda a: a[None], inputs)
        carry, outputs = forward(agent, params, carry, one_step)
        return carry, outputs.logits[0], outputs.value[0]

    def make_args(batch_size: int) -> tuple[Any, ...]:
        observation = {
            name: jnp.zeros((batch_size, *array.shape), array.dtype)
            for name, array in agent.spec.observation.items()
        }
        action, reward = jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size)
        carry = agent.initial_carry(batch_size)
        return carry, observation, action, reward, jnp.ones(batch_size, bool)

    return step, make_args


def export_step(
    step: Step, make_args: Callable[[int], Any], platforms: Sequence[str], batch_size: int = 0
) -> export.Exported:
    """Export a step, lowered for each of `platforms`.

    Args:
      step: the function to export.
      make_args: function that returns the arguments of the step for a batch size.
      platforms: platforms to lower for, from PLATFORMS.
      batch_size: B, or 0 for a symbolic batch size.

    Raises:
      UserError: if the step does not support a symbolic batch size.
    """
    if batch_size:
        args = jax.eval_shape(lambda: make_args(batch_size))
        return export.export(jax.jit(step), platforms=platforms)(*args)

    # Mark the axis whose length is the batch size, which is the one that differs between two.
    (symbol,) = export.symbolic_shape('b')
    two, three = (jax.eval_shape(lambda n=n: make_args(n)) for n in (2, 3))
    args = jax.tree.map(
        lambda a, b: jax.ShapeDtypeStruct(
            [m if m == n else symbol for m, n in zip(a.shape, b.shape, strict=True)], a.dtype
        ),
        two,
        three,
    )
    try:
        return export.export(jax.jit(step), platforms=platforms)(*args)
    except SYMBOLIC_ERRORS as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(
            f'--batch=0: expected a model that can be exported for any batch size (got {reason}). '
            f'Try --batch=1'
        ) from error


def serialize(exported: export.Exported) -> bytes:
    """Return the bytes that `jax.export.deserialize` reads.

    Raises:
      UserError: if flatbuffers is not installed.
    """
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError(f'flatbuffers is not installed. Try {suggest_install("export")}') from error
