"""The parameters that are evaluated, where they differ from those that are trained.

An exponential moving average (`optim.ema`), of the parameters p after each update n = 1, 2, …:

    e_n = d e_{n−1} + (1 − d) p_n, e_0 = 0;    average = e_n / (1 − dⁿ)

and the iterates x of a schedule-free optimizer of optax (Defazio et al., The Road Less Scheduled,
2024), which trains y = (1 − b₁) z + b₁ x. Both are in the state of the optimizer, so that they are
divided over devices, saved and resumed with it.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mi.training.checkpoint import Checkpoints
from mi.training.sharding import Tree


class AveragedState(NamedTuple):
    """The state of an optimizer, and the average of the parameters that it has produced.

    Attributes:
      optimizer: state of the optimizer.
      count: number of updates, int32.
      ema: average of the parameters after each update; the initial ones before the first.
    """

    optimizer: optax.OptState
    count: chex.Array
    ema: chex.ArrayTree


def average_params(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Return the optimizer with an average of the parameters in its state, an `AveragedState`.

    With the debiased average a_n of the formula above, a_n = a_{n−1} + s (p_n − a_{n−1}) and
    s = (1 − d) / (1 − dⁿ): the first average is the first p, without a trace of the initial ones.

    Args:
      optimizer: the optimizer.
      decay: d, in (0, 1).
    """
    log_decay = math.log(decay)

    def init(params: chex.ArrayTree) -> AveragedState:
        ema = jax.tree.map(jnp.copy, params)  # a buffer of its own, as both are donated
        return AveragedState(optimizer.init(params), jnp.int32(0), ema)

    def update(
        grads: chex.ArrayTree, state: Any, params: chex.ArrayTree | None = None
    ) -> tuple[chex.ArrayTree, AveragedState]:
        assert params is not None
        updates, optimizer_state = optimizer.update(grads, state.optimizer, params)
        count = optax.safe_increment(state.count)
        step_size = jnp.expm1(log_decay) / jnp.expm1(count * log_decay)  # exactly 1 at first
        next_params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(next_params, state.ema, step_size)
        return updates, AveragedState(optimizer_state, count, ema)

    return optax.GradientTransformation(init, update)


def has_eval_params(opt_state: optax.OptState) -> bool:
    """Return whether a state, or its shapes, holds parameters to evaluate beside the trained."""
    return isinstance(opt_state, AveragedState) or is_schedule_free(opt_state)


def is_schedule_free(opt_state: optax.OptState) -> bool:
    """Return whether a state, or its shapes, is that of a schedule-free optimizer."""
    return bool(_find_schedule_free(opt_state))


def get_eval_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Return the parameters to evaluate: the average, x of a schedule-free optimizer, or `params`.

    Args:
      opt_state: state of the optimizer, of one seed.
      params: the trained parameters.

    Raises:
      ValueError: if several parts of the optimizer are schedule-free.
    """
    if isinstance(opt_state, AveragedState):
        return opt_state.ema
    states = _find_schedule_free(opt_state)
    if len(states) > 1:
        raise ValueError(f'expected at most one schedule-free optimizer (got {len(states)})')
    return contrib.schedule_free_eval_params(states[0], params) if states else params


def get_seeds_eval_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Return `get_eval_params` of all seeds, [S, …], placed as `params` are.

    Where the trained parameters are evaluated, these are `params` themselves.
    """
    if not has_eval_params(opt_state):
        return params
    if isinstance(opt_state, AveragedState):
        return opt_state.ema
    shardings = jax.tree.map(lambda a: a.sharding, params)
    return jax.jit(_map_eval_params, out_shardings=shardings)(opt_state, params)


_map_eval_params = jax.vmap(get_eval_params)  # one function, so that it is compiled once


def restore_eval_params(
    checkpoints: Checkpoints,
    checkpoint_dir: pathlib.Path,
    params: Tree,
    opt_state: optax.OptState,
    *,
    prefix: str = '',
    has_seeds: bool = True,
) -> Tree:
    """Restore the parameters to evaluate from a checkpoint.

    Args:
      checkpoints: the checkpoints of the run.
      checkpoint_dir: one of them.
      params, opt_state: shapes, dtypes and shardings of these parts of the state.
      prefix: path of the fields that hold both parts, such as 'learner.'.
      has_seeds: whether the arrays have a leading axis of seeds.

    Raises:
      UserError: if the checkpoint is of another model or another optimizer.
    """
    if isinstance(opt_state, AveragedState):
        return checkpoints.restore_part(checkpoint_dir, f'{prefix}opt_state.ema', opt_state.ema)
    trained_params = checkpoints.restore_part(checkpoint_dir, f'{prefix}params', params)
    if not has_eval_params(opt_state):
        return trained_params
    opt_state = checkpoints.restore_part(checkpoint_dir, f'{prefix}opt_state', opt_state)
    get_params = get_seeds_eval_params if has_seeds else get_eval_params
    return get_params(opt_state, trained_params)


def map_copies(
    function: Callable[[chex.ArrayTree], chex.ArrayTree], opt_state: optax.OptState
) -> optax.OptState:
    """Apply an affine function of the parameters to the copies of them in a state.

    These are the average and z of a schedule-free optimizer. Both weight parameters with a sum of
    1, so that an affine function of theirs is theirs of the function.
    """

    def map_node(node: Any) -> Any:
        if isinstance(node, AveragedState):
            return AveragedState(
                map_copies(function, node.optimizer), node.count, function(node.ema)
            )
        return node._replace(z=function(node.z)) if _is_schedule_free(node) else node

    return jax.tree.map(map_node, opt_state, is_leaf=_holds_copy)


def _holds_copy(node: object) -> bool:
    return isinstance(node, AveragedState | contrib.ScheduleFreeState)


def _is_schedule_free(node: object) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)


def _find_schedule_free(opt_state: optax.OptState) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_schedule_free)
    return [node for node in nodes if _is_schedule_free(node)]
