"""A law of motion learnt from states and their velocities, and rolled out ten times longer.

The training set are trajectories of a system (experiments.hamiltonian.mechanics), exact and free of
noise; the loss is the mean squared error of dq/dt and dp/dt at their states (derivative matching,
as Greydanus et al., 2019), so that no integrator is involved in training and every form of law has
the same loss. Trajectories that were not seen are predicted from their exact first states, by an
integrator of fourth order: for an energy, a symplectic one.

Metrics, over fresh trajectories (experiments.hamiltonian.scores):
    derivative    the loss
    error         of states, mean over a horizon as long as in training; error_long over `longer`
    valid         the time for which the error is below TOLERANCE, as a share of `longer` horizons
    drift         of the true energy along the prediction, mean over the last of `longer` horizons
    drift_learnt  the same of the learnt energy; not of a field
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from experiments.hamiltonian import dynamics, integrators, scores
from experiments.hamiltonian.integrators import State
from experiments.hamiltonian.mechanics import SYSTEMS
from mi.config import Rule, choice, integer
from mi.fit.problem import Metrics, Problem

TOLERANCE = 0.1  # of `valid`
KEPT = 4  # trajectories, for figures

SCHEMA: dict[str, Rule] = {
    'problem.system': choice(SYSTEMS),
    'problem.trajectories': integer(1),
    'problem.horizon': integer(1),
    'problem.longer': integer(1),
    'problem.substeps': integer(1),
    'problem.examples': integer(2),
    **dynamics.SCHEMA,
}


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; the world of a seed is q, p [states, d] of its training set."""
    problem, system = config.problem, SYSTEMS[config.problem.system]
    law = dynamics.make(config.model)
    truth = integrators.hamiltonian(system.energy)
    long = problem.longer * problem.horizon

    def drawn(key: Array, count: int, steps: int) -> State:
        return system.motion(*system.draw(key, count), steps)

    def mismatch(params: Any, q: Array, p: Array) -> Array:
        pairs = zip(dynamics.field(law, params)(q, p), truth(q, p), strict=True)
        by_q, by_p = (jnp.mean(jnp.square(ours - true)) for ours, true in pairs)
        return (by_q + by_p) / 2

    def world(key: Array) -> State:
        q, p = drawn(key, problem.trajectories, problem.horizon)
        return q.reshape(-1, system.degrees), p.reshape(-1, system.degrees)

    def loss(params: Any, world: State, key: Array) -> tuple[Array, Metrics]:
        rows = jax.random.randint(key, (config.train.batch,), 0, len(world[0]))
        mse = mismatch(params, world[0][rows], world[1][rows])
        return mse, {'derivative': mse}

    def measured(params: Any, key: Array) -> tuple[State, State, Metrics]:
        """True and predicted motion, and the scores [time, trajectories]."""
        true = drawn(key, problem.examples, long)
        one = dynamics.step(
            law, params, system.time / problem.substeps, problem.iterations, order=4
        )
        ours = integrators.roll_out(one, true[0][0], true[1][0], long, problem.substeps)
        curves = {'error': scores.error(jnp.concatenate(ours, -1), jnp.concatenate(true, -1))}
        curves['drift'] = scores.drift(system.energy(*ours))
        if law.form != 'field':
            curves['drift_learnt'] = scores.drift(dynamics.energy(law, params, *ours))
        return true, ours, curves

    def evaluation(params: Any, world: State, key: Array) -> Metrics:
        true, _, curves = measured(params, key)
        short = slice(problem.horizon + 1)
        late = slice(long - problem.horizon + 1, None)
        return {
            'derivative': mismatch(params, true[0][short], true[1][short]),
            'error': curves['error'][short].mean(),
            'error_long': curves['error'].mean(),
            'valid': scores.valid(curves['error'], TOLERANCE).mean(),
            **{name: of[late].mean() for name, of in curves.items() if name != 'error'},
        }

    def artefacts(params: Any, world: State, key: Array) -> Metrics:
        """Some states [time, KEPT, 2d], q and p side by side, and all scores [time, examples]."""
        true, ours, curves = measured(params, key)
        states = {'true': true, 'predicted': ours}
        kept = {name: jnp.concatenate(of, -1)[:, :KEPT] for name, of in states.items()}
        return kept | curves

    return Problem(
        world=world,
        init=lambda key, world: dynamics.init(law, key, system.degrees),
        loss=loss,
        evaluations={'eval': evaluation},
        costs=lambda: dynamics.costs(law, system.degrees),
        examples=config.train.batch,
        artefacts=artefacts,
    )
