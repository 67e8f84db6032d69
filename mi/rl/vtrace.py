"""V-trace: off-policy targets and advantages.

Espeholt et al., IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
Architectures, 2018. One trajectory, time first; the caller vmaps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

ROUNDING = 1e-4  # relative, of ρ between two compilations of one policy


class VTrace(NamedTuple):
    """Targets and advantages of T transitions; no gradient flows through them.

    Attributes:
      targets: [T], v_t, to which the values are regressed.
      advantages: [T], for the policy gradient, min(ρ̄, ρ_t) included.
      is_clipped: bool [T], whether ρ_t exceeded ρ̄ by more than rounding.
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

    Where `valid_t` is false, the action was ignored because the episode had already ended: there
    δ_t = 0 and the trace is cut, so that v_t = V_t and the advantage is 0. An episode cut by its
    time limit therefore bootstraps from the value of its last observation; one that terminated
    does not.

    Args:
      values: [T + 1], V of every observation; the last one bootstraps.
      reward_t: [T], of the action at observation t.
      discount_t: [T], γ, or 0 where that action terminated the episode.
      log_rho_t: [T], log π(a_t) − log μ(a_t), with π the learner's policy and μ the one that acted.
      valid_t: bool [T], false where the action was ignored.
      lambda_, rho_clip, c_clip: λ, ρ̄ and c̄.

    Raises:
      ValueError: if the shapes do not match.
    """
    num_steps = reward_t.shape[0]
    other_shapes = [array.shape for array in (reward_t, discount_t, log_rho_t, valid_t)]
    if values.shape != (num_steps + 1,) or any(shape != (num_steps,) for shape in other_shapes):
        raise ValueError(
            f'values.shape = {values.shape}: expected [T + 1], and [T] for the other arguments '
            f'(got {other_shapes}). Vmap over the batch'
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
