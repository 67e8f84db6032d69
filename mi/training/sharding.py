"""Sharding of a run over devices and processes, on a mesh with three axes.

    seed   seeds of a run, which never communicate
    data   rows of a batch
    fsdp   rows of a batch, and large parameters with their optimizer state

The step of a trainer runs under `jax.shard_map`, so that each device computes its own seeds and
rows. All communication is explicit: the reductions of `mi.rows`, and the collectives of
`gather_params` and `mean_gradients`. The automatic partitioner never sees a batch, because it would
gather the full batch wherever [T, B] is flattened. All processes run the same program with the same
config. Only the primary process writes to the run directory.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import chex
import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mi.config import ArgumentError, UserError
from mi.rows import ROWS, mean_over_rows
from mi.training import progress

Tree = TypeVar('Tree')  # a pytree of arrays
Shardings = Any  # a pytree of `NamedSharding`s
Specs = Any  # a pytree of `PartitionSpec`s, None if 'fsdp' shards nothing

HEARTBEAT_SECONDS = 30  # a process that is silent for longer ends the others
AXES = ('seed', 'data', 'fsdp')
MIN_FSDP_SIZE = 2**12  # entries; smaller arrays are replicated over 'fsdp'


def initialize(distributed: str) -> None:
    """Connect this process to the other processes of its run.

    Call this function before any function of JAX.

    Args:
      distributed: '' for a single process; 'auto' if JAX can detect the other processes (Slurm,
        Open MPI, Kubernetes, TPU); otherwise 'HOST:PORT,COUNT,INDEX' with the address of process 0.

    Raises:
      UserError: if `distributed` does not have one of these forms.
    """
    if not distributed:
        return
    if distributed == 'auto':
        with progress.Work('waiting for the other processes'):
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    address_match = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', distributed)
    if address_match is None or int(address_match[3]) >= int(address_match[2]):
        raise UserError(
            f"--distributed={distributed}: expected 'auto', or 'HOST:PORT,COUNT,INDEX' with INDEX "
            f'from 0 to COUNT - 1'
        )
    with progress.Work('waiting for the other processes'):
        jax.distributed.initialize(
            address_match[1],
            int(address_match[2]),
            int(address_match[3]),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def is_primary() -> bool:
    """Return whether this process is the primary one, which writes to the run directory."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier `name`."""
    with progress.Work(f'waiting for the other processes: {name}'):
        multihost_utils.sync_global_devices(name)


def any_process(flags: bool | np.ndarray) -> np.ndarray:
    """Return which flags are set in any process. All processes must call this function."""
    if jax.process_count() == 1:
        return np.asarray(flags)
    gathered_flags: np.ndarray = multihost_utils.process_allgather(np.asarray(flags)[None])
    return np.asarray(gathered_flags.reshape(-1, *np.shape(flags)).any(0))


def sum_over_processes(number: int) -> int:
    """Return the sum of a number over all processes, which must all call this function."""
    if jax.process_count() == 1:
        return number
    return int(np.sum(multihost_utils.process_allgather(np.asarray(number))))


def broadcast_from_primary(number: int) -> int:
    """Return the number of the primary process. All processes must call this function."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def compile_fast(
    function: Callable[..., object], *args: object, level: int = 0, **options: Any
) -> jax.stages.Compiled:
    """Compile a function that runs once or briefly, at a low optimization level.

    Args:
      function: function to compile.
      *args: arguments of the function, or their shapes.
      level: optimization level on CPU, from 0 to 3, the default of XLA. Loops run as fast at level
        1 as at level 3.
      **options: options of `jax.jit`.
    """
    compiler_options: dict[str, str | bool] = {}
    if jax.default_backend() == 'cpu':
        compiler_options['xla_backend_optimization_level'] = str(level)
    return jax.jit(function, **options).lower(*args).compile(compiler_options=compiler_options)


def jit_once(function: Callable[..., Tree], *args: object, out_shardings: Shardings = None) -> Tree:
    """Call a function that runs once, compiled at a low optimization level."""
    return compile_fast(function, *args, out_shardings=out_shardings)(*args)


def make_mesh(
    num_seeds: int,
    batch_size: int,
    fsdp: int = 1,
    shape: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Create a mesh [seed, data, fsdp] of as many devices as can divide the work evenly.

    Among the meshes with the most devices, the one with the largest axis 'seed' is chosen, because
    seeds need no communication.

    Args:
      num_seeds: number of seeds that train simultaneously.
      batch_size: number of rows in the batch of one seed.
      fsdp: number of devices that share one copy of the parameters, reduced if there are fewer
        devices.
      shape: sizes of all three axes, or () to choose them automatically.
      devices: devices to use, or None for all available devices.

    Raises:
      ArgumentError: if the devices cannot divide the work, or if a run of several processes would
        leave devices idle.
    """
    # Several processes have to use all devices, because each one runs the program.
    devices = jax.devices() if devices is None else devices
    shape = choose_mesh_shape(num_seeds, batch_size, fsdp, shape, len(devices))
    num_used = math.prod(shape)
    if num_used < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ArgumentError(
            f'`batch_size` = {batch_size}: expected several processes to use all {len(devices)} '
            f'devices, but with {num_seeds} seeds and the mesh {shape} they use {num_used}. Try a '
            f'multiple of {len(devices)}, and () for `shape`'
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=tuple(devices)[:num_used]
    )


def choose_mesh_shape(
    num_seeds: int, batch_size: int, fsdp: int, shape: Sequence[int], num_devices: int
) -> tuple[int, ...]:
    """Return the mesh shape of `make_mesh` for a hypothetical number of devices.

    Raises:
      ArgumentError: if the devices cannot divide the work.
    """
    if not shape:
        return _choose_largest_shape(num_seeds, batch_size, fsdp, num_devices)
    shape = tuple(shape)
    setting = f'`shape` = {shape}'
    if math.prod(shape) > num_devices:
        raise ArgumentError(
            f'{setting}: expected a product of at most {num_devices}, the number of devices'
        )
    if num_seeds % shape[0]:
        raise ArgumentError(
            f'{setting}: expected the first entry to divide the number of seeds, {num_seeds}'
        )
    if batch_size % (shape[1] * shape[2]):
        raise ArgumentError(
            f'{setting}: expected the product of the last two entries to divide '
            f'`batch_size` = {batch_size}'
        )
    return shape


def _choose_largest_shape(
    num_seeds: int, batch_size: int, fsdp: int, num_devices: int
) -> tuple[int, int, int]:
    setting = f'`fsdp` = {fsdp}'
    if num_devices < fsdp:
        fsdp = math.gcd(fsdp, num_devices)
        setting += f', reduced to {fsdp} for {num_devices} devices'
    if batch_size % fsdp:
        raise ArgumentError(f'{setting}: expected a divisor of `batch_size` = {batch_size}')

    def fill(seed_shards: int) -> tuple[int, int, int]:
        max_data = num_devices // (seed_shards * fsdp)
        data_shards = max(n for n in range(1, max_data + 1) if batch_size % (n * fsdp) == 0)
        return seed_shards, data_shards, fsdp

    max_seed_shards = min(num_seeds, num_devices // fsdp)
    shapes = [fill(n) for n in range(1, max_seed_shards + 1) if num_seeds % n == 0]
    return max(shapes, key=lambda shape: (math.prod(shape), shape[0]))


def platform(mesh: Mesh) -> str:
    """Return the platform of a mesh's devices: 'cpu', 'gpu' or 'tpu'."""
    platform_name: str = mesh.devices.flat[0].platform
    return 'gpu' if platform_name in ('cuda', 'rocm') else platform_name


def is_synchronous(mesh: Mesh) -> bool:
    """Return whether a program must end before the next one starts.

    On several CPU devices, programs that are queued deadlock.
    """
    return platform(mesh) == 'cpu' and mesh.size > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def seed_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [S, …] over 'seed'."""
    return NamedSharding(mesh, PartitionSpec('seed'))


def metrics_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of metrics [S] that every process can read."""
    return replicated(mesh) if mesh.is_multi_process else seed_sharding(mesh)


def batch_sharding(mesh: Mesh, axis: int, has_seeds: bool = False) -> NamedSharding:
    """Return the sharding of arrays […, B, …] over the rows of the batch.

    Args:
      mesh: mesh from `make_mesh`.
      axis: index of the axis B.
      has_seeds: whether axis 0 is the axis of seeds, sharded over 'seed'.
    """
    seed_axis = ('seed',) if has_seeds else ()
    return NamedSharding(mesh, PartitionSpec(*seed_axis, *[None] * (axis - len(seed_axis)), ROWS))


def fsdp_sharding(tree: chex.ArrayTree, mesh: Mesh) -> Shardings:
    """Return the sharding of each parameter [S, …]: over 'seed', and over 'fsdp' if it is large.

    The longest axis that is divisible by the size of 'fsdp' is sharded over 'fsdp'.

    Args:
      tree: parameters of all seeds, or their shapes.
      mesh: mesh from `make_mesh`.
    """
    num_shards = mesh.shape['fsdp']

    def choose_sharding(array: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        divisible_axes = [
            axis for axis in range(1, len(array.shape)) if array.shape[axis] % num_shards == 0
        ]
        if num_shards == 1 or not divisible_axes or math.prod(array.shape[1:]) < MIN_FSDP_SIZE:
            return seed_sharding(mesh)
        longest_axis = max(divisible_axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec('seed', *[None] * (longest_axis - 1), 'fsdp'))

    return jax.tree.map(choose_sharding, tree)


def partition_specs(shardings: Shardings) -> Specs:
    """Return the `PartitionSpec` of each sharding, array or shape in a tree."""

    def spec(leaf: NamedSharding | Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        sharding = leaf if isinstance(leaf, NamedSharding) else leaf.sharding
        assert isinstance(sharding, NamedSharding)
        return sharding.spec

    return jax.tree.map(spec, shardings)


def fsdp_specs(params: chex.ArrayTree, mesh: Mesh) -> Specs:
    """Return the specs of parameters [S, …] for `gather_params`, or None without 'fsdp'."""
    return None if mesh.shape['fsdp'] == 1 else partition_specs(fsdp_sharding(params, mesh))


def map_seeds(function: Callable[..., Tree], mesh: Mesh) -> Callable[..., Tree]:
    """Map a function of one seed over the seeds of a device, [S, …].

    On CPU, the result loops over the seeds, because the products of one seed keep all cores busy
    and batched products are slower. On other platforms, it uses `jax.vmap`.
    """
    if platform(mesh) == 'cpu':
        return lambda *args: jax.lax.map(lambda row: function(*row), args)
    return jax.vmap(function)


def gather_params(params: Tree, partition: Specs) -> Tree:
    """Gather the full parameters of one seed from their shards over 'fsdp'.

    The gradient is a reduce-scatter: the sum over 'fsdp', sharded like the parameters. Gathered
    parameters stay in memory until the backward pass has used them. Gathering them again in the
    backward pass, with `jax.checkpoint`, would make XLA materialize z ⊗ x on TPU.

    Args:
      params: shards of one seed's parameters on this device.
      partition: `PartitionSpec` of each array [S, …], from `fsdp_specs`, or None if no array is
        sharded over 'fsdp'.
    """
    if partition is None:
        return params

    def gather(array: Array, spec: PartitionSpec) -> Array:
        if 'fsdp' not in spec:
            return array
        axis = spec.index('fsdp') - 1
        return jax.lax.all_gather(array, 'fsdp', axis=axis, tiled=True)

    return jax.tree.map(gather, params, partition)


def mean_gradients(gradients: Tree, partition: Specs) -> Tree:
    """Average gradients over the devices that share a batch.

    Args:
      gradients: gradients with respect to the `params` of `gather_params`.
      partition: the partition passed to `gather_params`.
    """
    if partition is None:
        return mean_over_rows(gradients)

    def mean(gradient: Array, spec: PartitionSpec) -> Array:
        if 'fsdp' not in spec:
            return mean_over_rows(gradient)
        num_copies, num_shards = jax.lax.axis_size('data'), jax.lax.axis_size('fsdp')
        if num_copies > 1:
            gradient = jax.lax.psum(gradient, 'data')
        return gradient / (num_copies * num_shards)  # the reduce-scatter summed over 'fsdp'

    return jax.tree.map(mean, gradients, partition)


def with_shardings(shapes: Tree, shardings: Shardings) -> Tree:
    """Return `jax.ShapeDtypeStruct`s with these shapes and shardings."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shard_array(array: np.ndarray, sharding: NamedSharding) -> Array:
    """Shard a host array. Every process passes the full array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shard_batch(tree: Tree, mesh: Mesh, axis: int) -> Tree:
    """Shard arrays over the rows along `axis`. Each process passes its own rows."""
    sharding = batch_sharding(mesh, axis)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), tree)


def to_local(tree: Tree) -> Tree:
    """Convert replicated arrays to arrays on one device of this process."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def to_host(tree: chex.ArrayTree) -> Any:
    """Convert arrays of any sharding to NumPy arrays. All processes must call this function."""

    def gather(array: Array) -> np.ndarray:
        if getattr(array, 'is_fully_addressable', True) or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(gather, tree)
