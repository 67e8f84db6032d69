"""A law of motion learned from states and their velocities.

The training set consists of exact, noiseless trajectories of a system (see
experiments.hamiltonian.mechanics). The loss is the mean squared error of dq/dt and dp/dt at their
states (derivative matching, as in Greydanus et al., 2019). Thus, training does not involve an
integrator, and all forms of a law have the same loss. New trajectories are predicted from their
exact initial states by a fourth-order integrator, which is symplectic for an energy.

Metrics are computed on fresh trajectories (see experiments.hamiltonian.scores). A horizon is the
length of a training trajectory:
    derivative    the loss
    error         mean error of states over one horizon; error_long over `longer` horizons
    valid         time until the error reaches TOLERANCE, as a fraction of `longer` horizons
    drift         mean drift of the true energy along the prediction, over the last horizon
    drift_learnt  the same for the learned energy; not for a field
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey

from experiments.hamiltonian import dynamics, integrators, scores
from experiments.hamiltonian.integrators import State
from experiments.hamiltonian.mechanics import SYSTEMS, System
from mi.config import Rule, choice, integer
from mi.fit.problem import Costs, Metrics, Params, Problem, World

TOLERANCE = 0.1  # of `valid`
SHOWN = 4  # trajectories in figures

SCHEMA: dict[str, Rule] = {
    'problem.system': choice(SYSTEMS),
    'problem.trajectories': integer(1),
    'problem.horizon': integer(1),
    'problem.longer': integer(1),
    'problem.substeps': integer(1),
    'problem.examples': integer(2),
    **dynamics.SCHEMA,
}


@dataclasses.dataclass(frozen=True)
class PhaseSpace(Problem):
    """The problem of learning a law from states. Each seed draws a training set [states, d].

    Attributes:
      system: system whose motion is learned.
      law: the model.
      trajectories: number of trajectories in the training set.
      horizon: number of observations in a training trajectory after its first.
      long: number of observations in an evaluation trajectory after its first.
      substeps: number of integrator steps between two observations of an evaluation.
      iterations: number of iterations for the implicit equations of the leapfrog.
      eval_examples: number of trajectories in an evaluation.
    """

    system: System
    law: dynamics.Law
    trajectories: int
    horizon: int
    long: int
    substeps: int
    iterations: int
    eval_examples: int

    def _draw_motion(self, key: PRNGKey, num_trajectories: int, steps: int) -> State:
        return self.system.motion(*self.system.draw(key, num_trajectories), steps)

    def draw_world(self, key: PRNGKey) -> State:
        q, p = self._draw_motion(key, self.trajectories, self.horizon)
        return q.reshape(-1, self.system.degrees), p.reshape(-1, self.system.degrees)

    def init_params(self, key: PRNGKey, world: World) -> Params:
        return dynamics.init_params(self.law, key, self.system.degrees)

    def _velocity_error(self, params: Params, q: Array, p: Array) -> Array:
        true_field = integrators.hamiltonian(self.system.energy)
        learned_field = dynamics.make_field(self.law, params)
        velocities = zip(learned_field(q, p), true_field(q, p), strict=True)
        error_q, error_p = (jnp.mean(jnp.square(learned - true)) for learned, true in velocities)
        return (error_q + error_p) / 2

    def loss(self, params: Params, world: State, key: PRNGKey) -> tuple[Array, Metrics]:
        state_ids = jax.random.randint(key, (self.examples,), 0, len(world[0]))
        mse = self._velocity_error(params, world[0][state_ids], world[1][state_ids])
        return mse, {'derivative': mse}

    def _roll_out(self, params: Params, key: PRNGKey) -> tuple[State, State, Metrics]:
        """Compute the true and the predicted motion, and the scores [time, trajectories]."""
        true_motion = self._draw_motion(key, self.eval_examples, self.long)
        initial_q, initial_p = (states[0] for states in true_motion)
        time = self.system.time / self.substeps
        step = dynamics.make_step(self.law, params, time, self.iterations, order=4)
        predicted = integrators.roll_out(step, initial_q, initial_p, self.long, self.substeps)
        true_states, predicted_states = (
            jnp.concatenate(motion, -1) for motion in (true_motion, predicted)
        )
        curves = {'error': scores.compute_error(predicted_states, true_states)}
        curves['drift'] = scores.compute_drift(self.system.energy(*predicted))
        if self.law.form != 'field':
            learned_energy = dynamics.compute_energy(self.law, params, *predicted)
            curves['drift_learnt'] = scores.compute_drift(learned_energy)
        return true_motion, predicted, curves

    def evaluate(self, params: Params, world: State, key: PRNGKey) -> dict[str, Metrics]:
        (true_q, true_p), _, curves = self._roll_out(params, key)
        first_horizon = slice(self.horizon + 1)
        last_horizon = slice(self.long - self.horizon + 1, None)
        errors = curves['error']
        metrics = {
            'derivative': self._velocity_error(
                params, true_q[first_horizon], true_p[first_horizon]
            ),
            'error': errors[first_horizon].mean(),
            'error_long': errors.mean(),
            'valid': scores.compute_valid_share(errors, TOLERANCE).mean(),
        }
        drifts = {name: curve for name, curve in curves.items() if name != 'error'}
        metrics |= {name: drift[last_horizon].mean() for name, drift in drifts.items()}
        return {'eval': metrics}

    def costs(self) -> Costs:
        return dynamics.costs(self.law, self.system.degrees)

    def artifacts(self, params: Params, world: State, key: PRNGKey) -> Metrics:
        """Return the states [q; p] of some trajectories [time, SHOWN, 2d], and all scores."""
        true_motion, predicted, curves = self._roll_out(params, key)
        motions = {'true': true_motion, 'predicted': predicted}
        states = {name: jnp.concatenate(motion, -1)[:, :SHOWN] for name, motion in motions.items()}
        return states | curves


def make(config: ml_collections.ConfigDict) -> PhaseSpace:
    """Build the problem that a config describes."""
    problem = config.problem
    return PhaseSpace(
        examples=config.train.batch,
        system=SYSTEMS[problem.system],
        law=dynamics.make(config.model),
        trajectories=problem.trajectories,
        horizon=problem.horizon,
        long=problem.longer * problem.horizon,
        substeps=problem.substeps,
        iterations=problem.iterations,
        eval_examples=problem.examples,
    )
