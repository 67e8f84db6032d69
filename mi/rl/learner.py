"""Learning: one update from trajectories, the same for every topology.

    V-trace targets  →  loss in the units of PopArt  →  optimiser  →  PopArt statistics

The statistics move after the gradient step, with the targets of this batch, and the values' gain
and shift are rescaled with them, so that no output changes by it.
"""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from mi.rl import loss, popart
from mi.rl.actor import Trajectory
from mi.rl.networks import Agent, forward


class Hyperparameters(NamedTuple):
    """Those of the loss; the optimiser has its own.

    Attributes:
      discount: γ.
      lambda_, rho_clip, c_clip: of V-trace.
      entropy_cost, baseline_cost: weights beside the policy gradient.
      reward_clip: a word of `mi.rl.loss.clip_reward`.
      popart: β, the step of the statistics; 0 for plain values.
    """

    discount: float = 0.99
    lambda_: float = 1.0
    rho_clip: float = 1.0
    c_clip: float = 1.0
    entropy_cost: float = 0.003
    baseline_cost: float = 0.5
    reward_clip: str = 'none'
    popart: float = 3e-4


class State(NamedTuple):
    """What learning continues from."""

    params: Any
    opt_state: optax.OptState
    statistics: popart.Statistics


def start(params: Any, optimiser: optax.GradientTransformation, tasks: int) -> State:
    return State(params, optimiser.init(params), popart.init(tasks))


def update(
    agent: Agent,
    optimiser: optax.GradientTransformation,
    h: Hyperparameters,
    state: State,
    trajectory: Trajectory,
) -> tuple[State, dict[str, Array]]:
    """One update on trajectories [T, B]: the loss is summed over time, averaged over B.

    A pure function. On a mesh, the trajectory's axis B is sharded and everything else is not: sums
    over B are then over the whole mesh, those of PopArt too.
    """
    inputs, task = trajectory.inputs, trajectory.inputs.observation['task']
    reward_t = loss.clip_reward(inputs.reward[1:], h.reward_clip)
    T = reward_t.shape[0]

    def objective(params: Any) -> tuple[Array, loss.Terms]:
        _, outputs = forward(agent, params, trajectory.carry, inputs)

        one = functools.partial(
            loss.impala,
            statistics=state.statistics,
            lambda_=h.lambda_,
            rho_clip=h.rho_clip,
            c_clip=h.c_clip,
        )
        terms = jax.vmap(one, in_axes=1, out_axes=-1)(
            outputs.logits[:-1],
            outputs.value,
            task,
            trajectory.action,
            trajectory.log_prob,
            reward_t,
            h.discount * trajectory.discount,
            trajectory.valid,
        )
        total = terms.policy + h.baseline_cost * terms.baseline - h.entropy_cost * terms.entropy
        return total.mean(), terms

    (total, terms), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    step, opt_state = optimiser.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, step)
    statistics = state.statistics
    if h.popart > 0:
        statistics = popart.update(statistics, terms.targets, task[:-1], trajectory.valid, h.popart)
        gain, shift = popart.preserve(params['gain'], params['shift'], state.statistics, statistics)
        params = params | {'gain': gain, 'shift': shift}
    measured = {
        'loss': total / T,
        'policy': terms.policy.mean() / T,
        'baseline': terms.baseline.mean() / T,
        'entropy': terms.entropy.mean() / T,
        'kl': terms.kl.mean(),
        'rho_clipped': terms.clipped.mean(),
        'advantage': terms.advantage.mean(),
        'gradient_norm': optax.tree.norm(gradient),
    }
    return State(params, opt_state, statistics), measured
