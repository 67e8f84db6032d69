"""Compiler estimates of the layers on TPUs. Nothing is executed.

    pip install -e '.[tpu]' && python -m benchmarks.layers_tpu

No TPU is needed: programs are compiled for one described chip. The shapes are R1 to R6 of
`benchmarks.layers` and those of the configs. Every order is compiled forward (f) and forward with
the gradients of all arrays (fb). The order of `mi.kernels.bilinear.choose_order` is bold.

kernels   cycles that the compiler estimates for its kernels, loops included, over the chip's clock
bound     the compiler's `optimal_seconds`, the time at the peaks of memory and products; programs
          with loops have none
share     operations of the products in the cheapest order, times three for fb, over `kernels` and
          the chip's bf16 peak
"""

import functools
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.layer_sides import jax_sides
from benchmarks.layers import ONLY
from benchmarks.regimes import REGIMES, Regime
from mi.estimate import program, topologies
from mi.kernels.bilinear import DENSE_ORDERS, ID_ORDERS, bilinear, choose_order

CHIPS = flags.DEFINE_list('chips', ['v5e', 'v6e'], 'Kinds of TPU in mi.estimate.topologies.')
DTYPES = flags.DEFINE_list('dtypes', ['bfloat16', 'float32'], 'Types of the arrays.')
ORDERS = flags.DEFINE_list('tpu_orders', [], 'Orders of zᵀWx; all by default.')

PEAKS = {'v4': 275e12, 'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12}  # FLOP/s in bf16
PRESETS = [
    Regime('configs/lm.py LSTM', 'full', (64, 32), 32, 128, 128),
    Regime('configs/lm.py Transformer', 'full', (32, 64), 32, 256, 256),
    Regime('configs/lm_wikitext103.py LSTM', 'full', (128, 64), 128, 512, 512),
    Regime('configs/rl.py agent', 'ids', (20, 128), 30, 135, 128, ids='random'),
]
HEADER = (
    '| shape | dtype | chip | order | pass | kernels, µs | bound, µs | share | temporaries, MB |'
)
MAX_BYTES = 2**34  # a larger intermediate array does not fit


def select_regimes() -> list[Regime]:
    """Return R1 to R6, one of them with ids, and the shapes of the configs."""
    selected = [r for r in REGIMES if r.name[:2] in ('R1', 'R2', 'R3', 'R5', 'R6')]
    return [*selected, *(r for r in REGIMES if r.name == 'R4 ids random'), *PRESETS]


def select_orders(regime: Regime) -> Sequence[Any]:
    """Return the orders of a regime that fit into memory; [None] if it has no choice."""
    if regime.form not in ('full', 'ids'):
        return [None]
    B, m, n, k = math.prod(regime.rows), regime.m, regime.n, regime.k
    sizes = {  # of the largest intermediate array
        'x_first': B * m * k,
        'z_first': math.prod(regime.z_rows()) * n * k,
        'rows': B * n * k,
    }
    known = ID_ORDERS if regime.form == 'ids' else DENSE_ORDERS
    return [
        order
        for order in known
        if 4 * sizes.get(order, 0) < MAX_BYTES and (not ORDERS.value or order in ORDERS.value)
    ]


def compile_pass(
    function: Callable[..., Any], has_gradient: bool, mesh: Mesh, arrays: Sequence[Any]
) -> jax.stages.Compiled:
    """Compile a function, alone or with the gradients of all arrays, for a mesh.

    Args:
      function: takes all arrays.
      has_gradient: compute the gradients of the floating-point arrays too.
      mesh: a mesh of one chip.
      arrays: shapes.
    """
    floats = [i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]

    def gradient(dy: Any, *arrays: Any) -> Any:
        def call(*values: Any) -> Any:
            inputs = list(arrays)
            for i, value in zip(floats, values, strict=True):
                inputs[i] = value
            return function(*inputs)

        y, pull_back = jax.vjp(call, *(arrays[i] for i in floats))
        return y, pull_back(dy)

    place = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    shapes = [place(a.shape, a.dtype) for a in arrays]
    with jax.set_mesh(mesh):
        if not has_gradient:
            return jax.jit(function).lower(*shapes).compile()
        y = jax.eval_shape(function, *shapes)
        return jax.jit(gradient).lower(place(y.shape, y.dtype), *shapes).compile()


def read_estimates(
    compiled: jax.stages.Compiled, clock: float
) -> tuple[float | None, float | None]:
    """Return the seconds in kernels and at the peaks of the chip; None where unknown."""
    try:
        analysis, text = program.analyze(compiled), compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read programs of a newer libtpu
        return None, None
    kernels = None if analysis.unknown_loops or not analysis.cycles else analysis.cycles / clock
    bound = compiled.cost_analysis()['optimal_seconds']
    return kernels, bound if bound > 0 and ' while(' not in (text or '') else None


def make_rows(regime: Regime, dtype: str, chip: str) -> Iterator[str]:
    """Yield a row of the table for each order and pass."""
    mesh = jax.make_mesh(
        (1,), ('data',), axis_types=(AxisType.Auto,), devices=topologies.describe(f'{chip}:1x1')[:1]
    )
    # Describe the arrays and find the planned order.
    planned = None
    arrays = {
        name: jax.ShapeDtypeStruct(a.shape, dtype if a.dtype.kind == 'f' else a.dtype)
        for name, a in regime.draw_arrays().items()
    }
    if regime.form in ('full', 'ids'):
        context: Any = 'ids' if regime.form == 'ids' else 'dense'
        x, z = arrays['x'].shape, arrays['z'].shape
        planned = choose_order(x, z, regime.k, context, 'tpu', regime.m)
    for order in select_orders(regime):
        # Take the layer, or its product in one order.
        if order is None:
            names = [name for name in arrays if name != 'dy']
            side = jax_sides(regime)['mi']

            def function(*values: Any, names: Any = names, side: Any = side) -> Any:
                return side(dict(zip(names, values, strict=True)))
        else:
            names, function = ['x', 'z', 'W'], functools.partial(bilinear, order=order)
        # Compile both passes and read the estimates.
        for has_gradient in (False, True):
            compiled = compile_pass(function, has_gradient, mesh, [arrays[name] for name in names])
            kernels, bound = read_estimates(compiled, topologies.TPUS[chip].clock)
            operations = regime.count_operations() * (3 if has_gradient else 1)
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            cells = [
                regime.name,
                dtype,
                chip,
                f'**{order}**' if order and order == planned else order or 'layer',
                'fb' if has_gradient else 'f',
                f'{1e6 * kernels:.1f}' if kernels else '–',
                f'{1e6 * bound:.1f}' if bound else '–',
                f'{operations / kernels / PEAKS[chip]:.2f}' if kernels else '–',
                f'{temporaries / 1e6:.1f}',
            ]
            yield f'| {" | ".join(cells)} |'


def main(argv: Sequence[str]) -> None:
    """Print the table of all regimes, a row as soon as it is compiled."""
    topologies.prepare_process()
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}
    print(f'Estimates of the compiler, nothing is executed: {versions}\n')
    print(HEADER, '|---|---|---|---|---|---:|---:|---:|---:|', sep='\n')
    for regime in select_regimes():
        # Modules of FiLM and of low rank have parameters in f32.
        dtypes = DTYPES.value if regime.form in ('full', 'ids') else ['float32']
        if ONLY.value and regime.name not in ONLY.value:
            continue
        for dtype in dtypes:
            for chip in CHIPS.value:
                for row in make_rows(regime, dtype, chip):
                    print(row)
                    sys.stdout.flush()


if __name__ == '__main__':
    app.run(main)
