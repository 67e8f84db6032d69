"""The optimizer that a config's `optim` section names, built from optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mi.config import Rule, integer, number, one_of

Constructor = Callable[[ml_collections.ConfigDict, optax.Schedule], optax.GradientTransformation]

OPTIMIZERS: dict[str, Constructor] = {
    'adam': lambda config, rate: optax.adam(rate, config.b1, config.b2, config.eps),
    'adamw': lambda config, rate: optax.adamw(
        rate,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=_matrices,
    ),
    'rmsprop': lambda config, rate: optax.rmsprop(  # TensorFlow's
        rate,
        config.b2,
        config.eps,
        initial_scale=1.0,
        eps_in_sqrt=True,
        momentum=config.b1 or None,
    ),
    'sgd': lambda config, rate: optax.sgd(rate, momentum=config.b1 or None),
}
"""Config word → constructor: the config's section `optim` and the learning rate by step → optax.

A config file adds its own: `OPTIMIZERS['lion'] = lambda config, rate: optax.lion(rate)`.
"""

SCHEDULES = ('constant', 'cosine', 'linear', 'rsqrt')

SCHEMA: dict[str, Rule] = {
    'optim.name': one_of(OPTIMIZERS),
    'optim.learning_rate': number(0, exclusive=True),
    'optim.schedule': one_of(SCHEDULES),
    'optim.warmup_steps': integer(0),
    'optim.final_scale': number(0, 1),
    'optim.clip_norm': number(0),
    'optim.weight_decay': number(0),
    'optim.b1': number(0, 1),
    'optim.b2': number(0, 1),
    'optim.eps': number(0, exclusive=True),
}


def get_config() -> ml_collections.ConfigDict:
    """The section `optim` with its defaults."""
    config = ml_collections.ConfigDict()
    config.name = 'adam'  # a word of OPTIMIZERS: adam, adamw, rmsprop, sgd
    config.learning_rate = 1e-3  # after warm-up
    config.schedule = 'cosine'  # constant, cosine, linear, rsqrt
    config.warmup_steps = 100
    config.final_scale = 0.0  # of the learning rate at the last step: cosine and linear
    config.clip_norm = 1.0  # global norm of the gradient; 0 for no clipping
    config.weight_decay = 0.0  # decoupled, on matrices: adamw
    config.b1 = 0.9  # first moment: adam, adamw; momentum: sgd, rmsprop
    config.b2 = 0.999  # second moment: adam, adamw; decay: rmsprop
    config.eps = 1e-8
    return config


def schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step, 0-based: linear warm-up from peak / warm-up, then the named decay."""
    peak, warmup = config.learning_rate, config.warmup_steps
    after = max(1, steps - warmup)
    decays = {
        'constant': optax.constant_schedule(peak),
        'cosine': optax.cosine_decay_schedule(peak, after, config.final_scale),
        'linear': optax.linear_schedule(peak, peak * config.final_scale, after),
        'rsqrt': lambda step: peak * (1 + jnp.maximum(step, 0) / max(1, warmup)) ** -0.5,
    }
    if warmup == 0:
        return decays[config.schedule]
    rise = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def optimiser(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a run of `steps` updates.

    RMSProp is TensorFlow's: ε inside the square root, mean square starting at one.
    """
    rate = schedule(config, steps)
    transforms: list[optax.GradientTransformation] = []
    if config.clip_norm > 0:
        transforms.append(optax.clip_by_global_norm(config.clip_norm))
    transforms.append(OPTIMIZERS[config.name](config, rate))
    return optax.chain(*transforms)


def _matrices(params: Any) -> Any:
    """True for the leaves that weight decay applies to: all but biases and scales.

    Biases of two axes are u and v [heads, d] of relative attention.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and getattr(path[-1], 'key', None) not in ('u', 'v'),
        params,
    )
