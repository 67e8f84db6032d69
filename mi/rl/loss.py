"""The loss of IMPALA on one trajectory, values in the units of PopArt; the caller vmaps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mi.config import suggest
from mi.rl import popart
from mi.rl.vtrace import vtrace

CLIPS: dict[str, Callable[[Array], Array]] = {
    'none': lambda r: r,
    'unit': lambda r: jnp.clip(r, -1, 1),
    'paper': lambda r: 0.3 * jnp.minimum(jnp.tanh(r), 0) + 5 * jnp.maximum(jnp.tanh(r), 0),
    'code': lambda r: jnp.where(r < 0, 0.3, 1) * 5 * jnp.tanh(r / 5),
}


def clip_reward(reward: Array, kind: str) -> Array:
    """Rewards as the learner takes them.

    'none'; 'unit', to [−1, 1]; and the two versions that IMPALA was published with:
    'paper', 0.3 · min(tanh r, 0) + 5 · max(tanh r, 0); 'code', 5 · tanh(r / 5), × 0.3 below zero.

    Raises:
      ValueError: on another word.
    """
    if kind not in CLIPS:
        raise ValueError(f'unknown reward clip {kind!r}; {suggest(kind, CLIPS)}')
    return CLIPS[kind](reward)


class Terms(NamedTuple):
    """What the loss of one trajectory is made of.

    Attributes:
      policy, baseline, entropy: sums over the T transitions, without their costs: −Σ log π(a) A,
        ½ Σ (v − V)² in the units of PopArt, and the policy's entropy Σ H.
      targets: [T], of V-trace, in the units of the rewards.
      kl: mean over the valid transitions of log μ(a) − log π(a), which estimates how far the
        learner has gone from the policy that acted.
      clipped: share of the valid transitions whose ρ was clipped.
      advantage: mean |A| of them, in the units of PopArt.
    """

    policy: Array
    baseline: Array
    entropy: Array
    targets: Array
    kl: Array
    clipped: Array
    advantage: Array


def impala(
    logits: Array,
    value: Array,
    task: Array,
    action_t: Array,
    log_mu_t: Array,
    reward_t: Array,
    discount_t: Array,
    valid_t: Array,
    statistics: popart.Statistics,
    lambda_: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> Terms:
    """The terms of one trajectory's loss; *sums* over time, as in the public IMPALA code.

    V-trace runs in the units of the rewards, on values v = σ n + μ. Targets and advantages are
    brought to the units of each task: (v_t − μ) / σ is what n is regressed to, and A / σ is the
    advantage, so that no task's rewards decide the size of the gradient (Hessel et al., 2019). With
    μ = 0 and σ = 1 it is plain IMPALA.

    Args:
      logits: [T, A], of the learner's policy.
      value: [T + 1], n, in the units of the task.
      task: int [T + 1].
      action_t: int [T].
      log_mu_t: [T], log-probability of that action under the policy that acted.
      reward_t, discount_t, valid_t: [T], as in `vtrace`; rewards clipped already, γ included.
      statistics: of PopArt.
      lambda_, rho_clip, c_clip: of V-trace.
    """
    log_pi = jax.nn.log_softmax(logits)
    log_pi_t = jnp.take_along_axis(log_pi, action_t[:, None], axis=1)[:, 0]
    values = popart.unnormalise(statistics, value, task)
    target = vtrace(
        values, reward_t, discount_t, log_pi_t - log_mu_t, valid_t, lambda_, rho_clip, c_clip
    )
    advantage = target.advantages / popart.sigma(statistics)[task[:-1]]
    error = popart.normalise(statistics, target.targets, task[:-1]) - value[:-1]
    valid = valid_t.astype(logits.dtype)
    count = jnp.maximum(valid.sum(), 1)
    return Terms(
        policy=-(valid * log_pi_t * advantage).sum(),
        baseline=0.5 * (valid * error**2).sum(),
        entropy=-(valid * (jnp.exp(log_pi) * log_pi).sum(-1)).sum(),
        targets=target.targets,
        kl=(valid * (log_mu_t - log_pi_t)).sum() / count,
        clipped=target.clipped.sum() / count,
        advantage=(valid * jnp.abs(advantage)).sum() / count,
    )
