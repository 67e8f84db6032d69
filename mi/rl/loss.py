"""IMPALA's loss with values in the units of PopArt, and its hyperparameters."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jax import Array

from mi.config import suggest
from mi.rl import popart
from mi.rl.agent import Outputs
from mi.rl.trajectory import Trajectory
from mi.rl.vtrace import vtrace

PopArtOrder = Literal['gradient_first', 'statistics_first']
POPART_ORDERS = get_args(PopArtOrder)

CLIPS: dict[str, Callable[[Array], Array]] = {  # name → function of the rewards r
    'none': lambda r: r,
    'unit': lambda r: jnp.clip(r, -1, 1),
    'paper': lambda r: 0.3 * jnp.minimum(jnp.tanh(r), 0) + 5 * jnp.maximum(jnp.tanh(r), 0),
    'code': lambda r: jnp.where(r < 0, 0.3, 1) * 5 * jnp.tanh(r / 5),
}


class Hyperparameters(NamedTuple):
    """Hyperparameters of the loss. The optimizer has its own.

    Attributes:
      discount: γ.
      lambda_, rho_clip, c_clip: λ, ρ̄ and c̄ of V-trace.
      entropy_cost, baseline_cost: weights relative to the policy gradient.
      reward_clip: a name in `CLIPS`.
      popart: step size of the PopArt statistics, β, or 0 to disable PopArt.
      popart_corrected: whether to correct the initial bias of the statistics. See `popart.update`.
      popart_order: 'gradient_first' or 'statistics_first', whether the loss uses the units before
        or after the update of the statistics. The latter is the order of van Hasselt et al. (2016),
        in which the targets of a batch bound the normalized errors of that batch.
      popart_preserve: whether values stay the same when the statistics move. Otherwise only the
        targets are normalized: n stays the same, and σ n + μ follows the returns.
    """

    discount: float = 0.99
    lambda_: float = 1.0
    rho_clip: float = 1.0
    c_clip: float = 1.0
    entropy_cost: float | Array = 0.003
    baseline_cost: float = 0.5
    reward_clip: str = 'none'
    popart: float = 3e-4
    popart_corrected: bool = True
    popart_order: PopArtOrder = 'gradient_first'
    popart_preserve: bool = True


class LossTerms(NamedTuple):
    """Terms and diagnostics of one trajectory's loss.

    Attributes:
      policy, baseline, entropy: sums over the T transitions, before they are multiplied by their
        costs: −Σ log π(a) A, ½ Σ (v − V)² in the units of PopArt, and the entropy Σ H.
      targets: V-trace targets [T], in the units of the rewards.
      kl: mean of log μ(a) − log π(a) over the valid transitions, which estimates how far the
        learner is from the policy that acted.
      clip_fraction: fraction of the valid transitions whose ρ was clipped.
      advantage: mean |A| over the valid transitions, in the units of PopArt.
    """

    policy: Array
    baseline: Array
    entropy: Array
    targets: Array
    kl: Array
    clip_fraction: Array
    advantage: Array


def clip_reward(reward: Array, clip_name: str) -> Array:
    """Clip rewards for the learner.

        none    r
        unit    r clipped to [−1, 1]
        paper   0.3 min(tanh r, 0) + 5 max(tanh r, 0), as in the paper on IMPALA
        code    5 tanh(r / 5), multiplied by 0.3 if negative, as in IMPALA's public code

    Raises:
      ValueError: if the name is unknown.
    """
    if clip_name not in CLIPS:
        raise ValueError(f'unknown reward clip {clip_name!r}; {suggest(clip_name, CLIPS)}')
    return CLIPS[clip_name](reward)


def impala_loss(
    outputs: Outputs,
    trajectory: Trajectory,
    statistics: popart.Statistics,
    hyperparameters: Hyperparameters,
) -> tuple[Array, LossTerms]:
    """Compute the loss of B trajectories, summed over time and averaged over B.

    The public code of IMPALA also sums over time.

    Args:
      outputs: outputs of the learner, [T + 1, B, …].
      trajectory: trajectories [T, B, …].
      statistics: PopArt statistics.
      hyperparameters: hyperparameters of the loss.

    Returns:
      The loss [], and its terms, which are [B] except for `targets` [T, B].
    """
    chex.assert_rank([outputs.logits, outputs.value], [3, 2])
    chex.assert_rank([trajectory.action, trajectory.log_prob, trajectory.valid], 2)
    # Map over B, axis 1 of all but the carry, which the terms do not need.
    row_axes = Trajectory(inputs=1, action=1, log_prob=1, discount=1, valid=1, carry=None)  # type: ignore[arg-type]
    compute_row = functools.partial(compute_terms, hyperparameters=hyperparameters)
    compute_rows = jax.vmap(compute_row, in_axes=(1, row_axes, None), out_axes=-1)
    terms = compute_rows(outputs, trajectory, statistics)
    row_loss = (
        terms.policy
        + hyperparameters.baseline_cost * terms.baseline
        - hyperparameters.entropy_cost * terms.entropy
    )
    return row_loss.mean(), terms


def compute_terms(
    outputs: Outputs,
    trajectory: Trajectory,
    statistics: popart.Statistics,
    hyperparameters: Hyperparameters,
) -> LossTerms:
    """Compute the terms of one trajectory's loss.

    V-trace is computed in the units of the rewards, on values v = σ n + μ. Targets and advantages
    are then normalized by task: n is regressed to (v_t − μ) / σ, and the policy gradient uses
    A / σ. The size of a task's gradient then does not depend on the scale of its rewards (Hessel et
    al., 2019). With μ = 0 and σ = 1, the loss is that of plain IMPALA.

    Args:
      outputs: logits [T + 1, A] and values n [T + 1] of the learner, in the units of the task.
      trajectory: trajectory [T, …] of one environment, whose carry is ignored.
      statistics: PopArt statistics.
      hyperparameters: hyperparameters of the loss.
    """
    # The actions that were taken, under the learner's policy.
    task, valid_t = trajectory.inputs.observation['task'], trajectory.valid
    reward_t = clip_reward(trajectory.inputs.reward[1:], hyperparameters.reward_clip)
    log_pi = jax.nn.log_softmax(outputs.logits[:-1])
    log_pi_t = jnp.take_along_axis(log_pi, trajectory.action[:, None], axis=1)[:, 0]

    # V-trace in the units of the rewards.
    target = vtrace(
        popart.unnormalize(statistics, outputs.value, task),
        reward_t,
        hyperparameters.discount * trajectory.discount,
        log_pi_t - trajectory.log_prob,
        valid_t,
        hyperparameters.lambda_,
        hyperparameters.rho_clip,
        hyperparameters.c_clip,
    )

    # The loss in the units of each task.
    advantage = target.advantages / popart.sigma(statistics)[task[:-1]]
    error = popart.normalize(statistics, target.targets, task[:-1]) - outputs.value[:-1]
    valid = valid_t.astype(outputs.logits.dtype)
    num_valid = jnp.maximum(valid.sum(), 1)
    return LossTerms(
        policy=-(valid * log_pi_t * advantage).sum(),
        baseline=0.5 * (valid * error**2).sum(),
        entropy=-(valid * (jnp.exp(log_pi) * log_pi).sum(-1)).sum(),
        targets=target.targets,
        kl=(valid * (trajectory.log_prob - log_pi_t)).sum() / num_valid,
        clip_fraction=target.is_clipped.sum() / num_valid,
        advantage=(valid * jnp.abs(advantage)).sum() / num_valid,
    )
