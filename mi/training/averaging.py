"""The parameters that are evaluated, where they differ from those that are trained.

A schedule-free optimizer of optax trains y = (1 − b₁) z + b₁ x and is evaluated at x (Defazio et
al., The Road Less Scheduled, 2024). Its state has z, from which x is computed.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import optax
from optax import contrib

from mi.training.checkpoint import Checkpoints
from mi.training.sharding import Tree


def has_eval_params(opt_state: optax.OptState) -> bool:
    """Return whether a state, or its shapes, holds parameters to evaluate beside the trained."""
    return bool(_find_schedule_free(opt_state))


def get_eval_params(opt_state: optax.OptState, params: Tree) -> Tree:
    """Return the parameters to evaluate: x of a schedule-free optimizer, otherwise `params`.

    Args:
      opt_state: state of the optimizer, of one seed.
      params: the trained parameters.

    Raises:
      ValueError: if several parts of the optimizer are schedule-free.
    """
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

    The copy of a schedule-free optimizer is z. As y weights z and x with a sum of 1, the same
    function of y and z is that of x.
    """
    return jax.tree.map(
        lambda node: node._replace(z=function(node.z)) if _is_schedule_free(node) else node,
        opt_state,
        is_leaf=_is_schedule_free,
    )


def _is_schedule_free(node: object) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)


def _find_schedule_free(opt_state: optax.OptState) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_schedule_free)
    return [node for node in nodes if _is_schedule_free(node)]
