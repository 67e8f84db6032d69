"""Handwritten digits, 8 × 8 pixels, classified by networks of convolutions or of self-attention.

After Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers (ICLR
2020): K² heads with quadratic relative encoding can be any K × K convolution, the better the larger
α; do they become one when they learn? The images are 1,797 that scikit-learn ships (the test set of
Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998), each seed with its own
split of them. Theirs were CIFAR-10; network and training are ours.

At the end a run keeps, of every layer of self-attention, the centres Δ and the α of its heads,
before training and after; of a network of convolutions how far it is from the network in which
every layer is K² heads, for each α of the config, in f32 and in bf16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array
from jax.typing import DTypeLike

from experiments.attention_conv import network as vision
from mi.config import Rule, UserError, integer, number, suggest_install, tuple_of
from mi.fit import network
from mi.fit.problem import Metrics, Problem
from mi.motifs.attention import convert_convolution

CLASSES = 10
COUNT = 1797
DTYPES: dict[str, DTypeLike] = {'f32': jnp.float32, 'bf16': jnp.bfloat16}


SCHEMA: dict[str, Rule] = {
    'problem.train': integer(1, COUNT - 1),
    'problem.alphas': tuple_of(number(0, exclusive=True), 'positive numbers'),
    **vision.SCHEMA,
}


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8, 1] in f32, mean 0 and variance 1 over all pixels, and labels [1797].

    Raises:
      UserError: if scikit-learn is not there.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f'experiments.attention_conv: its images come with scikit-learn, which is not '
            f'installed. Try {suggest_install("digits")}'
        ) from error
    data = load_digits()
    images = data.images.astype(np.float32)
    images = (images - images.mean()) / images.std()
    return images[..., None], data.target.astype(np.int32)


def make(config: ml_collections.ConfigDict) -> Problem:
    """The problem of a config.

    Raises:
      UserError: if the heads cannot start as a square grid, or scikit-learn is not there.
    """
    of, word = config.problem, config.model
    if word.centres == 'grid' and round(word.heads**0.5) ** 2 != word.heads:
        raise UserError(
            f'config.model.heads = {word.heads}: expected a square number, for they start '
            f"as a grid; or give config.model.centres = 'learnt'"
        )
    images, labels = (jnp.asarray(a) for a in load())
    model = vision.make(word, CLASSES)
    one = jax.ShapeDtypeStruct(images.shape[1:], jnp.float32)

    def world(key: Array) -> Any:
        """The images in the order of this seed, those to learn from first; the key of the start."""
        order, start = jax.random.split(key)
        return {'rows': jax.random.permutation(order, COUNT), 'start': start}

    def init(key: Array, world: Any) -> Any:
        """By a key of the world, so that the artefacts can have it again."""
        return model.init(world['start'], jnp.zeros(one.shape))

    def score(params: Any, rows: Array) -> Metrics:
        if word.centres == 'fixed':
            params = _with_fixed_centres(params)
        logits: Any = model.apply(params, images[rows])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()
        return {'cross_entropy': loss, 'accuracy': _accuracy(logits, labels[rows])}

    def loss(params: Any, world: Any, key: Array) -> tuple[Array, Metrics]:
        rows = world['rows'][: of.train]
        measured = score(params, jax.random.choice(key, rows, (config.train.batch,)))
        return measured['cross_entropy'], measured

    def evaluation(params: Any, world: Any, key: Array) -> Metrics:
        return score(params, world['rows'][of.train :])

    def artefacts(params: Any, world: Any, key: Array) -> Metrics:
        if word.layer == 'attention':
            before = init(key, world)
            return _centres(params, '') | _centres(before, '_before')
        rows = world['rows'][of.train :]
        return constructed(params, word, images[rows], labels[rows], tuple(of.alphas))

    return Problem(
        world=world,
        init=init,
        loss=loss,
        evaluations={'eval': evaluation},
        costs=lambda: network.costs(model, one, part=r'layer_\d+'),
        examples=config.train.batch,
        artefacts=artefacts,
    )


def constructed(
    params: Any,
    model: ml_collections.ConfigDict,
    images: Array,
    labels: Array,
    alphas: tuple[float, ...],
) -> Metrics:
    """A network of convolutions against that of self-attention which is built to equal it.

    Errors are root mean squares over that of the convolution, [dtypes, alphas, …]: `layer_error`
    that of each layer [L] on what the convolutions before it give, `logit_error` and `accuracy`
    that of the whole network; `own_accuracy` is that of the convolutions, in f32.
    """
    depth, heads = model.depth, model.kernel**2
    theirs = vision.make(model, CLASSES)
    kept: Any = theirs.apply(params, images, capture_intermediates=True, mutable='intermediates')
    logits, each = kept[0], kept[1]['intermediates']
    outputs = [each[f'layer_{i}']['__call__'][0] for i in range(depth)]
    inputs = [images, *map(jax.nn.relu, outputs[:-1])]

    def measured(alpha: Array, dtype: DTypeLike) -> Metrics:
        ours = vision.attention(CLASSES, heads, model.width, depth, dtype=dtype)
        built = {
            name: convert_convolution(of['V'], of['b'], alpha) if name != 'out' else of
            for name, of in params['params'].items()
        }
        layers = [
            ours.layer(None).apply({'params': built[f'layer_{i}']}, x) for i, x in enumerate(inputs)
        ]
        errors = [_relative(y, exact) for y, exact in zip(layers, outputs, strict=True)]
        y: Any = ours.apply({'params': built}, images)
        return {
            'layer_error': jnp.stack(errors),
            'logit_error': _relative(y, logits),
            'accuracy': _accuracy(y, labels),
        }

    of_dtypes = [
        jax.lax.map(functools.partial(measured, dtype=dtype), jnp.array(alphas))
        for dtype in DTYPES.values()
    ]
    arrays = {name: jnp.stack([of[name] for of in of_dtypes]) for name in of_dtypes[0]}
    return arrays | {'own_accuracy': _accuracy(logits, labels)}


def _relative(y: Any, exact: Array) -> Array:
    difference = y.astype(jnp.float32) - exact
    return jnp.sqrt(jnp.square(difference).mean() / jnp.square(exact).mean())


def _accuracy(logits: Array, labels: Array) -> Array:
    return jnp.mean(logits.argmax(-1) == labels)


def _centres(params: Any, ending: str) -> Metrics:
    """Δ [L, H, 2] and α [L, H] of all layers."""
    layers = [of for name, of in sorted(params['params'].items()) if name.startswith('layer_')]
    return {
        f'{name}{ending}': jnp.stack([layer[name] for layer in layers])
        for name in ('Delta', 'alpha')
    }


def _with_fixed_centres(params: Any) -> Any:
    """The parameters, without a gradient into Δ and α."""

    def fix(path: Any, leaf: Array) -> Array:
        fixed = path[-1].key in ('Delta', 'alpha')
        return jax.lax.stop_gradient(leaf) if fixed else leaf

    return jax.tree_util.tree_map_with_path(fix, params)
