"""Classification of handwritten digits, 8 × 8 pixels, by convolutions or by self-attention.

The question is that of Cordonnier et al., On the Relationship between Self-Attention and
Convolutional Layers (ICLR 2020). K² heads with quadratic relative encoding can approximate any
K × K convolution, with an error that vanishes for large α. Do they become a convolution in
training? The data are the 1,797 images that are part of scikit-learn (the test set of Alpaydin &
Kaynak, Optical Recognition of Handwritten Digits, UCI 1998), with a different split for each seed.
Cordonnier et al. used CIFAR-10. The network and the training are ours.

A run with self-attention saves the centers Δ and the sharpness α of all heads before and after
training. A run with convolutions saves its difference from the network that replaces each layer
with K² heads, for each α in the config, in f32 and in bf16.
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
            f'experiments.attention_conv: expected scikit-learn, which contains the images, to be '
            f'installed. Try {suggest_install("digits")}'
        ) from error
    digits = load_digits()
    images = digits.images.astype(np.float32)
    images = (images - images.mean()) / images.std()
    return images[..., None], digits.target.astype(np.int32)


class Split(NamedTuple):
    """The split of the images that a seed draws.

    Attributes:
      image_ids: indices of the images in random order, with the training set first.
      init_key: random key of the initial parameters, from which `artifacts` can recompute them.
    """

    image_ids: Array
    init_key: PRNGKey


@dataclasses.dataclass(frozen=True)
class Digits(Problem):
    """The problem of classifying digits by convolutions or by self-attention.

    Attributes:
      model: module that maps images to logits.
      settings: section `model` of the config.
      images, labels: the whole data set.
      train_examples: number of images to train on. All others are held out.
      alphas: values of α at which trained convolutions are converted to self-attention.
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
        """Return the heads before and after training, or the errors of converted convolutions."""
        if self.settings.layer == 'attention':
            initial = self.init_params(key, world)
            return _stack_heads(params, '') | _stack_heads(initial, '_before')
        image_ids = world.image_ids[self.train_examples :]
        test_images, test_labels = self.images[image_ids], self.labels[image_ids]
        return compare_construction(params, self.settings, test_images, test_labels, self.alphas)


def make(config: ml_collections.ConfigDict) -> Digits:
    """Build the problem that a config describes.

    Raises:
      UserError: if the heads cannot start as a square grid, or if scikit-learn is not installed.
    """
    model = config.model
    if model.centres == 'grid' and round(model.heads**0.5) ** 2 != model.heads:
        raise UserError(
            f'config.model.heads = {model.heads}: expected a square number, because the heads '
            f"start as a square grid. Try 9, or config.model.centres = 'learnt'"
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
    """Compare a network of convolutions with the self-attention that it is converted to.

    Returns:
      Arrays [dtypes, alphas, …]. `layer_error` [L] is the error of each layer, given the output of
      the convolutions before it. `logit_error` and `accuracy` belong to the whole network. Errors
      are root mean squares relative to the root mean square of the convolutions. `own_accuracy` is
      the accuracy of the convolutions, in f32.
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
    """Compute the fraction of rows [N] whose largest logit belongs to the label."""
    return jnp.mean(logits.argmax(-1) == labels)


def _stack_heads(params: Params, suffix: str) -> Metrics:
    """Stack Δ [L, H, 2] and α [L, H] of all layers."""
    layer_names = sorted(name for name in params['params'] if name.startswith('layer_'))
    layers = [params['params'][layer_name] for layer_name in layer_names]
    return {
        f'{param_name}{suffix}': jnp.stack([layer[param_name] for layer in layers])
        for param_name in ('Delta', 'alpha')
    }


def _stop_gradient_of_centers(params: Params) -> Params:
    """Stop the gradient with respect to Δ and α."""

    def stop(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        is_center = path[-1].key in ('Delta', 'alpha')
        return jax.lax.stop_gradient(leaf) if is_center else leaf

    return jax.tree_util.tree_map_with_path(stop, params)
