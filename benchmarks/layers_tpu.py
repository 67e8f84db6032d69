"""Compiler estimates for the layers on TPUs.

    pip install -e '.[sweep,tpu]' && python -m benchmarks.layers_tpu

No TPU is needed, because programs are compiled for a description of a chip and not executed. The
shapes are R1 to R6 of `benchmarks.layers` and those of the configs. Every order is compiled for the
forward pass (f), and with the gradients of all arrays (fb). The order that
`mi.kernels.bilinear.choose_order` selects is bold.

kernels   the compiler's estimate of cycles in kernels, including loops, over the chip's clock rate
bound     the compiler's `optimal_seconds`, the time at peak memory and compute speed; unknown for
          programs with loops
share     operations of the products in the cheapest order (times three for fb), divided by
          `kernels` and the chip's bf16 peak
"""

import functools
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import options
from benchmarks.layer_sides import Tensor, jax_sides
from benchmarks.regimes import REGIMES, Regime
from mi.estimate import program, topologies
from mi.kernels.bilinear import DENSE_ORDERS, ID_ORDERS, bilinear, choose_order

CHIPS = flags.DEFINE_list('tpus', ['v5e', 'v6e'], 'Kinds of TPU in mi.estimate.topologies.')
DTYPES = flags.DEFINE_list('dtypes', ['bfloat16', 'float32'], 'Types of the arrays.')
ORDERS = flags.DEFINE_list('tpu_orders', [], 'Orders of zᵀWx; all by default.')
ONLY = options.define_only('Names of regimes')

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
ArrayShape = jax.ShapeDtypeStruct
MAX_BYTES = 2**34  # a larger intermediate array does not fit


def select_regimes() -> list[Regime]:
    """Return the regimes R1 to R6, one of them with ids, and those of the configs."""
    dense = [regime for regime in REGIMES if regime.name[:2] in ('R1', 'R2', 'R3', 'R5', 'R6')]
    by_id = [regime for regime in REGIMES if regime.name == 'R4 ids random']
    return [*dense, *by_id, *PRESETS]


def select_orders(regime: Regime) -> Sequence[Any]:
    """Return the orders of a regime that fit in memory, or [None] if there is no choice."""
    if regime.form not in ('full', 'ids'):
        return [None]
    B, m, n, k = math.prod(regime.rows), regime.m, regime.n, regime.k
    largest_sizes = {  # of an intermediate array
        'x_first': B * m * k,
        'z_first': math.prod(regime.z_rows()) * n * k,
        'rows': B * n * k,
    }
    known_orders = ID_ORDERS if regime.form == 'ids' else DENSE_ORDERS
    return [
        order
        for order in known_orders
        if 4 * largest_sizes.get(order, 0) < MAX_BYTES
        and (not ORDERS.value or order in ORDERS.value)
    ]


def compile_pass(
    function: Callable[..., Tensor], has_gradient: bool, mesh: Mesh, shapes: Sequence[ArrayShape]
) -> jax.stages.Compiled:
    """Compile a function, with or without the gradients of all arrays, for a mesh.

    Args:
      function: function of all arrays.
      has_gradient: whether to compute the gradients of the floating-point arrays too.
      mesh: mesh of one chip.
      shapes: shapes of the arrays.
    """
    float_indices = [
        index for index, shape in enumerate(shapes) if jnp.issubdtype(shape.dtype, jnp.floating)
    ]

    def forward_and_gradient(
        output_grad: Tensor, *arrays: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        def call(*float_arrays: Tensor) -> Tensor:
            inputs = list(arrays)
            for index, float_array in zip(float_indices, float_arrays, strict=True):
                inputs[index] = float_array
            return function(*inputs)

        output, pull_back = jax.vjp(call, *(arrays[index] for index in float_indices))
        return output, pull_back(output_grad)

    # Place all arrays on the chip, the gradient of the output included.
    replicated = NamedSharding(mesh, PartitionSpec())
    place = functools.partial(jax.ShapeDtypeStruct, sharding=replicated)
    inputs = [place(shape.shape, shape.dtype) for shape in shapes]
    with jax.set_mesh(mesh):
        if not has_gradient:
            return jax.jit(function).lower(*inputs).compile()
        output = jax.eval_shape(function, *inputs)
        output_grad = place(output.shape, output.dtype)
        return jax.jit(forward_and_gradient).lower(output_grad, *inputs).compile()


def read_estimates(
    compiled: jax.stages.Compiled, clock: float
) -> tuple[float | None, float | None]:
    """Return the estimated seconds in kernels and at peak speed, or None where unknown."""
    try:
        analysis, hlo_text = program.analyze(compiled), compiled.as_text() or ''
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read programs of a newer libtpu
        return None, None
    has_cycles = analysis.cycles and not analysis.unknown_loops
    kernel_seconds = analysis.cycles / clock if has_cycles else None
    bound_seconds = compiled.cost_analysis()['optimal_seconds']
    has_bound = bound_seconds > 0 and ' while(' not in hlo_text
    return kernel_seconds, bound_seconds if has_bound else None


def make_function(regime: Regime, order: Any) -> tuple[Callable[..., Tensor], list[str]]:
    """Return the layer, or its product in a given order, and the names of its arrays."""
    if order is not None:
        return functools.partial(bilinear, order=order), ['x', 'z', 'W']
    layer = jax_sides(regime)['mi']
    array_names = [name for name in regime.draw_arrays() if name != 'dy']

    def call(*arrays: Tensor) -> Tensor:
        return layer(dict(zip(array_names, arrays, strict=True)))

    return call, array_names


def make_rows(regime: Regime, dtype: str, chip: str) -> Iterator[str]:
    """Yield a table row for each order and pass."""
    mesh = jax.make_mesh(
        (1,), ('data',), axis_types=(AxisType.Auto,), devices=topologies.describe(f'{chip}:1x1')[:1]
    )
    # Describe the arrays and find the planned order.
    planned_order = None
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, dtype if array.dtype.kind == 'f' else array.dtype)
        for name, array in regime.draw_arrays().items()
    }
    if regime.form in ('full', 'ids'):
        context: Literal['ids', 'dense'] = 'ids' if regime.form == 'ids' else 'dense'
        x_shape, z_shape = shapes['x'].shape, shapes['z'].shape
        planned_order = choose_order(x_shape, z_shape, regime.k, context, 'tpu', regime.m)
    for order in select_orders(regime):
        function, array_names = make_function(regime, order)
        # Compile both passes and read the estimates.
        for has_gradient in (False, True):
            inputs = [shapes[name] for name in array_names]
            compiled = compile_pass(function, has_gradient, mesh, inputs)
            kernel_seconds, bound_seconds = read_estimates(compiled, topologies.TPUS[chip].clock)
            operations = regime.count_operations() * (3 if has_gradient else 1)
            temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
            cells = [
                regime.name,
                dtype,
                chip,
                f'**{order}**' if order and order == planned_order else order or 'layer',
                'fb' if has_gradient else 'f',
                f'{1e6 * kernel_seconds:.1f}' if kernel_seconds else '–',
                f'{1e6 * bound_seconds:.1f}' if bound_seconds else '–',
                f'{operations / kernel_seconds / PEAKS[chip]:.2f}' if kernel_seconds else '–',
                f'{temporary_bytes / 1e6:.1f}',
            ]
            yield f'| {" | ".join(cells)} |'


def main(argv: Sequence[str]) -> None:
    """Print the table of all regimes, with each row as soon as it is compiled."""
    selected_names = options.select(ONLY, [regime.name for regime in select_regimes()])
    options.select(ORDERS, (*DENSE_ORDERS, *ID_ORDERS))  # refuse unknown orders
    topologies.prepare_process()
    versions = {package: importlib.metadata.version(package) for package in ('jax', 'libtpu')}
    print(f'Estimates of the compiler, nothing is executed: {versions}\n')
    print(HEADER, '|---|---|---|---|---|---:|---:|---:|---:|', sep='\n')
    for regime in select_regimes():
        # Modules of FiLM and of low rank have parameters in f32.
        dtypes = DTYPES.value if regime.form in ('full', 'ids') else ['float32']
        if regime.name not in selected_names:
            continue
        for dtype in dtypes:
            for chip in CHIPS.value:
                for table_row in make_rows(regime, dtype, chip):
                    print(table_row)
                    sys.stdout.flush()


if __name__ == '__main__':
    options.run(main)
