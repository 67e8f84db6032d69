"""V-trace targets and advantages for off-policy trajectories.

Source: Espeholt et al., IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
Architectures, 2018. The functions apply to one trajectory; vmap them over a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

ROUNDING = 1e-4  # relative, of ρ between two compilations of one policy


class VTrace(NamedTuple):
    """Targets and advantages of T transitions. No gradient flows through them.

    Attributes:
      targets: targets v_t for the values, [T].
      advantages: advantages for the policy gradient, multiplied by min(ρ̄, ρ_t), [T].
      is_clipped: whether ρ_t exceeded ρ̄ by more than a rounding error, bool [T].
    """

    targets: Array
    advantages: Array
    is_clipped: Array


def vtrace(  # noqa: PLR0913 - the arguments of rlax's
    values: Array,
    reward_t: Array,
    discount_t: Array,
    log_rho_t: Array,
    valid_t: Array,
    lambda_: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> VTrace:
    """Compute targets and advantages of one trajectory of T transitions.

        δ_t = min(ρ̄, ρ_t) (r_t + γ_t V_{t+1} − V_t),   c_t = λ min(c̄, ρ_t)
        v_t − V_t = δ_t + γ_t c_t (v_{t+1} − V_{t+1}),   v_T = V_T
        advantage_t = min(ρ̄, ρ_t) (r_t + γ_t v_{t+1} − V_t)

    Where `valid_t` is False, the action was ignored because the episode had already ended. There
    δ_t = 0 and the trace is cut, so that v_t = V_t and the advantage is 0. An episode cut by its
    time limit therefore bootstraps from the value of its last observation, whereas one that
    terminated does not.

    Args:
      values: V of every observation, [T + 1]. The last one is for bootstrapping.
      reward_t: reward of the action at observation t, [T].
      discount_t: γ, or 0 where the action terminated the episode, [T].
      log_rho_t: log π(a_t) − log μ(a_t), [T], with the learner's policy π and the policy that
        acted, μ.
      valid_t: bool [T], False where the action was ignored.
      lambda_, rho_clip, c_clip: λ, ρ̄ and c̄.

    Raises:
      ValueError: if the shapes do not match.
    """
    num_steps = reward_t.shape[0]
    other_shapes = [array.shape for array in (reward_t, discount_t, log_rho_t, valid_t)]
    if values.shape != (num_steps + 1,) or any(shape != (num_steps,) for shape in other_shapes):
        raise ValueError(
            f'values.shape = {values.shape}: expected [T + 1], and [T] for the other arguments '
            f'(got {other_shapes}). Use jax.vmap for a batch'
        )

    # Temporal differences and traces.
    values = jax.lax.stop_gradient(values)
    rho = jnp.exp(jax.lax.stop_gradient(log_rho_t))
    rho_hat = jnp.where(valid_t, jnp.minimum(rho_clip, rho), 0)
    traces = jnp.where(valid_t, discount_t * lambda_ * jnp.minimum(c_clip, rho), 0)
    deltas = rho_hat * (reward_t + discount_t * values[1:] - values[:-1])

    # Accumulate v_t − V_t backward in time.
    def step(next_error: Array, delta_and_trace: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, trace_t = delta_and_trace
        error_t = delta_t + trace_t * next_error
        return error_t, error_t

    _, errors = jax.lax.scan(step, jnp.zeros_like(values[-1]), (deltas, traces), reverse=True)
    targets = values[:-1] + errors
    next_targets = jnp.concatenate([targets[1:], values[-1:]])
    advantages = rho_hat * (reward_t + discount_t * next_targets - values[:-1])
    return VTrace(targets, advantages, valid_t & (rho > rho_clip * (1 + ROUNDING)))
