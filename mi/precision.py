"""How precise products of f32 are: 'default' is that of the device, 'highest' is f32 everywhere.

============  ====================================  ==============  ======
precision     TPU                                   NVIDIA          CPU
============  ====================================  ==============  ======
`default`     one pass in bf16: 8 bits              TF32: 11 bits   f32
`high`        three passes in bf16: about 16 bits   TF32            f32
`highest`     six passes in bf16: f32, 24 bits      f32             f32
============  ====================================  ==============  ======

Sums are in f32 in all of them. Products of bf16 inputs are exact already and stay as they are.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import ml_collections

PRECISIONS = ('default', 'high', 'highest')

_Function = TypeVar('_Function', bound=Callable[..., Any])


@contextlib.contextmanager
def use_config(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Trace with the precision that `config.train.matmul_precision` sets.

    It holds for what this thread traces and lowers. 'default', or a config without the key, leaves
    the setting of JAX as it is, which JAX_DEFAULT_MATMUL_PRECISION may have changed.
    """
    precision = config.get('train', {}).get('matmul_precision', 'default')
    if precision == 'default':
        yield
    else:
        with jax.default_matmul_precision(precision):
            yield


def get_current() -> str | None:
    """Return the precision that this thread traces with, None for JAX's default."""
    precision: str | None = getattr(jax.config, 'jax_default_matmul_precision')  # noqa: B009
    return precision


def use_highest(function: _Function) -> _Function:
    """Return the function with every product in it as precise as f32, on every device."""

    @functools.wraps(function)
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision('highest'):
            return function(*args, **kwargs)

    return precise  # type: ignore[return-value]
