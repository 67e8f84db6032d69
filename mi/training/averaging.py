"""Averages of the trained parameters, which are evaluated in their place.

There are two kinds. The first is an exponential moving average (`optim.ema`) of the parameters p_n
after each update n = 1, 2, …:

    e_n = d e_{n−1} + (1 − d) p_n, e_0 = 0;    average = e_n / (1 − dⁿ)

The second is the iterate x of a schedule-free optimizer of optax (Defazio et al., The Road Less
Scheduled, 2024), which trains y = (1 − b₁) z + b₁ x. Both are part of the optimizer state, so that
they are sharded, saved and restored with it.
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
    """State of an optimizer with an average of the parameters.

    Attributes:
      optimizer: state of the optimizer.
      count: number of updates, int32.
      ema: debiased average of the parameters, or the initial parameters before the first update.
    """

    optimizer: optax.OptState
    count: chex.Array
    ema: chex.ArrayTree


def average_params(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Wrap an optimizer so that its state, an `AveragedState`, has an average of the parameters.

    The debiased average above is updated as a_n = a_{n−1} + s (p_n − a_{n−1}), with
    s = (1 − d) / (1 − dⁿ). The first average is p_1, independent of the initial parameters.

    Args:
      optimizer: the optimizer to wrap.
      decay: decay rate of the average, d, in (0, 1).

    Returns:
      The wrapped optimizer.
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
    """Return whether evaluation uses parameters other than the trained ones.

    Args:
      opt_state: state of the optimizer, or a tree of its shapes.
    """
    return isinstance(opt_state, AveragedState) or is_schedule_free(opt_state)


def is_schedule_free(opt_state: optax.OptState) -> bool:
    """Return whether an optimizer state belongs to a schedule-free optimizer.

    Args:
      opt_state: state of the optimizer, or a tree of its shapes.
    """
    return bool(_find_schedule_free(opt_state))


def get_eval_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Return the parameters to evaluate.

    Args:
      opt_state: state of the optimizer, for one seed.
      params: trained parameters.

    Returns:
      The average, the iterate x of a schedule-free optimizer, or `params` if there is neither.

    Raises:
      ValueError: if several parts of the optimizer are schedule-free.
    """
    if isinstance(opt_state, AveragedState):
        return opt_state.ema
    states = _find_schedule_free(opt_state)
    if len(states) > 1:
        raise ValueError(
            f'opt_state: expected at most one schedule-free state, but got {len(states)}'
        )
    return contrib.schedule_free_eval_params(states[0], params) if states else params


def get_seeds_eval_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Return the parameters to evaluate for all seeds, [S, …], sharded like `params`.

    Without an average, these are `params` themselves.
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
      checkpoint_dir: directory of the checkpoint to restore from.
      params, opt_state: shapes, dtypes and shardings of these parts of the state.
      prefix: path of the field that contains both parts, such as 'learner.'.
      has_seeds: whether the arrays have a leading axis of seeds.

    Raises:
      UserError: if the checkpoint has a different model or optimizer.
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
    """Apply an affine function of the parameters to their copies in an optimizer state.

    The copies are the average, and z of a schedule-free optimizer. Both are weighted means of
    parameters, with which an affine function commutes.
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
