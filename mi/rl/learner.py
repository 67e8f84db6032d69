"""The learner, which computes an update from trajectories in the same way for every topology.

`Hyperparameters.popart_order` selects the order of an update:

    gradient_first    V-trace targets → loss in units of PopArt → optimizer → PopArt statistics
    statistics_first  V-trace targets → PopArt statistics → loss in units of PopArt → optimizer

The statistics move with the targets of the batch. The gain and shift of the values are rescaled
accordingly, so that no value changes, unless `Hyperparameters.popart_preserve` is False.
"""

import functools
from typing import NamedTuple

import chex
import jax
import optax
from jax import Array

from mi.rl import popart
from mi.rl.agent import Agent, Outputs, Params, forward
from mi.rl.loss import Hyperparameters, LossTerms, impala_loss
from mi.rl.trajectory import Trajectory
from mi.rows import mean_over_rows
from mi.training import averaging, optim


class LearnerState(NamedTuple):
    """The state of the learner."""

    params: Params
    opt_state: optax.OptState
    statistics: popart.Statistics


class SweptNumbers(NamedTuple):
    """The numbers that sweeps vary most, passed to a training program as arguments.

    Members of a sweep that differ only in these numbers compile the same program.

    Attributes:
      learning_rates: learning rate of each update, f32 [updates], from
        `optim.compute_learning_rates`.
      entropy_cost: entropy cost, f32 [], which replaces that of `Hyperparameters`.
    """

    learning_rates: Array
    entropy_cost: Array


def bind_numbers(
    optimizer: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    numbers: SweptNumbers | None,
) -> tuple[optax.GradientTransformation, Hyperparameters]:
    """Return the optimizer and the hyperparameters with the given numbers, if any."""
    if numbers is None:
        return optimizer, hyperparameters
    return (
        optim.with_learning_rates(optimizer, numbers.learning_rates),
        hyperparameters._replace(entropy_cost=numbers.entropy_cost),
    )


def init_learner_state(
    params: Params, optimizer: optax.GradientTransformation, num_tasks: int
) -> LearnerState:
    """Initialize the state of the learner."""
    return LearnerState(params, optimizer.init(params), popart.init(num_tasks))


def name_parts(state: LearnerState) -> dict[str, chex.ArrayTree]:
    """Return name → part of a state that must be finite when saved. Errors use these names."""
    return {
        'parameters': state.params,
        'moments of the optimizer': state.opt_state,
        'statistics of the returns': state.statistics,
    }


def update(
    agent: Agent,
    optimizer: optax.GradientTransformation,
    hyperparameters: Hyperparameters,
    state: LearnerState,
    trajectory: Trajectory,
) -> tuple[LearnerState, dict[str, Array]]:
    """Update the learner once on trajectories [T, B]. This function is pure.

    Under `jax.shard_map`, `trajectory` has this device's rows of the batch, and all other arguments
    are replicated. The gradient and the sums for PopArt are reduced over all devices. The metrics
    describe this device's rows, except for the norm of the gradient.

    Returns:
      The new state, and name → metric [].
    """
    params, statistics = state.params, state.statistics
    uses_popart = hyperparameters.popart > 0
    is_statistics_first = uses_popart and hyperparameters.popart_order == 'statistics_first'
    is_rescaled = is_statistics_first and hyperparameters.popart_preserve
    move_statistics = functools.partial(_update_popart, hyperparameters, trajectory)
    opt_state = state.opt_state

    # Forward pass; `pull_back` maps a gradient by the outputs to one by the parameters.
    def run_agent(params: Params) -> Outputs:
        return forward(agent, params, trajectory.carry, trajectory.inputs)[1]

    outputs, pull_back = jax.vjp(run_agent, params)

    # Move the statistics first, so that the loss is in the new units.
    if is_statistics_first:
        _, terms = impala_loss(outputs, trajectory, statistics, hyperparameters)
        params, opt_state, statistics = move_statistics(
            terms.targets, params, opt_state, statistics
        )

    # Loss and gradient.
    def objective(outputs: Outputs) -> tuple[Array, LossTerms]:
        if is_rescaled:
            task = trajectory.inputs.observation['task']
            value = popart.rescale(outputs.value, task, state.statistics, statistics)
            outputs = outputs._replace(value=value)
        return impala_loss(outputs, trajectory, statistics, hyperparameters)

    (loss, terms), output_grad = jax.value_and_grad(objective, has_aux=True)(outputs)
    (grad,) = pull_back(output_grad)
    if is_rescaled:
        # The chain rule went through the old gain and shift; in the new ones a unit is σ' / σ.
        ratio = popart.sigma(statistics) / popart.sigma(state.statistics)
        grad |= {name: ratio * grad[name] for name in ('gain', 'shift')}
    grad = mean_over_rows(grad)

    # Optimizer step.
    updates, opt_state = optimizer.update(grad, opt_state, params)
    params = optax.apply_updates(params, updates)

    # Move the statistics last, so that the loss was in the old units.
    if uses_popart and not is_statistics_first:
        params, opt_state, statistics = move_statistics(
            terms.targets, params, opt_state, statistics
        )
    metrics = _make_metrics(loss, terms, num_steps=len(trajectory.action))
    metrics['gradient_norm'] = optax.tree.norm(grad)
    return LearnerState(params, opt_state, statistics), metrics


def _make_metrics(loss: Array, terms: LossTerms, num_steps: int) -> dict[str, Array]:
    """Return the loss per step and its diagnostics as name → metric []."""
    return {
        'loss': loss / num_steps,
        'policy': terms.policy.mean() / num_steps,
        'baseline': terms.baseline.mean() / num_steps,
        'entropy': terms.entropy.mean() / num_steps,
        'kl': terms.kl.mean(),
        'rho_clipped': terms.clip_fraction.mean(),
        'advantage': terms.advantage.mean(),
    }


def _update_popart(
    hyperparameters: Hyperparameters,
    trajectory: Trajectory,
    targets: Array,
    params: Params,
    opt_state: optax.OptState,
    statistics: popart.Statistics,
) -> tuple[Params, optax.OptState, popart.Statistics]:
    """Move the statistics towards the targets, and rescale gain and shift to preserve the values.

    Copies of the parameters in the state of the optimizer are rescaled too.
    """
    task = trajectory.inputs.observation['task'][:-1]
    next_statistics = popart.update(
        statistics,
        targets,
        task,
        trajectory.valid,
        hyperparameters.popart,
        hyperparameters.popart_corrected,
    )
    if not hyperparameters.popart_preserve:
        return params, opt_state, next_statistics

    def preserve(params: Params) -> Params:
        gain, shift = popart.preserve(params['gain'], params['shift'], statistics, next_statistics)
        return {**params, 'gain': gain, 'shift': shift}

    return preserve(params), averaging.map_copies(preserve, opt_state), next_statistics
