"""A law of motion learnt from frames alone, by a variational autoencoder that predicts them.

    s₀ = (q₀, p₀) ~ N(μ, σ²)     μ, log σ from the first `seen` frames, by the encoder
    s₁, …, s_T                   by the law, which is learnt, from s₀: a leapfrog for each frame
    x_t ~ Bernoulli(g(q_t))      g the decoder, which sees the positions only

After Hamiltonian Generative Networks (Toth et al., 2020). The loss is −log p(x_t | q_t), summed
over pixels: its mean over the frames that are seen, by the share `early`, and over later ones, by
the rest; and β/(T + 1) times the divergence of s₀ from N(0, 1). For β = 1 and an `early` of
seen/(T + 1) that is −ELBO/(T + 1); a larger one helps while no law predicts anything yet. Of the
later frames some are decoded, at random. Unlike there, encoder and decoder are dense, the encoder
sees the first frames only, what it draws is s₀ itself, and β is constant.

Metrics, of fresh trajectories (experiments.hamiltonian.scores), predicted from μ:
    pixels        mean squared error of pixels over a horizon as in training; pixels_long: `longer`
    error         of the places of the bodies, as they are found in true and predicted frames, mean
                  over a horizon as long as in training; error_long over `longer`
    valid         the time for which the error is below TOLERANCE, as a share of `longer` horizons
    drift         of the true energy from the places in predicted frames: |Ē of the last of `longer`
                  horizons − Ē of the first| in units of the standard deviation of Ē of true frames
    drift_learnt  of the learnt energy, mean over the last of `longer` horizons; not of a field
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax import Array

from experiments.hamiltonian import (
    dynamics,
    integrators,
    rendering,
    scores,
)
from experiments.hamiltonian.integrators import State
from experiments.hamiltonian.mechanics import BODIES, SYSTEMS
from mi import counting
from mi.config import Rule, UserError, choice, integer, number
from mi.fit.problem import Metrics, Problem

TOLERANCE = 0.1  # of `valid`
KEPT = 2  # trajectories, for films

SCHEMA: dict[str, Rule] = {
    'problem.system': choice(SYSTEMS),
    'problem.trajectories': integer(1),
    'problem.horizon': integer(1),
    'problem.longer': integer(1),
    'problem.seen': integer(2),
    'problem.decoded': integer(1),
    'problem.early': number(0, 1),
    'problem.beta': number(0),
    'problem.examples': integer(2),
    'model.latent': integer(1),
    'model.hidden': integer(1),
    **dynamics.SCHEMA,
}


class Encoder(nn.Module):
    """Frames [..., seen, SIDE, SIDE, BODIES] → μ, log σ [..., 2·latent] of (q, p).

    Attributes:
      latent: of q, and of p.
      hidden: width of a map that every frame passes, and of one of them all.
    """

    latent: int
    hidden: int

    @nn.compact
    def __call__(self, frames: Array) -> tuple[Array, Array]:
        pixels = frames.reshape(*frames.shape[:-3], -1)
        h = nn.relu(nn.Dense(self.hidden, name='each')(pixels))
        h = nn.relu(nn.Dense(self.hidden, name='all')(h.reshape(*h.shape[:-2], -1)))
        mean = nn.Dense(2 * self.latent, name='mean')(h)
        return mean, nn.Dense(2 * self.latent, name='log_deviation')(h) - 2


class Decoder(nn.Module):
    """q [..., latent] → logits [..., SIDE, SIDE, BODIES].

    Attributes:
      hidden: width of two hidden layers.
    """

    hidden: int

    @nn.compact
    def __call__(self, q: Array) -> Array:
        h = nn.relu(nn.Dense(self.hidden, name='first')(q))
        h = nn.relu(nn.Dense(self.hidden, name='second')(h))
        shape = rendering.SIDE, rendering.SIDE, BODIES
        logits = nn.Dense(rendering.SIDE**2 * BODIES, name='pixels')(h)
        return logits.reshape(*q.shape[:-1], *shape)


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config; the world of a seed is where its bodies are, [T + 1, N, BODIES, 2].

    Axes are [time, trajectories, …].
    """
    problem, system = config.problem, SYSTEMS[config.problem.system]
    T, long = problem.horizon, problem.longer * problem.horizon
    latent, hidden = config.model.latent, config.model.hidden
    law, encoder, decoder = dynamics.make(config.model), Encoder(latent, hidden), Decoder(hidden)
    frame = rendering.SIDE, rendering.SIDE, BODIES
    for key, most in {'seen': T, 'decoded': T + 1 - problem.seen}.items():
        if problem[key] > most:
            raise UserError(
                f'config.problem.{key} = {problem[key]}: expected at most {most} of the {T + 1} '
                f'frames of config.problem.horizon = {T}'
            )

    def drawn(key: Array, count: int, steps: int) -> Array:
        return system.places(system.motion(*system.draw(key, count), steps)[0])

    def encoded(params: Any, places: Array) -> tuple[Array, Array]:
        seen = rendering.render(places[: problem.seen]).swapaxes(0, 1)
        mean_and_deviation: Any = encoder.apply(params['encoder'], seen)
        return mean_and_deviation

    def decoded(params: Any, q: Array) -> Array:
        logits: Any = decoder.apply(params['decoder'], q)
        return logits

    def predicted(params: Any, state: Array, steps: int) -> State:
        step = dynamics.step(law, params['law'], system.time, problem.iterations, order=2)
        q, p = jnp.split(state, 2, -1)
        return integrators.roll_out(step, q, p, steps)

    def init(key: Array, world: Any) -> Any:
        of_encoder, of_decoder, of_law = jax.random.split(key, 3)
        return {
            'encoder': encoder.init(of_encoder, jnp.zeros((problem.seen, *frame))),
            'decoder': decoder.init(of_decoder, jnp.zeros(latent)),
            'law': dynamics.init(law, of_law, latent),
        }

    def loss(params: Any, world: Array, key: Array) -> tuple[Array, Metrics]:
        seen = problem.seen
        of_rows, of_noise, of_times = jax.random.split(key, 3)
        rows = jax.random.randint(of_rows, (config.train.batch,), 0, world.shape[1])
        places = world[:, rows]
        mean, log_deviation = encoded(params, places)
        state = mean + jnp.exp(log_deviation) * jax.random.normal(of_noise, mean.shape)
        q, _ = predicted(params, state, T)
        later = jax.random.choice(of_times, T + 1 - seen, (problem.decoded,), replace=False)
        times = jnp.concatenate([jnp.arange(seen), seen + later])
        logits, true = decoded(params, q[times]), rendering.render(places[times])
        each = jnp.sum(nn.softplus(logits) - true * logits, (-3, -2, -1))
        nll = problem.early * each[:seen].mean() + (1 - problem.early) * each[seen:].mean()
        squares = jnp.square(mean) + jnp.exp(2 * log_deviation) - 1
        kl = jnp.mean(jnp.sum(squares / 2 - log_deviation, -1))
        mse = jnp.mean(jnp.square(nn.sigmoid(logits) - true))
        return nll + problem.beta / (T + 1) * kl, {'nll': nll, 'kl': kl, 'pixels': mse}

    def energy(places: Array) -> Array:
        """The true one, averaged over each horizon, from places: [time, N, …] → [horizons, N]."""
        moving = places[:, :, : system.moving]
        velocity = (moving[2:] - moving[:-2]) / (2 * system.time)
        kinetic = system.mass / 2 * jnp.sum(jnp.square(velocity), (-2, -1))
        H = kinetic + system.potential(system.coordinates(places[1:-1]))
        return jnp.stack([part.mean(0) for part in jnp.array_split(H, problem.longer)])

    def measured(params: Any, key: Array) -> tuple[Metrics, Metrics, Metrics]:
        """True and predicted frames of KEPT, scores by time, scores by horizon."""
        places = drawn(key, problem.examples, long)
        q, p = predicted(params, encoded(params, places)[0], long)

        def at(of: tuple[Array, Array]) -> tuple[Array, ...]:
            true, ours = rendering.render(of[0]), nn.sigmoid(decoded(params, of[1]))
            found = rendering.locate(true), rendering.locate(ours)
            return true[:KEPT], ours[:KEPT], jnp.mean(jnp.square(ours - true), (-3, -2, -1)), *found

        true, ours, pixels, there, here = jax.lax.map(at, (places, q))
        apart = [a[:, :, : system.moving].reshape(*a.shape[:2], -1) for a in (here, there)]
        curves = {'pixels': scores.ceiled(pixels), 'error': scores.error(*apart)}
        if law.form != 'field':
            curves['drift_learnt'] = scores.drift(dynamics.energy(law, params['law'], q, p))
        energies, deviation = energy(here), jnp.std(energy(there)[0])
        drift = scores.ceiled(jnp.abs(energies - energies[:1]) / deviation)
        return {'true': true, 'predicted': ours}, curves, {'drift': drift}

    def evaluation(params: Any, world: Any, key: Array) -> Metrics:
        _, curves, horizons = measured(params, key)
        metrics = {'drift': horizons['drift'][-1].mean()}
        for name in ('pixels', 'error'):
            metrics[name] = curves[name][: T + 1].mean()
            metrics[f'{name}_long'] = curves[name].mean()
        metrics['valid'] = scores.valid(curves['error'], TOLERANCE).mean()
        if 'drift_learnt' in curves:
            metrics['drift_learnt'] = curves['drift_learnt'][long - T + 1 :].mean()
        return metrics

    def artefacts(params: Any, world: Any, key: Array) -> Metrics:
        """Frames of KEPT trajectories, in bytes, and all scores."""
        frames, curves, horizons = measured(params, key)
        films = {name: jnp.uint8(jnp.round(255 * of)) for name, of in frames.items()}
        return films | curves | horizons

    def costs() -> dict[str, dict[str, int]]:
        """FLOPs are of a prediction: one encoding, and a horizon of steps and of decoded frames."""
        counted = dynamics.costs(law, latent)
        params = jax.eval_shape(init, jax.random.key(0), {})
        places = jax.ShapeDtypeStruct((T + 1, 1, BODIES, 2), jnp.float32)

        def prediction(params: Any, places: Array) -> Array:
            return decoded(params, predicted(params, encoded(params, places)[0], T)[0])

        counted['parameters']['model'] = counting.parameters(params)
        counted['flops_per_example']['model'] = counting.flops(prediction, params, places)
        return counted

    return Problem(
        world=lambda key: drawn(key, problem.trajectories, T),
        init=init,
        loss=loss,
        evaluations={'eval': evaluation},
        costs=costs,
        examples=config.train.batch,
        artefacts=artefacts,
    )
