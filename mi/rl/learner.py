"""Learning: one update from trajectories, the same for every topology.

    gradient_first    V-trace targets → loss in units of PopArt → optimiser → PopArt statistics
    statistics_first  V-trace targets → PopArt statistics → loss in units of PopArt → optimiser

The statistics move with the targets of this batch, and the values' gain and shift are rescaled with
them, so that no value changes by it, unless `Hyperparameters.popart_preserve` is False. Which comes
first is `Hyperparameters.popart_order`.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax
from jax import Array

from mi.rl import loss, popart
from mi.rl.agent import Agent, Outputs, forward
from mi.rl.trajectory import Trajectory
from mi.rows import mean_over_rows

PopArtOrder = Literal['gradient_first', 'statistics_first']
POPART_ORDERS = get_args(PopArtOrder)


class Hyperparameters(NamedTuple):
    """Those of the loss; the optimiser has its own.

    Attributes:
      discount: γ.
      lambda_, rho_clip, c_clip: of V-trace.
      entropy_cost, baseline_cost: weights beside the policy gradient.
      reward_clip: a word of `mi.rl.loss.clip_reward`.
      popart: β, the step of the statistics; 0 for plain values.
      popart_corrected: whether the statistics are corrected for their start, see `popart.update`.
      popart_order: whether the loss is in the units before or after the update of the statistics.
        'statistics_first' is the order of van Hasselt et al. (2016): a normalized error is then
        bounded by the targets of its own batch.
      popart_preserve: whether the values stay as they were when the statistics move. Without it the
        targets are normalized alone: the values n stay, and σ n + μ follows the returns.
    """

    discount: float = 0.99
    lambda_: float = 1.0
    rho_clip: float = 1.0
    c_clip: float = 1.0
    entropy_cost: float = 0.003
    baseline_cost: float = 0.5
    reward_clip: str = 'none'
    popart: float = 3e-4
    popart_corrected: bool = True
    popart_order: PopArtOrder = 'gradient_first'
    popart_preserve: bool = True


class State(NamedTuple):
    """What learning continues from."""

    params: Any
    opt_state: optax.OptState
    statistics: popart.Statistics


def start(params: Any, optimiser: optax.GradientTransformation, tasks: int) -> State:
    return State(params, optimiser.init(params), popart.init(tasks))


def parts(state: State) -> dict[str, Any]:
    """What has to be finite in a state that is saved, by the name that an error gives it."""
    return {
        'parameters': state.params,
        'moments of the optimizer': state.opt_state,
        'statistics of the returns': state.statistics,
    }


def update(
    agent: Agent,
    optimiser: optax.GradientTransformation,
    h: Hyperparameters,
    state: State,
    trajectory: Trajectory,
) -> tuple[State, dict[str, Array]]:
    """One update on trajectories [T, B]: the loss is summed over time, averaged over B.

    A pure function. Under `jax.shard_map` the trajectory is this device's rows of the batch and
    everything else is the same on all devices; the gradient and the sums of PopArt are over all
    rows. What is measured is of this device's rows, but for the norm of the gradient.
    """
    inputs, task = trajectory.inputs, trajectory.inputs.observation['task']
    reward_t = loss.clip_reward(inputs.reward[1:], h.reward_clip)
    T = reward_t.shape[0]

    def objective(outputs: Outputs, statistics: popart.Statistics) -> tuple[Array, loss.Terms]:
        one = functools.partial(
            loss.impala,
            statistics=statistics,
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

    def run_agent(params: Any) -> Outputs:
        return forward(agent, params, trajectory.carry, inputs)[1]

    def move_statistics(targets: Array) -> popart.Statistics:
        valid = trajectory.valid
        steps = h.popart, h.popart_corrected
        return popart.update(state.statistics, targets, task[:-1], valid, *steps)

    def preserve_values(params: Any, statistics: popart.Statistics) -> Any:
        if not h.popart_preserve:
            return params
        scale = params['gain'], params['shift']
        gain, shift = popart.preserve(*scale, state.statistics, statistics)
        return params | {'gain': gain, 'shift': shift}

    params, statistics = state.params, state.statistics
    outputs, pull_back = jax.vjp(run_agent, params)
    if h.popart > 0 and h.popart_order == 'statistics_first':
        targets = objective(outputs, statistics)[1].targets
        statistics = move_statistics(targets)
        params = preserve_values(params, statistics)

        def moved_objective(outputs: Outputs) -> tuple[Array, loss.Terms]:
            if h.popart_preserve:
                value = popart.rescale(outputs.value, task, state.statistics, statistics)
                outputs = outputs._replace(value=value)
            return objective(outputs, statistics)

        (total, terms), grad_outputs = jax.value_and_grad(moved_objective, has_aux=True)(outputs)
        (gradient,) = pull_back(grad_outputs)
        if h.popart_preserve:
            # The chain rule went through the old gain and shift; in the new ones a unit is σ' / σ.
            ratio = popart.sigma(statistics) / popart.sigma(state.statistics)
            gradient |= {name: ratio * gradient[name] for name in ('gain', 'shift')}
    else:
        (total, terms), grad_outputs = jax.value_and_grad(objective, has_aux=True)(
            outputs, statistics
        )
        (gradient,) = pull_back(grad_outputs)
    gradient = mean_over_rows(gradient)
    step, opt_state = optimiser.update(gradient, state.opt_state, params)
    params = optax.apply_updates(params, step)
    if h.popart > 0 and h.popart_order == 'gradient_first':
        statistics = move_statistics(terms.targets)
        params = preserve_values(params, statistics)
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
