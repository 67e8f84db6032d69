"""Time and memory of a ten-line MI layer, compared with `mi.MultiplicativeInteraction`.

    pip install -e '.[train]' && taskset -c 0 python -m benchmarks.appendix_b

In the ten lines, two linear maps of z generate W'(z) and b'(z), and W'(z) multiplies x. Both layers
compute the same function of the same parameters in f32. See docs/appendix_b.md for the mapping. The
pass 'f' is the forward pass. 'fb' adds the gradients of all parameters, of x, and of z unless it is
an id.

A time is the CPU time of the fastest call, summed over cores, because other work on the machine
affects it least. The layers take turns in one process. Memory is the size of the temporary arrays
in the compiled program (XLA's buffer assignment), so it does not vary between runs.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import mi
from benchmarks import options
from mi.training import host

NUM_ROUNDS = 5
MIN_SECONDS = 0.1  # CPU seconds of a turn


class SimpleMI(nn.Module):
    """The layer with generated weights, y = W'(z) x + b'(z)."""

    features: int

    @nn.compact
    def __call__(self, x, z):
        n, k = x.shape[-1], self.features
        W = nn.Dense(n * k, name='W')(z).reshape(*z.shape[:-1], n, k)  # W'(z) = zᵀW + V
        b = nn.Dense(k, name='b')(z)  # b'(z) = zᵀU + b
        return jnp.einsum('...n,...nk->...k', x, W) + b


class Regime(NamedTuple):
    """The shapes of a comparison.

    Attributes:
      title: description of the contexts.
      x, z: leading axes of x and z.
      n, m, k: numbers of features of x, z and y.
      ids: whether the contexts are ids of m one-hot vectors.
    """

    title: str
    x: tuple[int, ...]
    z: tuple[int, ...]
    n: int = 128
    m: int = 32
    k: int = 128
    ids: bool = False


REGIMES = (
    Regime('a context per row, 256 rows', (256,), (256,)),
    Regime('a context per row, 4,096 rows', (4096,), (4096,)),
    Regime('one context for 20 steps, 64 sequences', (64, 20), (64, 1)),
    Regime('one input for 20 contexts, 64 inputs', (64, 1), (64, 20)),
    Regime('ids of 32 contexts, 4,096 rows', (4096,), (4096,), ids=True),
)


class Figures(NamedTuple):
    """CPU time of the fastest call in milliseconds, and size of its temporary arrays in MiB."""

    milliseconds: float
    mebibytes: float


def map_params(params: dict[str, dict[str, Array]], n: int, k: int) -> dict[str, Array]:
    """Map the parameters of the ten lines to those of `mi.MultiplicativeInteraction`."""
    return {
        'W': params['W']['kernel'].reshape(-1, n, k),
        'U': params['b']['kernel'],
        'V': params['W']['bias'].reshape(n, k),
        'b': params['b']['bias'],
    }


def make_sides(regime: Regime) -> dict[str, tuple[Callable[..., Array], tuple[Any, ...]]]:
    """Return name → function of (parameters, x, z) and its arguments, for both layers."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*regime.x, regime.n))
    z = jax.random.normal(keys[1], (*regime.z, regime.m))
    ids = jax.random.randint(keys[1], regime.z, 0, regime.m)
    if regime.ids:
        z = jax.nn.one_hot(ids, regime.m)
    simple = SimpleMI(regime.k)
    context = {'context': 'one_hot', 'contexts': regime.m} if regime.ids else {}
    ours = mi.MultiplicativeInteraction(regime.k, **context)
    params = simple.init(keys[2], x[:1], z[:1])['params']
    mapped = map_params(params, regime.n, regime.k)
    return {
        'ten lines': (lambda params, x, z: simple.apply({'params': params}, x, z), (params, x, z)),
        'mi': (
            lambda params, x, z: ours.apply({'params': params}, x, z),
            (mapped, x, ids if regime.ids else z),
        ),
    }


def compile_pass(
    function: Callable[..., Array], arguments: tuple[Any, ...], has_gradient: bool
) -> jax.stages.Compiled:
    """Compile the forward pass, or the value and gradients of Σ y² for all float arguments."""
    if not has_gradient:
        return jax.jit(function).lower(*arguments).compile()
    argnums = [i for i, argument in enumerate(arguments) if _is_float(argument)]

    def loss(*arguments: Any) -> Array:
        return jnp.sum(function(*arguments) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums)).lower(*arguments).compile()


def _is_float(tree: Any) -> bool:
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(tree))


def measure(regime: Regime, has_gradient: bool) -> dict[str, Figures]:
    """Return name → time and memory for both layers, which take turns."""
    calls: dict[str, Callable[[], object]] = {}
    mebibytes: dict[str, float] = {}
    for side, (function, arguments) in make_sides(regime).items():
        compiled = compile_pass(function, arguments, has_gradient)
        calls[side] = functools.partial(_call_and_wait, compiled, arguments)
        mebibytes[side] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        calls[side]()

    # Take turns.
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(NUM_ROUNDS):
        for side, call in calls.items():
            seconds[side] = min(seconds[side], _time_turn(call))
    return {side: Figures(1000 * seconds[side], mebibytes[side]) for side in calls}


def _call_and_wait(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> object:
    return jax.block_until_ready(compiled(*arguments))


def _time_turn(call: Callable[[], object]) -> float:
    """Return the CPU time of the fastest call in a turn, in seconds."""
    fastest, end_time = math.inf, time.process_time() + MIN_SECONDS
    while fastest == math.inf or time.process_time() < end_time:
        start_time = time.process_time()
        call()
        fastest = min(fastest, time.process_time() - start_time)
    return fastest


def main(argv: Sequence[str]) -> None:
    """Measure all regimes and print the table."""
    del argv
    host.set_xla_flags()
    print(f'{host.describe_machine()}, jax {jax.__version__}, f32.\n')
    print('| contexts | pass | ten lines, ms | ours, ms | faster | ten lines, MiB | ours, MiB |')
    print('| --- | --- | ---: | ---: | ---: | ---: | ---: |')
    for regime in REGIMES:
        for phase in ('f', 'fb'):
            simple, ours = measure(regime, phase == 'fb').values()
            times = [f'{simple.milliseconds:.2f}', f'{ours.milliseconds:.2f}']
            ratio = f'{simple.milliseconds / ours.milliseconds:.1f}×'
            memory = [f'{simple.mebibytes:,.1f}', f'{ours.mebibytes:,.1f}']
            print(f'| {" | ".join([regime.title, phase, *times, ratio, *memory])} |', flush=True)


if __name__ == '__main__':
    options.run(main)
