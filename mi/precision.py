"""The precision of f32 products: 'default' depends on the device, 'highest' is f32 everywhere.

============  ====================================  ==============  ======
precision     TPU                                   NVIDIA          CPU
============  ====================================  ==============  ======
`default`     one pass in bf16: 8 bits              TF32: 11 bits   f32
`high`        three passes in bf16: about 16 bits   TF32            f32
`highest`     six passes in bf16: f32, 24 bits      f32             f32
============  ====================================  ==============  ======

Sums are in f32 at every precision. Products of bf16 inputs are exact at every precision.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import jax

if TYPE_CHECKING:
    import ml_collections

PRECISIONS = ('default', 'high', 'highest')

_Arguments = ParamSpec('_Arguments')
_Result = TypeVar('_Result')


@contextlib.contextmanager
def use_config(config: 'ml_collections.ConfigDict') -> Iterator[None]:
    """Set the precision of matrix products to `config.train.matmul_precision`.

    The setting applies to programs that this thread traces and lowers while the context is open.
    'default', or a config without the key, keeps JAX's setting, which the environment variable
    JAX_DEFAULT_MATMUL_PRECISION may have changed.
    """
    has_precision = 'train' in config and 'matmul_precision' in config.train
    if has_precision and config.train.matmul_precision != 'default':
        with jax.default_matmul_precision(config.train.matmul_precision):
            yield
    else:
        yield


def get_current() -> str | None:
    """Return the matmul precision of this thread, or None for JAX's default."""
    precision: str | None = getattr(jax.config, 'jax_default_matmul_precision')  # noqa: B009
    return precision


def use_highest(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function so that its matrix products have f32 precision on every device."""

    @functools.wraps(function)
    def precise_function(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with jax.default_matmul_precision('highest'):
            return function(*args, **kwargs)

    return precise_function
