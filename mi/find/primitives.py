"""Groups of primitives by their effect on a value, and helpers for the parameters of equations."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from mi.find.values import Value

Axes = tuple[int, ...]

# A primitive that is in no table and has no rule of its own is a nonlinear function.
IDENTITIES = {
    *('convert_element_type', 'copy', 'copy_p', 'stop_gradient', 'reduce_precision'),
    *('real', 'imag', 'conj'),
    *('device_put', 'sharding_constraint', 'name', 'pvary', 'reshard', 'optimization_barrier'),
    *('layout_constraint', 'pcast', 'multiple_of'),
}
RESHAPES = {'reshape', 'transpose', 'broadcast_in_dim', 'squeeze', 'expand_dims', 'rev'}
SLICES = {'slice', 'split', 'dynamic_slice', 'pad', 'unstack'}
SUMS = {
    *('reduce_sum', 'cumsum', 'reduce_window_sum'),
    *('psum', 'psum_invariant', 'psum_scatter', 'reduce_scatter', 'pmean'),
}
REDUCTIONS = {
    *('reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'pmax', 'pmin'),
    *('cummax', 'cummin', 'cumlogsumexp', 'reduce_window_max', 'reduce_window_min'),
}
REDUCTION_PRODUCTS = {'reduce_prod', 'cumprod'}
REDUCERS = {'reduce', 'reduce_window'}  # with a function of their own
SCALED = {'scaled_matmul', 'scaled_matmul_wrapper'}
MOVES = {'ppermute', 'pshuffle', 'all_to_all', 'all_gather', 'all_gather_invariant', 'pbroadcast'}
CHOICES = {'top_k', 'sort', 'argmax', 'argmin', 'approx_top_k'}
SELECTIONS = {'select_n', 'max', 'min', 'clamp', 'atan2', 'rem', 'nextafter'}
COMPARISONS = {'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'is_finite', 'and', 'or', 'not', 'xor'}
SCATTERS = {'scatter', 'scatter-add', 'scatter_add', 'dynamic_update_slice'}
NOISE = {
    *('random_bits', 'random_wrap', 'random_unwrap', 'random_split', 'random_fold_in'),
    *('random_seed', 'random_gamma', 'random_clone', 'threefry2x32', 'rng_bit_generator'),
}
ACCESSES = {'get', 'swap', 'addupdate', 'new_ref', 'empty_ref', 'freeze', 'free_ref'}
OPAQUE = {'pure_callback', 'io_callback', 'ffi_call', 'custom_partitioning'}
FREE = {*IDENTITIES, *RESHAPES, *SLICES, *SCATTERS, *MOVES, 'gather', 'concatenate', 'iota'}
"""Primitives without FLOPs."""

LIBRARIES = ('/jax/', '/jaxlib/', '/flax/', '/haiku/', '/equinox/', '/mi/find/', '/contextlib.py')


def get_shape(var: Any) -> tuple[int, ...]:
    """Return the shape of a jaxpr's variable, or () for a token."""
    return tuple(getattr(var.aval, 'shape', ()))


def is_integer(var: Any) -> bool:
    """Return whether a jaxpr's variable holds integers."""
    return 'int' in str(getattr(var.aval, 'dtype', ''))


def is_boolean(var: Any) -> bool:
    """Return whether a jaxpr's variable holds booleans."""
    return str(getattr(var.aval, 'dtype', '')) == 'bool'


def is_product(name: str) -> bool:
    """Return whether a primitive contracts axes of two operands."""
    return 'dot' in name or name in SCALED


def find_line(eqn: core.JaxprEqn) -> str:
    """Return 'file.py:12', the innermost source line outside of JAX and module libraries."""
    traceback = eqn.source_info.traceback
    frames: Sequence[Any] = traceback.frames if traceback is not None else ()
    for frame in frames:
        if frame.file_name.startswith('<') or any(part in frame.file_name for part in LIBRARIES):
            continue
        return f'{frame.file_name}:{frame.line_num}'
    return ''


def find_jaxpr(eqn: core.JaxprEqn) -> core.ClosedJaxpr | core.Jaxpr | None:
    """Return the jaxpr that an equation calls, or None if it does not call one."""
    for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
        inner = eqn.params.get(name)
        if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
            return inner
    return None


def open_jaxpr(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> core.Jaxpr:
    """Return a jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def count_devices(eqn: core.JaxprEqn) -> int:
    """Return the number of devices that a shard_map divides its arrays among."""
    mesh = eqn.params['mesh']
    axes = eqn.params.get('manual_axes', mesh.axis_names)
    return math.prod(mesh.shape[axis] for axis in axes)


def count_scan_inputs(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Return the numbers of constants and of carried arrays among a scan's inputs."""
    if 'num_carry' in eqn.params:
        return eqn.params['num_consts'], eqn.params['num_carry']
    consts, carry, *_ = eqn.params['ft_in'].unpack()  # jax 0.12
    return len(list(consts)), len(list(carry))


def get_dimension_numbers(
    eqn: core.JaxprEqn, left: Value, right: Value
) -> tuple[tuple[Axes, Axes], tuple[Axes, Axes]]:
    """Return the contracted axes and the batch axes of both sides of a product."""
    numbers = eqn.params.get('dimension_numbers')
    if numbers is None:
        numbers = eqn.params.get('ragged_dot_dimension_numbers')
        numbers = getattr(numbers, 'dot_dimension_numbers', numbers)
    if eqn.primitive.name in SCALED:  # [B, M, K] · [B, N, K]
        return ((2,), (2,)), ((0,), (0,))
    if numbers is None:  # the last axis of the left, and the last but one of the right
        numbers = (((len(left.shape) - 1,), (max(0, len(right.shape) - 2),)), ((), ()))
    (left_axes, right_axes), (left_batch, right_batch) = numbers
    return (tuple(left_axes), tuple(right_axes)), (tuple(left_batch), tuple(right_batch))


def count_flops(eqn: core.JaxprEqn, inputs: Sequence[Value], shape: tuple[int, ...]) -> int:
    """Count two FLOPs per multiply-add of a product, and one per entry of any other result."""
    name, size = eqn.primitive.name, math.prod(shape)
    if name == 'conv_general_dilated':
        kernel_shape = inputs[1].shape
        num_outputs = kernel_shape[eqn.params['dimension_numbers'].rhs_spec[0]]
        return 2 * size * math.prod(kernel_shape) // max(1, num_outputs)
    if is_product(name) and len(inputs) > 1:
        (left_axes, _), _ = get_dimension_numbers(eqn, inputs[0], inputs[1])
        return 2 * size * math.prod(inputs[0].shape[axis] for axis in left_axes)
    if name == 'triangular_solve':  # one multiplication with sum per entry of half the matrix
        return size * inputs[0].shape[-1]
    if name.startswith('reduce') and inputs:
        return math.prod(inputs[0].shape)
    return size
