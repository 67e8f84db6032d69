"""A law of motion learned from frames, as part of a variational autoencoder that predicts them.

    s₀ = (q₀, p₀) ~ N(μ, σ²)     the encoder computes μ and log σ from the first `seen` frames
    s₁, …, s_T                   the learned law advances s₀ by one leapfrog for each frame
    x_t ~ Bernoulli(g(q_t))      the decoder g only receives the positions

The model follows Hamiltonian Generative Networks (Toth et al., 2020). The loss is −log p(x_t|q_t),
summed over pixels, plus β/(T + 1) times the divergence of s₀ from N(0, 1). The mean of the first
term over seen frames has the weight `early`, and the mean over later frames the weight 1 − `early`.
For β = 1 and early = seen/(T + 1), the loss is −ELBO/(T + 1). A larger weight helps at the start of
training, when the law does not predict anything yet. A random subset of the later frames is
decoded. Unlike in the original, the encoder and the decoder are dense, the encoder only receives
the first frames and draws s₀ itself, and β is constant.

Metrics are computed on fresh trajectories, predicted from μ (see experiments.hamiltonian.scores). A
horizon is the length of a training trajectory:
    pixels        mean squared error of pixels over one horizon; pixels_long over `longer` horizons
    error         error of the positions of bodies, which are located in true and predicted frames,
                  over one horizon; error_long over `longer` horizons
    valid         time until the error reaches TOLERANCE, as a fraction of `longer` horizons
    drift         drift of the true energy at the positions in predicted frames: |Ē of the last
                  horizon − Ē of the first|, in standard deviations of Ē in true frames
    drift_learnt  mean drift of the learned energy over the last horizon; not for a field
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey
from flax import linen as nn

from experiments.hamiltonian import (
    dynamics,
    integrators,
    rendering,
    scores,
)
from experiments.hamiltonian.integrators import State
from experiments.hamiltonian.mechanics import BODIES, SYSTEMS, System
from mi import counting
from mi.config import Rule, UserError, choice, integer, number
from mi.fit.problem import Costs, Metrics, Params, Problem, World

TOLERANCE = 0.1  # of `valid`
SHOWN = 2  # trajectories in films

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
    """An encoder that maps frames [..., seen, SIDE, SIDE, BODIES] to μ and log σ [..., 2·latent].

    Attributes:
      latent: number of features of q, and also of p.
      hidden: width of the layer that encodes each frame, and of the layer that combines them.
    """

    latent: int
    hidden: int

    @nn.compact
    def __call__(self, frames: Array) -> tuple[Array, Array]:
        pixels = frames.reshape(*frames.shape[:-3], -1)
        hidden = nn.relu(nn.Dense(self.hidden, name='each')(pixels))
        hidden = nn.relu(nn.Dense(self.hidden, name='all')(hidden.reshape(*hidden.shape[:-2], -1)))
        mean = nn.Dense(2 * self.latent, name='mean')(hidden)
        return mean, nn.Dense(2 * self.latent, name='log_deviation')(hidden) - 2


class Decoder(nn.Module):
    """A decoder that maps q [..., latent] to logits [..., SIDE, SIDE, BODIES].

    Attributes:
      hidden: width of the two hidden layers.
    """

    hidden: int

    @nn.compact
    def __call__(self, q: Array) -> Array:
        hidden = nn.relu(nn.Dense(self.hidden, name='first')(q))
        hidden = nn.relu(nn.Dense(self.hidden, name='second')(hidden))
        shape = rendering.SIDE, rendering.SIDE, BODIES
        logits = nn.Dense(rendering.SIDE**2 * BODIES, name='pixels')(hidden)
        return logits.reshape(*q.shape[:-1], *shape)


class Rollout(NamedTuple):
    """A predicted motion and the true motion.

    Attributes:
      frames: frames 'true' and 'predicted' [time, SHOWN, SIDE, SIDE, BODIES].
      curves: scores at each time [time, trajectories].
      horizons: scores in each horizon [horizons, trajectories].
    """

    frames: Metrics
    curves: Metrics
    horizons: Metrics


@dataclasses.dataclass(frozen=True)
class Frames(Problem):
    """The problem of predicting frames. Each seed draws positions [T + 1, N, BODIES, 2].

    Attributes:
      system: system whose motion is shown in the frames.
      law, encoder, decoder: parts of the model.
      trajectories: number of training trajectories, N.
      horizon: number of frames in a training trajectory after its first frame, T.
      longer: number of horizons in an evaluation trajectory.
      iterations: number of iterations for the implicit equations of the leapfrog.
      seen: number of frames that the encoder receives.
      decoded: number of later frames that are decoded for each trajectory of a batch.
      early: weight of the loss on the frames that the encoder receives.
      beta: weight of the divergence from the prior.
      eval_examples: number of trajectories in an evaluation.
    """

    system: System
    law: dynamics.Law
    encoder: Encoder
    decoder: Decoder
    trajectories: int
    horizon: int
    longer: int
    iterations: int
    seen: int
    decoded: int
    early: float
    beta: float
    eval_examples: int

    @property
    def long(self) -> int:
        return self.longer * self.horizon

    def _draw_places(self, key: PRNGKey, num_trajectories: int, num_frames: int) -> Array:
        q, p = self.system.draw(key, num_trajectories)
        positions, _ = self.system.motion(q, p, num_frames)
        return self.system.places(positions)

    def draw_world(self, key: PRNGKey) -> Array:
        return self._draw_places(key, self.trajectories, self.horizon)

    def init_params(self, key: PRNGKey, world: World) -> Params:
        encoder_key, decoder_key, law_key = jax.random.split(key, 3)
        frames = jnp.zeros((self.seen, rendering.SIDE, rendering.SIDE, BODIES))
        return {
            'encoder': self.encoder.init(encoder_key, frames),
            'decoder': self.decoder.init(decoder_key, jnp.zeros(self.encoder.latent)),
            'law': dynamics.init_params(self.law, law_key, self.encoder.latent),
        }

    def _encode(self, params: Params, places: Array) -> tuple[Array, Array]:
        """Compute μ and log σ [N, 2·latent] of the initial states."""
        frames = rendering.render(places[: self.seen]).swapaxes(0, 1)
        mean, log_deviation = self.encoder.apply(params['encoder'], frames)
        return mean, log_deviation

    def _decode(self, params: Params, q: Array) -> Array:
        """Compute the logits of the frames at q."""
        logits: Array = self.decoder.apply(params['decoder'], q)
        return logits

    def _predict(self, params: Params, state: Array, steps: int) -> State:
        """Roll out the law from an initial state [N, 2·latent]."""
        time = self.system.time
        step = dynamics.make_step(self.law, params['law'], time, self.iterations, order=2)
        q, p = jnp.split(state, 2, -1)
        return integrators.roll_out(step, q, p, steps)

    def loss(self, params: Params, world: Array, key: PRNGKey) -> tuple[Array, Metrics]:
        trajectory_key, noise_key, times_key = jax.random.split(key, 3)
        T, seen = self.horizon, self.seen

        # The first state of each trajectory, drawn from the posterior, and where it leads.
        trajectory_ids = jax.random.randint(trajectory_key, (self.examples,), 0, world.shape[1])
        places = world[:, trajectory_ids]
        mean, log_deviation = self._encode(params, places)
        state = mean + jnp.exp(log_deviation) * jax.random.normal(noise_key, mean.shape)
        q, _ = self._predict(params, state, T)

        # Log-likelihood of the frames that the encoder saw, and of some later ones.
        later_times = jax.random.choice(times_key, T + 1 - seen, (self.decoded,), replace=False)
        times = jnp.concatenate([jnp.arange(seen), seen + later_times])
        logits, true_frames = self._decode(params, q[times]), rendering.render(places[times])
        frame_nll = jnp.sum(nn.softplus(logits) - true_frames * logits, (-3, -2, -1))
        nll = self.early * frame_nll[:seen].mean() + (1 - self.early) * frame_nll[seen:].mean()

        # Divergence of the posterior from N(0, 1).
        squares = jnp.square(mean) + jnp.exp(2 * log_deviation) - 1
        kl = jnp.mean(jnp.sum(squares / 2 - log_deviation, -1))
        pixel_mse = jnp.mean(jnp.square(nn.sigmoid(logits) - true_frames))
        return nll + self.beta / (T + 1) * kl, {'nll': nll, 'kl': kl, 'pixels': pixel_mse}

    def _mean_energy(self, places: Array) -> Array:
        """Average the true energy over each horizon: places [time, N, …] → [horizons, N]."""
        system = self.system
        moving_places = places[:, :, : system.moving]
        velocity = (moving_places[2:] - moving_places[:-2]) / (2 * system.time)
        kinetic = system.mass / 2 * jnp.sum(jnp.square(velocity), (-2, -1))
        energies = kinetic + system.potential(system.coordinates(places[1:-1]))
        horizons = jnp.array_split(energies, self.longer)
        return jnp.stack([horizon.mean(0) for horizon in horizons])

    def _roll_out(self, params: Params, key: PRNGKey) -> Rollout:
        """Predict fresh trajectories, and score the predictions."""
        places = self._draw_places(key, self.eval_examples, self.long)
        q, p = self._predict(params, self._encode(params, places)[0], self.long)

        # Frame by frame, as all of them do not fit into memory.
        def compare_frame(step: tuple[Array, Array]) -> tuple[Array, ...]:
            true, predicted = rendering.render(step[0]), nn.sigmoid(self._decode(params, step[1]))
            pixel_error = jnp.mean(jnp.square(predicted - true), (-3, -2, -1))
            located = rendering.locate(true), rendering.locate(predicted)
            return true[:SHOWN], predicted[:SHOWN], pixel_error, *located

        true_film, predicted_film, pixel_errors, true_places, predicted_places = jax.lax.map(
            compare_frame, (places, q)
        )
        films = {'true': true_film, 'predicted': predicted_film}

        # Scores of pixels, places and energies.
        moving_places = [
            located[:, :, : self.system.moving].reshape(*located.shape[:2], -1)
            for located in (predicted_places, true_places)
        ]
        curves = {'pixels': scores.clip_scores(pixel_errors)}
        curves['error'] = scores.compute_error(*moving_places)
        if self.law.form != 'field':
            learned_energy = dynamics.compute_energy(self.law, params['law'], q, p)
            curves['drift_learnt'] = scores.compute_drift(learned_energy)
        energies = self._mean_energy(predicted_places)
        energy_deviation = jnp.std(self._mean_energy(true_places)[0])
        drift = scores.clip_scores(jnp.abs(energies - energies[:1]) / energy_deviation)
        return Rollout(films, curves, {'drift': drift})

    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        _, curves, horizons = self._roll_out(params, key)
        T = self.horizon
        metrics = {'drift': horizons['drift'][-1].mean()}
        for score_name in ('pixels', 'error'):
            metrics[score_name] = curves[score_name][: T + 1].mean()
            metrics[f'{score_name}_long'] = curves[score_name].mean()
        metrics['valid'] = scores.compute_valid_share(curves['error'], TOLERANCE).mean()
        if 'drift_learnt' in curves:
            metrics['drift_learnt'] = curves['drift_learnt'][self.long - T + 1 :].mean()
        return {'eval': metrics}

    def artifacts(self, params: Params, world: World, key: PRNGKey) -> Metrics:
        """Return the frames of SHOWN trajectories, as uint8, and all scores."""
        frames, curves, horizons = self._roll_out(params, key)
        films = {name: jnp.uint8(jnp.round(255 * film)) for name, film in frames.items()}
        return films | curves | horizons

    def costs(self) -> Costs:
        """Count the costs of a prediction: an encoding, and the steps and frames of a horizon."""
        model_costs = dynamics.costs(self.law, self.encoder.latent)
        params = jax.eval_shape(lambda key: self.init_params(key, {}), jax.random.key(0))
        places = jax.ShapeDtypeStruct((self.horizon + 1, 1, BODIES, 2), jnp.float32)

        def predict_frames(params: Params, places: Array) -> Array:
            state, _ = self._encode(params, places)
            return self._decode(params, self._predict(params, state, self.horizon)[0])

        model_costs['parameters']['model'] = counting.parameters(params)
        model_costs['flops_per_example']['model'] = counting.flops(predict_frames, params, places)
        return model_costs


def make(config: ml_collections.ConfigDict) -> Frames:
    """Build the problem that a config describes.

    Raises:
      UserError: if `seen` or `decoded` exceeds the number of frames.
    """
    problem, T = config.problem, config.problem.horizon
    for config_key, max_frames in {'seen': T, 'decoded': T + 1 - problem.seen}.items():
        if problem[config_key] > max_frames:
            raise UserError(
                f'config.problem.{config_key} = {problem[config_key]}: expected at most '
                f'{max_frames}, because config.problem.horizon = {T} has {T + 1} frames'
            )
    return Frames(
        examples=config.train.batch,
        system=SYSTEMS[problem.system],
        law=dynamics.make(config.model),
        encoder=Encoder(config.model.latent, config.model.hidden),
        decoder=Decoder(config.model.hidden),
        trajectories=problem.trajectories,
        horizon=T,
        longer=problem.longer,
        iterations=problem.iterations,
        seen=problem.seen,
        decoded=problem.decoded,
        early=problem.early,
        beta=problem.beta,
        eval_examples=problem.examples,
    )
