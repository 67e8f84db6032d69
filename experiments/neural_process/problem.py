"""Prediction of functions from a few points, which compares fusions in a decoder.

Every step draws new functions (`tasks`), each with a number of context points that is uniform in
0 … `max_context`. The loss per target only includes held-out targets:

    deterministic path   −log p(y | context)
    other paths          −ELBO with one sample of z (Garnelo et al., 2018b, equation 9)

Evaluations draw the same functions for all models of a seed. They compute these metrics for each
number of context points:

    log_likelihood            joint log-likelihood of all targets, per target; for a latent z, the
                              importance-weighted bound with `samples` draws from the posterior
    marginal_log_likelihood   log-likelihood of each target alone; this and all metrics below use
                              draws from the prior
    mse                       mean squared error of the predictive mean on noisy targets
    coverage_50, _90          fraction of targets in the central interval of 50 and 90 %
    calibration_error         mean |coverage − level| over the levels 10, 20, … 90 %

The split `eval` has the means over all numbers of context points. The split `contexts` has the
value for each number, such as `mse/4` for 4 points. For a mixture, each family has its own split.
`gp_eval` and the other splits with the prefix `gp_` have the metrics of Gaussian-process regression
with the true kernel, whose expected likelihood no model can exceed.

Shapes: F functions, C context points, T targets, S samples; x, y [F, …].

Source: Garnelo et al. (2018a, b) and Kim et al. (2019) for the models. The comparison of a
multiplicative decoder with concatenation at the input and at every layer is that of Jayakumar et
al. (ICLR 2020), recalled from memory. The functions, sizes and training are ours.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
from chex import Array, PRNGKey

from experiments.neural_process import gp, likelihood, network, tasks
from experiments.neural_process.likelihood import Gaussian
from experiments.neural_process.network import Points
from experiments.neural_process.scores import Scores, score_mixture, summarize
from mi.config import Rule, UserError, integer, tuple_of
from mi.fit import network as fit_network
from mi.fit.problem import Costs, Metrics, Params, Problem, World

GRID_SIZE = 100  # points of a figure
SHOWN_CONTEXT = 5  # points of context in a figure

SCHEMA: dict[str, Rule] = {
    'problem.max_context': integer(1),
    'problem.targets': integer(1),
    'problem.functions': integer(1),
    'problem.contexts': tuple_of(integer(0), 'integers of at least 0'),
    'problem.samples': integer(1),
    **tasks.SCHEMA,
    **network.SCHEMA,
}


class Settings(NamedTuple):
    """Sizes of the problem, from `config.problem`.

    Attributes:
      max_context: maximum number of context points, C.
      targets: number of targets, T.
      functions: number of functions in an evaluation, F.
      contexts: numbers of context points in an evaluation.
      samples: number of samples in an evaluation, S.
    """

    max_context: int
    targets: int
    functions: int
    contexts: tuple[int, ...]
    samples: int


class Examples(NamedTuple):
    """Functions for a figure: values on a grid [GRID_SIZE], and context points."""

    functions: tasks.Functions
    context: Points
    grid: Array


@dataclasses.dataclass(frozen=True)
class Regression(Problem):
    """The problem of predicting functions from context points, with fresh functions in each batch.

    Attributes:
      model: the neural process.
      distribution: distribution of the functions.
      settings: sizes of the problem.
    """

    model: network.NeuralProcess
    distribution: tasks.Distribution
    settings: Settings

    @property
    def has_latent(self) -> bool:
        """Whether the model has a latent z."""
        return self.model.paths != 'deterministic'

    def init_params(self, key: PRNGKey, world: World) -> Params:
        sizes = self.settings.max_context, self.settings.targets, self.model.features
        points, targets, epsilon = map(jnp.zeros, sizes)
        return self.model.init(key, points, points, points == 0, targets, epsilon)

    def split(self, functions: tasks.Functions, counts: Array) -> tuple[Points, Array, Array]:
        """Split points into a context [F, C], with the first `counts` [F] visible, and targets."""
        C = self.settings.max_context
        mask = jnp.arange(C)[None] < counts[:, None]
        context = Points(functions.x[:, :C], functions.y[:, :C], mask)
        return context, functions.x[:, C:], functions.y[:, C:]

    def infer(self, params: Params, points: Points) -> Gaussian:
        """Compute q(z | points) [F, m]."""
        return cast(Gaussian, self.model.apply(params, points, method='infer'))

    def infer_both(
        self, params: Params, context: Points, x: Array, y: Array
    ) -> tuple[Gaussian, Gaussian]:
        """Compute q(z | context) and q(z | context, targets), [F, m] each."""
        targets = Points(x, y, jnp.ones(x.shape, bool))
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), context, targets)
        return self.infer(params, context), self.infer(params, joined)

    def represent(self, params: Params, context: Points, x: Array) -> Array | None:
        """Compute r [F, T or 1, m] for targets at x [F, T], or return None on the latent path."""
        r: Array | None = self.model.apply(params, context, x, method='represent')
        return r

    def decode(self, params: Params, r: Array | None, z: Array | None, x: Array) -> Gaussian:
        """Predict targets at x [F, T] from r, z [F, m] or both."""
        return cast(Gaussian, self.model.apply(params, r, z, x, method='decode'))

    def loss(self, params: Params, world: World, key: PRNGKey) -> tuple[Array, Metrics]:
        # New functions, and how much of each is visible.
        function_key, count_key, z_key = jax.random.split(key, 3)
        C, T = self.settings.max_context, self.settings.targets
        functions = tasks.draw_functions(function_key, self.distribution, self.examples, C + T)
        counts = jax.random.randint(count_key, (self.examples,), 0, C + 1)
        context, x, y = self.split(functions, counts)

        # Their likelihood, or a bound on it.
        z = None
        if self.has_latent:
            prior, posterior = self.infer_both(params, context, x, y)
            z = likelihood.draw_gaussian(z_key, posterior)
        prediction = self.decode(params, self.represent(params, context, x), z, x)
        log_density = bound = likelihood.compute_log_density(y, prediction).sum(-1)
        if self.has_latent:
            bound = likelihood.compute_elbo(log_density, posterior, prior)
        metrics = {'mse': jnp.mean(jnp.square(prediction.mean - y))}
        if self.has_latent:
            metrics['kl'] = jnp.mean(log_density - bound) / T
        return -jnp.mean(bound) / T, metrics

    def score(
        self, params: Params, functions: tasks.Functions, key: PRNGKey, count: Array
    ) -> Scores:
        """Score the model on all functions with `count` context points."""
        context, x, y = self.split(functions, jnp.full(len(functions.x), count))
        r = self.represent(params, context, x)
        if not self.has_latent:
            prediction = self.decode(params, r, None, x)
            log_density = likelihood.compute_log_density(y, prediction).sum(-1)
            components = jax.tree.map(lambda a: a[None], prediction)
            return score_mixture(y, components, log_density)

        # Samples of the prior predict; those of the posterior bound the likelihood.
        prior, posterior = self.infer_both(params, context, x, y)

        def draw(sample_key: PRNGKey) -> tuple[Gaussian, Array]:
            prior_key, posterior_key = jax.random.split(sample_key)
            prior_z = likelihood.draw_gaussian(prior_key, prior)
            z = likelihood.draw_gaussian(posterior_key, posterior)
            prediction = self.decode(params, r, z, x)
            log_weight = likelihood.compute_log_density(y, prediction).sum(-1)
            for sign, gaussian in ((1, prior), (-1, posterior)):
                log_weight += sign * likelihood.compute_log_density(z, gaussian).sum(-1)
            return self.decode(params, r, prior_z, x), log_weight

        components, log_weights = jax.lax.map(draw, jax.random.split(key, self.settings.samples))
        return score_mixture(y, components, likelihood.compute_iw_bound(log_weights))

    def score_gp(self, functions: tasks.Functions, count: Array) -> Scores:
        """Score Gaussian-process regression with the true kernel of each function."""
        context, x, y = self.split(functions, jnp.full(len(functions.x), count))
        predict = jax.vmap(gp.predict, (0, None, 0, 0))
        predictive = predict(functions.kernel, self.distribution.noise, context, x)
        variance = jnp.diagonal(predictive.covariance, axis1=-2, axis2=-1)
        components = Gaussian(predictive.mean[None], jnp.sqrt(variance)[None])
        return score_mixture(y, components, jax.vmap(gp.compute_log_density)(predictive, y))

    def evaluate(self, params: Params, world: World, key: PRNGKey) -> dict[str, Metrics]:
        function_key, sample_key = jax.random.split(key)
        num_points = self.settings.max_context + self.settings.targets
        functions = tasks.draw_functions(
            function_key, self.distribution, self.settings.functions, num_points
        )

        # Scores [contexts, F] of the model and of the ceiling.
        counts = jnp.array(self.settings.contexts)
        score = functools.partial(self.score, params, functions, sample_key)
        model_scores = jax.lax.map(score, counts)
        gp_scores = jax.lax.map(functools.partial(self.score_gp, functions), counts)

        # Means over all functions, by points of context, and of each family.
        metrics = {}
        for prefix, scores in (('', model_scores), ('gp_', gp_scores)):
            metrics[f'{prefix}eval'] = summarize(scores)
            metrics[f'{prefix}contexts'] = self._summarize_counts(scores)
            metrics |= {
                f'{prefix}{family}': summarize(family_scores)
                for family, family_scores in self._split_families(scores).items()
            }
        return metrics

    def _summarize_counts(self, scores: Scores) -> Metrics:
        """Average scores [contexts, F] as `metric/COUNT` for each number of context points."""
        by_count = jax.vmap(summarize)(scores)
        return {
            f'{name}/{count}': values[index]
            for name, values in by_count.items()
            for index, count in enumerate(self.settings.contexts)
        }

    def _split_families(self, scores: Scores) -> dict[str, Scores]:
        """Split scores [contexts, F] of a mixture by family, where families alternate."""
        families = self.distribution.families
        if len(families) == 1:
            return {}

        def take(first: int) -> Scores:
            return jax.tree.map(lambda a: a[:, first :: len(families)], scores)

        return {family: take(index) for index, family in enumerate(families)}

    def costs(self) -> Costs:
        """Count the costs of an example, which predicts T targets from C context points."""
        sizes = self.settings.max_context, self.settings.targets, self.model.features
        points, targets, epsilon = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes)
        mask = jax.ShapeDtypeStruct(points.shape, bool)
        return fit_network.costs(self.model, points, points, mask, targets, epsilon)

    def artifacts(self, params: Params, world: World, key: PRNGKey) -> Metrics:
        """Return predictions on a grid from a few points, for one function of each family.

        Bands are central intervals of 90 %. Samples of a model are predictive means for samples of
        z, and samples of Gaussian-process regression are functions.
        """
        example_key, sample_key = jax.random.split(jax.random.fold_in(key, 1))
        functions, context, grid = draw_examples(example_key, self.distribution)
        x = jnp.broadcast_to(grid, (len(context.x), GRID_SIZE))
        sample_keys = jax.random.split(sample_key, self.settings.samples)
        r = self.represent(params, context, x)

        def draw(sample_key: PRNGKey) -> Gaussian:
            z = None
            if self.has_latent:
                z = likelihood.draw_gaussian(sample_key, self.infer(params, context))
            return self.decode(params, r, z, x)

        arrays = describe_mixture(jax.vmap(draw)(sample_keys))

        # The same of the ceiling, without the noise of the targets in its samples.
        noise = self.distribution.noise
        predictive = jax.vmap(gp.predict, (0, None, 0, 0))(functions.kernel, noise, context, x)
        variance = jnp.diagonal(predictive.covariance, axis1=-2, axis2=-1)
        gp_arrays = describe_mixture(Gaussian(predictive.mean[None], jnp.sqrt(variance)[None]))
        draw_gp = jax.vmap(gp.draw_posterior, (0, 0, None, 0, 0))
        draw_keys = jax.vmap(lambda key: jax.random.split(key, len(context.x)))(sample_keys)
        gp_arrays['samples'] = jax.vmap(draw_gp, (0, None, None, None, None))(
            draw_keys, functions.kernel, noise, context, x
        )
        arrays |= {f'gp_{name}': array for name, array in gp_arrays.items()}
        return arrays | {'grid': grid, 'x': context.x, 'y': context.y, 'f': functions.y}


def describe_mixture(components: Gaussian) -> Metrics:
    """Return the mean, 90 % central interval and samples of a mixture of Gaussians [S, F, T]."""
    return {
        'mean': components.mean.mean(0),
        'low': likelihood.compute_mixture_quantile(0.05, components),
        'high': likelihood.compute_mixture_quantile(0.95, components),
        'samples': components.mean,
    }


def draw_examples(key: PRNGKey, distribution: tasks.Distribution) -> Examples:
    """Draw a function of each family, with noisy context points and exact values on a grid."""
    kernel_key, x_key, y_key = jax.random.split(key, 3)
    num_functions = len(distribution.families)
    kernels = tasks.draw_kernels(kernel_key, distribution, num_functions)
    grid = jnp.linspace(-tasks.RANGE, tasks.RANGE, GRID_SIZE)
    shape = num_functions, SHOWN_CONTEXT
    x = jax.random.uniform(x_key, shape, minval=-tasks.RANGE, maxval=tasks.RANGE)
    points = jnp.concatenate([x, jnp.broadcast_to(grid, (num_functions, GRID_SIZE))], -1)
    noise = jnp.where(jnp.arange(points.shape[-1]) < SHOWN_CONTEXT, distribution.noise, gp.JITTER)
    value_keys = jax.random.split(y_key, num_functions)
    y = jax.vmap(tasks.draw_values, (0, 0, 0, None))(value_keys, kernels, points, noise)
    context = Points(x, y[:, :SHOWN_CONTEXT], jnp.ones(shape, bool))
    functions = tasks.Functions(kernels, points[:, SHOWN_CONTEXT:], y[:, SHOWN_CONTEXT:])
    return Examples(functions, context, grid)


def make(config: ml_collections.ConfigDict) -> Regression:
    """Build the problem that a config describes.

    Raises:
      UserError: if an evaluation has more context points than training or fewer functions than
        families, or for the reasons in `network.make`.
    """
    problem = config.problem
    if max(problem.contexts) > problem.max_context:
        raise UserError(
            f'config.problem.contexts = {tuple(problem.contexts)}: expected at most '
            f'config.problem.max_context = {problem.max_context}, the maximum in training'
        )
    fields = tasks.Distribution._fields
    distribution = tasks.Distribution(**{field: problem[field] for field in fields})
    if problem.functions < len(distribution.families):
        raise UserError(
            f'config.problem.functions = {problem.functions}: expected at least '
            f'{len(distribution.families)}, one for each family'
        )
    return Regression(
        examples=config.train.batch,
        model=network.make(config.model),
        distribution=distribution,
        settings=Settings(**{field: problem[field] for field in Settings._fields}),
    )
