"""Handwritten digits, 8 × 8 pixels, classified by networks of convolutions or of self-attention.

After Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers (ICLR
2020): K² heads with quadratic relative encoding can be any K × K convolution, the better the larger
α; do they become one when they learn? The images are 1,797 that scikit-learn ships (the test set of
Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998), each seed with its own
split of them. Theirs were CIFAR-10; network and training are ours.

At the end a run keeps, of every layer of self-attention, the centers Δ and the α of its heads,
before training and after; of a network of convolutions how far it is from the network in which
every layer is K² heads, for each α of the config, in f32 and in bf16.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from chex import Array, PRNGKey
from flax import linen as nn
from jax.typing import DTypeLike

from experiments.attention_conv import network as vision
from mi.config import Rule, UserError, integer, number, suggest_install, tuple_of
from mi.fit import network
from mi.fit.problem import Costs, Metrics, Params, Problem
from mi.motifs.convolutional_attention import convert_convolution

NUM_CLASSES = 10
NUM_IMAGES = 1797
DTYPES: dict[str, DTypeLike] = {'f32': jnp.float32, 'bf16': jnp.bfloat16}


SCHEMA: dict[str, Rule] = {
    'problem.train': integer(1, NUM_IMAGES - 1),
    'problem.alphas': tuple_of(number(0, exclusive=True), 'positive numbers'),
    **vision.SCHEMA,
}


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """Load images [1797, 8, 8, 1] in f32, standardized over all pixels, and labels [1797].

    Raises:
      UserError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f'experiments.attention_conv: its images come with scikit-learn, which is not '
            f'installed. Try {suggest_install("digits")}'
        ) from error
    digits = load_digits()
    images = digits.images.astype(np.float32)
    images = (images - images.mean()) / images.std()
    return images[..., None], digits.target.astype(np.int32)


class Split(NamedTuple):
    """The world of a seed.

    Attributes:
      image_ids: the images in the order of the seed, those to train on first.
      init_key: draws the initial parameters, so that `artifacts` can draw them again.
    """

    image_ids: Array
    init_key: PRNGKey


@dataclasses.dataclass(frozen=True)
class Digits(Problem):
    """Classify digits by convolutions or by self-attention.

    Attributes:
      model: images → logits.
      settings: the config's section `model`.
      images, labels: all of them.
      train_examples: images to train on; the others are held out.
      alphas: of the networks of self-attention that are built from convolutions.
    """

    model: nn.Module
    settings: ml_collections.ConfigDict
    images: Array
    labels: Array
    train_examples: int
    alphas: tuple[float, ...]

    def draw_world(self, key: PRNGKey) -> Split:
        order_key, init_key = jax.random.split(key)
        return Split(jax.random.permutation(order_key, NUM_IMAGES), init_key)

    def init_params(self, key: PRNGKey, world: Split) -> Params:
        return self.model.init(world.init_key, jnp.zeros(self.images.shape[1:]))

    def _compute_metrics(self, params: Params, image_ids: Array) -> Metrics:
        if self.settings.centres == 'fixed':
            params = _stop_gradient_of_centers(params)
        logits: Array = self.model.apply(params, self.images[image_ids])
        labels = self.labels[image_ids]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return {'cross_entropy': loss, 'accuracy': compute_accuracy(logits, labels)}

    def loss(self, params: Params, world: Split, key: PRNGKey) -> tuple[Array, Metrics]:
        image_ids = world.image_ids[: self.train_examples]
        metrics = self._compute_metrics(params, jax.random.choice(key, image_ids, (self.examples,)))
        return metrics['cross_entropy'], metrics

    def evaluate(self, params: Params, world: Split, key: PRNGKey) -> dict[str, Metrics]:
        return {'eval': self._compute_metrics(params, world.image_ids[self.train_examples :])}

    def costs(self) -> Costs:
        image = jax.ShapeDtypeStruct(self.images.shape[1:], jnp.float32)
        return network.costs(self.model, image, fusion_pattern=r'layer_\d+')

    def artifacts(self, params: Params, world: Split, key: PRNGKey) -> Metrics:
        """Return the heads before and after training, or the errors of the construction."""
        if self.settings.layer == 'attention':
            initial = self.init_params(key, world)
            return _stack_heads(params, '') | _stack_heads(initial, '_before')
        image_ids = world.image_ids[self.train_examples :]
        test_images, test_labels = self.images[image_ids], self.labels[image_ids]
        return compare_construction(params, self.settings, test_images, test_labels, self.alphas)


def make(config: ml_collections.ConfigDict) -> Digits:
    """Build the problem of a config.

    Raises:
      UserError: if the heads cannot start as a square grid, or scikit-learn is not installed.
    """
    model = config.model
    if model.centres == 'grid' and round(model.heads**0.5) ** 2 != model.heads:
        raise UserError(
            f'config.model.heads = {model.heads}: expected a square number, for they start '
            f"as a grid; or give config.model.centres = 'learnt'"
        )
    images, labels = (jnp.asarray(array) for array in load_images())
    return Digits(
        examples=config.train.batch,
        model=vision.make(model, NUM_CLASSES),
        settings=model,
        images=images,
        labels=labels,
        train_examples=config.problem.train,
        alphas=tuple(config.problem.alphas),
    )


def compare_construction(
    params: Params,
    model: ml_collections.ConfigDict,
    images: Array,
    labels: Array,
    alphas: tuple[float, ...],
) -> Metrics:
    """Compare a network of convolutions with the network of self-attention built to equal it.

    Errors are root mean squares over that of the convolution, [dtypes, alphas, …]. `layer_error`
    [L] is that of each layer on the output of the convolutions before it, `logit_error` and
    `accuracy` are those of the whole network, and `own_accuracy` is that of the convolutions, in
    f32.
    """
    # The inputs and outputs of every convolution.
    depth, heads = model.depth, vision.Heads(model.kernel**2)
    convolutions = vision.make(model, NUM_CLASSES)
    logits, variables = convolutions.apply(
        params, images, capture_intermediates=True, mutable='intermediates'
    )
    intermediates = variables['intermediates']
    layer_names = [f'layer_{layer_index}' for layer_index in range(depth)]
    outputs = [intermediates[layer_name]['__call__'][0] for layer_name in layer_names]
    inputs = [images, *map(jax.nn.relu, outputs[:-1])]

    def compare(alpha: Array, dtype: DTypeLike) -> Metrics:
        attention = vision.make_attention(NUM_CLASSES, heads, model.width, depth, dtype)
        converted = {'out': params['params']['out']}
        for layer_name in layer_names:
            kernel = params['params'][layer_name]
            converted[layer_name] = convert_convolution(kernel['V'], kernel['b'], alpha)

        # Each layer on the output of the convolutions before it, then all layers together.
        layer = attention.layer(None)
        layer_errors = [
            _relative_error(layer.apply({'params': converted[layer_name]}, layer_input), expected)
            for layer_name, layer_input, expected in zip(layer_names, inputs, outputs, strict=True)
        ]
        attention_logits = attention.apply({'params': converted}, images)
        return {
            'layer_error': jnp.stack(layer_errors),
            'logit_error': _relative_error(attention_logits, logits),
            'accuracy': compute_accuracy(attention_logits, labels),
        }

    # Each dtype at each α.
    comparisons = [
        jax.lax.map(functools.partial(compare, dtype=dtype), jnp.array(alphas))
        for dtype in DTYPES.values()
    ]
    arrays = {
        metric_name: jnp.stack([comparison[metric_name] for comparison in comparisons])
        for metric_name in comparisons[0]
    }
    return arrays | {'own_accuracy': compute_accuracy(logits, labels)}


def _relative_error(output: Array, expected: Array) -> Array:
    difference = output.astype(jnp.float32) - expected
    return jnp.sqrt(jnp.square(difference).mean() / jnp.square(expected).mean())


def compute_accuracy(logits: Array, labels: Array) -> Array:
    """Return the share of rows [N] whose largest logit is that of the label."""
    return jnp.mean(logits.argmax(-1) == labels)


def _stack_heads(params: Params, suffix: str) -> Metrics:
    """Return Δ [L, H, 2] and α [L, H] of all layers."""
    layer_names = sorted(name for name in params['params'] if name.startswith('layer_'))
    layers = [params['params'][layer_name] for layer_name in layer_names]
    return {
        f'{param_name}{suffix}': jnp.stack([layer[param_name] for layer in layers])
        for param_name in ('Delta', 'alpha')
    }


def _stop_gradient_of_centers(params: Params) -> Params:
    """Return the parameters, without a gradient into Δ and α."""

    def stop(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        is_center = path[-1].key in ('Delta', 'alpha')
        return jax.lax.stop_gradient(leaf) if is_center else leaf

    return jax.tree_util.tree_map_with_path(stop, params)
