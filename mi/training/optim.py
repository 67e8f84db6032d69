"""Optimizers from optax, as the `optim` section of a config names them.

optim.name = 'adamw'                                      # a key of OPTIMIZERS
optim.name = 'optax:lion'                                 # any function of a learning rate
optim.name, optim.options = 'optax.contrib:muon', {'beta': 0.9}
optim.schedule = 'my_package.schedules:one_cycle'         # any function of a peak and steps
"""

import functools
import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import Array

from mi.config import (
    Rule,
    UserError,
    any_value,
    choice,
    format_error,
    has_parameter,
    integer,
    name_config_keys,
    number,
    suggest,
)
from mi.options import Options, check_options, get_options
from mi.registry import Registry, import_object, is_reference
from mi.training import averaging

Constructor = Callable[[ml_collections.ConfigDict, optax.Schedule], optax.GradientTransformation]

OPTIMIZERS: dict[str, Constructor] = {
    'adam': lambda config, learning_rate: optax.adam(
        learning_rate, config.b1, config.b2, config.eps
    ),
    'adamw': lambda config, learning_rate: optax.adamw(
        learning_rate,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    ),
    'rmsprop': lambda config, learning_rate: optax.rmsprop(  # TensorFlow's
        learning_rate,
        config.b2,
        config.eps,
        initial_scale=1.0,
        eps_in_sqrt=True,
        momentum=config.b1 or None,
    ),
    'sgd': lambda config, learning_rate: optax.sgd(learning_rate, momentum=config.b1 or None),
}
"""Name → constructor, which takes the section `optim` and the learning-rate schedule.

A config file can add a constructor. Any other function of a learning rate can be named as
'package.module:name', with its other arguments in `optim.options`.
"""

WITHOUT_DECAY = ('adam', 'rmsprop', 'sgd')


def _decay_by_root(peak: float, steps: int, warmup: int, final_scale: float) -> optax.Schedule:
    return lambda step: peak * (1 + jnp.maximum(step, 0) / max(1, warmup)) ** -0.5


SCHEDULES: Registry[Callable[[float, int, int, float], optax.Schedule]] = Registry(
    constant=lambda peak, steps, warmup, final_scale: optax.constant_schedule(peak),
    cosine=lambda peak, steps, warmup, final_scale: optax.cosine_decay_schedule(
        peak, steps, final_scale
    ),
    linear=lambda peak, steps, warmup, final_scale: optax.linear_schedule(
        peak, peak * final_scale, steps
    ),
    rsqrt=_decay_by_root,
)
"""Name → function (peak, decay steps, warm-up steps, `final_scale`) → schedule after warm-up."""


def check_optimizer(value: object) -> str:
    """Return a description of valid values of `optim.name`, or '' if the value is valid."""
    if not isinstance(value, str) or not (value in OPTIMIZERS or is_reference(value)):
        return f"a known name, or 'package.module:name'; {suggest(str(value), OPTIMIZERS)}"
    if value in OPTIMIZERS:
        return ''
    try:
        constructor = import_object(value)
    except ValueError as error:
        return f'an optimizer; {error}'
    if not callable(constructor) or not has_parameter(constructor, 'learning_rate'):
        return 'a function with an argument learning_rate, such as optax.lion'
    return ''


SCHEMA: dict[str, Rule] = {
    'optim.name': check_optimizer,
    'optim.options.*': any_value,  # `validate` checks them against the function's arguments
    'optim.learning_rate': number(0, exclusive=True),
    'optim.schedule': choice(SCHEDULES),
    'optim.warmup_steps': integer(-1),
    'optim.final_scale': number(0, 1),
    'optim.clip_norm': number(0),
    'optim.weight_decay': number(0),
    'optim.b1': number(0, below=1),  # at 1 the mean would ignore the gradient
    'optim.b2': number(0, below=1),
    'optim.eps': number(0, exclusive=True),
    'optim.ema': number(0, below=1),
}


def get_config() -> ml_collections.ConfigDict:
    """Return the section `optim` of a config, with default values."""
    config = ml_collections.ConfigDict()
    config.name = 'adam'  # adam, adamw, rmsprop, sgd, or 'optax:lion', 'package.module:name'
    # Arguments of the function 'package.module:name': --config.optim.options="{'b1': 0.95}"
    config.options = ml_collections.ConfigDict()
    config.learning_rate = 1e-3  # after warm-up
    config.schedule = 'cosine'  # constant, cosine, linear, rsqrt, 'package.module:name'
    config.warmup_steps = -1  # -1: 100, or a quarter of the run if that is less
    config.final_scale = 0.0  # share of the learning rate left at the last step: cosine and linear
    config.clip_norm = 1.0  # global norm of the gradient; 0 for no clipping
    config.weight_decay = 0.0  # decoupled, on matrices: adamw
    # For these names alone; others have arguments of their own in `options`.
    config.b1 = 0.9  # first moment: adam, adamw; momentum: sgd, rmsprop
    config.b2 = 0.999  # second moment: adam, adamw; decay: rmsprop
    config.eps = 1e-8  # adam, adamw, rmsprop
    config.ema = 0.0  # decay per update of an average of the parameters, for evaluation; 0: none
    return config


def validate(config: ml_collections.ConfigDict, steps: int) -> None:
    """Validate the section `optim` of a config for a run of `steps` updates.

    Raises:
      UserError: if a value contradicts another value, or does not suit the run.
    """
    if config.warmup_steps >= steps:
        raise UserError(
            f'config.optim.warmup_steps = {config.warmup_steps}: expected fewer than the {steps} '
            f'updates of the run. Try -1, which warms up for at most a quarter of the run'
        )
    is_imported = config.name not in OPTIMIZERS
    if config.weight_decay and (is_imported or config.name in WITHOUT_DECAY):
        advice = "config.optim.name = 'adamw'"
        if is_imported:
            advice += ', or set weight_decay in config.optim.options'
        raise UserError(
            f'config.optim.weight_decay = {config.weight_decay}: expected 0, because '
            f'config.optim.name = {config.name!r} does not use this key. Try {advice}'
        )
    if is_imported:
        _check_imported(config, steps)
    else:
        _check_options(config, {})
    if config.ema and averaging.is_schedule_free(get_state_shapes(config, steps)):
        raise UserError(
            f'config.optim.ema = {config.ema}: expected 0, because config.optim.name = '
            f'{config.name!r} averages the parameters itself. Try config.optim.ema = 0, or '
            f"config.optim.name = 'adamw'"
        )


def _check_imported(config: ml_collections.ConfigDict, steps: int) -> None:
    """Check the options of an imported optimizer, and that its update only needs gradients.

    Raises:
      UserError: if an option is unknown, missing or of the wrong type, or if the update needs more
        than gradients and parameters.
    """
    # The options, by the arguments of the function; the learning rate is a config key of its own.
    name, options = config.name, get_options(config, 'options')
    constructor = import_object(name)
    defaults = _get_defaults(constructor)
    del defaults['learning_rate']
    _check_options(config, defaults)
    missing = set(_list_required(constructor)) - {'learning_rate', *options}
    if missing:
        raise UserError(
            f'config.optim.options: expected values for {" and ".join(sorted(missing))}, because '
            f'{name!r} has no defaults for them. Try setting them in --config.optim.options'
        )

    # What the update needs beside gradients, state and parameters.
    optimizer = constructor(learning_rate=schedule(config, steps), **options)
    needed = set(_list_required(optimizer.update)[2:]) - {'params'}
    if needed:
        raise UserError(
            f'config.optim.name = {name!r}: expected an optimizer that only needs gradients and '
            f'parameters, but its update also needs {", ".join(sorted(needed))}. Try '
            f"'optax:lion' or 'optax.contrib:muon'"
        )
    params = {'kernel': jnp.zeros((2, 2))}
    try:
        jax.eval_shape(lambda: optimizer.update(params, optimizer.init(params), params))
    except (TypeError, ValueError) as error:
        raise UserError(
            f'config.optim.name = {name!r}: expected an optimizer that only needs gradients and '
            f"parameters ({format_error(error)}). Try 'optax:lion' or 'optax.contrib:muon'"
        ) from error


def _check_options(config: ml_collections.ConfigDict, defaults: Options) -> None:
    """Raise UserError for an option that the optimizer does not have, or of the wrong type."""
    with name_config_keys({'options': 'config.optim.options'}):
        check_options(config.name, get_options(config, 'options'), defaults)


def get_state_shapes(config: ml_collections.ConfigDict, steps: int) -> optax.OptState:
    """Return the shapes of the optimizer state for one matrix, to inspect its structure."""
    matrix = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    return jax.eval_shape(make_optimizer(config, steps).init, {'kernel': matrix})


def warmup_steps(config: ml_collections.ConfigDict, steps: int) -> int:
    """Return the number of warm-up steps in a run of `steps` updates."""
    return min(100, steps // 4) if config.warmup_steps < 0 else config.warmup_steps


def schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Return the learning-rate schedule: linear warm-up, then the decay that the config names.

    The warm-up rises from peak / warmup at step 0 to the peak at step `warmup`. The decay reaches
    `final_scale` times the peak at the last step, steps − 1, if it is cosine or linear.
    """
    peak_rate, warmup = config.learning_rate, warmup_steps(config, steps)
    decay_steps = max(1, steps - 1 - warmup)
    decay_schedule = SCHEDULES[config.schedule](peak_rate, decay_steps, warmup, config.final_scale)
    if warmup == 0:
        return decay_schedule
    warmup_schedule = optax.linear_schedule(peak_rate / warmup, peak_rate, warmup)
    return optax.join_schedules([warmup_schedule, decay_schedule], [warmup])


def compute_learning_rates(config: ml_collections.ConfigDict, steps: int) -> Array:
    """Compute the learning rate of each update in a run of `steps` updates, f32 [steps]."""
    return jax.jit(jax.vmap(schedule(config, steps)))(jnp.arange(steps))


def make_optimizer(
    config: ml_collections.ConfigDict, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer for a run of `steps` updates, with gradient clipping and the `ema`.

    RMSProp follows TensorFlow: ε is inside the square root, and the mean square starts at one. The
    update takes an optional argument `learning_rates`, f32 [steps], which replaces the schedule,
    see `with_learning_rates`.
    """
    optimizer = _chain(config, schedule(config, steps))

    def update(
        grads: chex.ArrayTree,
        state: optax.OptState,
        params: chex.ArrayTree | None = None,
        *,
        learning_rates: Array | None = None,
        **extra_args: object,
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        if learning_rates is None:
            return optimizer.update(grads, state, params)
        rates: Array = learning_rates
        return _chain(config, lambda step: jnp.take(rates, step, mode='clip')).update(
            grads, state, params
        )

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def with_learning_rates(
    optimizer: optax.GradientTransformation, learning_rates: Array
) -> optax.GradientTransformation:
    """Return an optimizer with the given learning rates in place of its schedule.

    If the learning rates are an argument of a compiled program, the program works for every
    schedule, so that the members of a sweep can share it.

    Args:
      optimizer: optimizer from `make_optimizer`.
      learning_rates: learning rate of each update, f32 [steps], as from `compute_learning_rates`.
    """
    update = functools.partial(optimizer.update, learning_rates=learning_rates)
    return optax.GradientTransformation(optimizer.init, update)


def _chain(
    config: ml_collections.ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Chain clipping and the named optimizer, and average the parameters if `ema` is set."""
    transforms: list[optax.GradientTransformation] = []
    if config.clip_norm > 0:
        transforms.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name in OPTIMIZERS:
        transforms.append(OPTIMIZERS[config.name](config, learning_rate))
    else:
        options = get_options(config, 'options')
        transforms.append(import_object(config.name)(learning_rate=learning_rate, **options))
    optimizer = optax.chain(*transforms)
    return averaging.average_params(optimizer, config.ema) if config.ema else optimizer


def _get_defaults(function: Callable[..., object]) -> dict[str, object]:
    """Map each argument of a function to its default, or None if it has none."""
    return {
        argument.name: None if argument.default is argument.empty else argument.default
        for argument in inspect.signature(function).parameters.values()
    }


def _list_required(function: Callable[..., object]) -> list[str]:
    """List the required arguments of a function."""
    return [
        argument.name
        for argument in inspect.signature(function).parameters.values()
        if argument.default is argument.empty
        and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    ]


def _is_matrix(params: chex.ArrayTree) -> chex.ArrayTree:
    """Return a mask of the leaves to which weight decay applies: all but biases and scales.

    The biases u and v of relative attention have two axes, [heads, d], and are excluded by name.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and getattr(path[-1], 'key', None) not in ('u', 'v'),
        params,
    )
