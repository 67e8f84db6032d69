"""Several devices, in one process or in many, that divide the work: one mesh, three axes.

    seed   seeds of a run, which never communicate
    data   rows of a batch
    fsdp   rows of a batch, and large parameters with their optimizer state

A trainer's step runs under `jax.shard_map`: each device computes its own seeds and rows, and all
communication is a named reduction of `mi.rows` or one of the collectives of `gather_params` and
`mean_gradients`. The automatic partitioner never sees a batch, as it gathers the whole of it where
[T, B] is flattened. All processes run the same program on the same config; the first alone writes
to the run directory.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mi.config import UserError
from mi.rows import ROWS, mean_over_rows
from mi.training import progress

HEARTBEAT_SECONDS = 30  # seconds after which a process that is gone ends the others
AXES = ('seed', 'data', 'fsdp')
MIN_FSDP_SIZE = 2**12  # entries of the smallest array that 'fsdp' splits


def initialize(how: str) -> None:
    """Makes this process one of several; before anything else of jax.

    Args:
      how: '' for a process on its own; 'auto' where jax finds the others by itself (Slurm, Open
        MPI, Kubernetes, TPU); 'HOST:PORT,COUNT,INDEX' otherwise, with the address at which process
        0 listens.

    Raises:
      UserError: if it is none of these.
    """
    if not how:
        return
    if how == 'auto':
        with progress.Work('waiting for the other processes'):
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    match = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', how)
    if match is None or int(match[3]) >= int(match[2]):
        raise UserError(
            f"--distributed={how}: expected 'auto', or 'HOST:PORT,COUNT,INDEX' with INDEX from 0 "
            f'to COUNT - 1'
        )
    with progress.Work('waiting for the other processes'):
        jax.distributed.initialize(
            match[1], int(match[2]), int(match[3]), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )


def is_primary() -> bool:
    """Whether this is the process that writes; a process on its own is."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    with progress.Work(f'waiting for the other processes: {name}'):
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def sum_over_processes(number: int) -> int:
    """The sum over all processes; all have to ask."""
    if jax.process_count() == 1:
        return number
    return int(np.sum(multihost_utils.process_allgather(np.asarray(number))))


def broadcast_from_primary(number: int) -> int:
    """The number that the first process has; all have to ask."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def compile_fast(
    function: Callable[..., Any], *args: Any, level: int = 0, **options: Any
) -> jax.stages.Compiled:
    """Compile a function with little optimization, for those that run once or not for long.

    On CPU it is compiled at a level of optimization from 0 to 3, which is as much as others get. To
    compile one that draws many truncated normals takes 20 seconds at 3 and 3 at 0, and to run it no
    time at all. Level 1 takes 0.6 of the time to compile, and runs loops as fast as 3.

    Args:
      function: any.
      *args: its arguments, or their shapes.
      level: of optimization, on CPU.
      **options: of `jax.jit`.
    """
    quick: dict[str, str | bool] = {}
    if jax.default_backend() == 'cpu':
        quick['xla_backend_optimization_level'] = str(level)
    return jax.jit(function, **options).lower(*args).compile(compiler_options=quick)


def jit_once(function: Callable[..., Any], *args: Any, out_shardings: Any = None) -> Any:
    """Return the result of a function that is run this one time, as those that draw parameters."""
    return compile_fast(function, *args, out_shardings=out_shardings)(*args)


def make_mesh(
    seeds: int,
    batch: int,
    fsdp: int = 1,
    shape: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh [seed, data, fsdp] of all devices, or of as many as divide the work evenly.

    Of the meshes that use the most devices, the one with the most seeds apart is taken, as seeds
    need no communication.

    Args:
      seeds: how many are trained at once.
      batch: rows of a seed's batch.
      fsdp: devices that share one copy of the parameters, fewer where there are not as many.
      shape: `config.train.mesh`, to set all three axes; () for what is said above.
      devices: all of them if None; those of a topology's description to compile for it.

    Raises:
      UserError: if the devices cannot share the work so, or, with several processes, if some
        devices would have none.
    """
    devices = jax.devices() if devices is None else devices
    shape = choose_mesh_shape(seeds, batch, fsdp, shape, len(devices))
    count = math.prod(shape)
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f'config.train.batch = {batch} and {seeds} seeds employ {count} of {len(devices)} '
            f'devices: with several processes, expected all. Try a multiple of {len(devices)}'
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=tuple(devices)[:count]
    )


def choose_mesh_shape(
    seeds: int, batch: int, fsdp: int, shape: Sequence[int], devices: int
) -> tuple[int, ...]:
    """Return the shape of the `make_mesh` that so many devices have, without asking for any.

    Raises:
      UserError: if the devices cannot share the work so.
    """
    if not shape:
        return _largest(seeds, batch, fsdp, devices)
    shape = tuple(shape)
    key = f'config.train.mesh = {shape}'
    if math.prod(shape) > devices:
        raise UserError(f'{key}: expected a product of at most {devices}, the devices')
    if seeds % shape[0]:
        raise UserError(f'{key}: expected first a divisor of {seeds}, the number of config.seeds')
    if batch % (shape[1] * shape[2]):
        raise UserError(
            f'{key}: expected data · fsdp to divide {batch}, the rows of config.train.batch'
        )
    return shape


def _largest(seeds: int, batch: int, fsdp: int, devices: int) -> tuple[int, int, int]:
    if devices < fsdp:
        fsdp = math.gcd(fsdp, devices)
    if batch % fsdp:
        raise UserError(
            f'config.train.fsdp = {fsdp}: expected a divisor of {batch}, the rows of '
            f'config.train.batch'
        )

    def split(seed_shards: int) -> tuple[int, int, int]:
        most = devices // (seed_shards * fsdp)
        data = max(n for n in range(1, most + 1) if batch % (n * fsdp) == 0)
        return seed_shards, data, fsdp

    most_apart = min(seeds, devices // fsdp)
    shapes = [split(n) for n in range(1, most_apart + 1) if seeds % n == 0]
    return max(shapes, key=lambda shape: (math.prod(shape), shape[0]))


def platform(mesh: Mesh) -> str:
    """Return 'cpu', 'gpu' or 'tpu': what the devices of a mesh are, present or only described."""
    name: str = mesh.devices.flat[0].platform
    return 'gpu' if name in ('cuda', 'rocm') else name


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def seed_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of [S, …] whose seeds are split."""
    return NamedSharding(mesh, PartitionSpec('seed'))


def metrics_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of numbers [S] that every process reads: split by seed within one."""
    return replicated(mesh) if mesh.is_multi_process else seed_sharding(mesh)


def batch_sharding(mesh: Mesh, axis: int, has_seeds: bool = False) -> NamedSharding:
    """Return the sharding of […, B, …] whose rows, axis `axis`, are split.

    Args:
      mesh: from `make_mesh`.
      axis: that of the rows.
      has_seeds: whether axis 0 is that of the seeds, and split as well.
    """
    first = ('seed',) if has_seeds else ()
    return NamedSharding(mesh, PartitionSpec(*first, *[None] * (axis - len(first)), ROWS))


def fsdp_sharding(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of each parameter [S, …]: seeds split, large ones over 'fsdp' too.

    Of a large array the longest axis is split that 'fsdp' divides.

    Args:
      tree: arrays of all seeds, or their shapes.
      mesh: from `make_mesh`.
    """
    shards = mesh.shape['fsdp']

    def sharding(array: Any) -> NamedSharding:
        axes = [i for i in range(1, len(array.shape)) if array.shape[i] % shards == 0]
        if shards == 1 or not axes or math.prod(array.shape[1:]) < MIN_FSDP_SIZE:
            return seed_sharding(mesh)
        longest = max(axes, key=lambda i: array.shape[i])
        return NamedSharding(mesh, PartitionSpec('seed', *[None] * (longest - 1), 'fsdp'))

    return jax.tree.map(sharding, tree)


def partition_specs(shardings: Any) -> Any:
    """Return the `PartitionSpec` of each sharding, array or shape of a tree."""

    def spec(leaf: Any) -> PartitionSpec:
        sharding = leaf if isinstance(leaf, NamedSharding) else leaf.sharding
        assert isinstance(sharding, NamedSharding)
        return sharding.spec

    return jax.tree.map(spec, shardings)


def fsdp_specs(params: Any, mesh: Mesh) -> Any:
    """Return the specs of parameters [S, …] for `gather_params`, None if 'fsdp' splits none."""
    return None if mesh.shape['fsdp'] == 1 else partition_specs(fsdp_sharding(params, mesh))


def map_seeds(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return the function of one seed as one of the seeds that a device has, [S, …] each.

    On few cores the products of one seed fill them, and batched ones are 1.2 to 1.3 × slower: on a
    CPU one seed follows the other.
    """
    if platform(mesh) == 'cpu':
        return lambda *args: jax.lax.map(lambda row: function(*row), args)
    return jax.vmap(function)


def gather_params(params: Any, partition: Any) -> Any:
    """Return the parameters of one seed whole, those that 'fsdp' splits by an all-gather each.

    The gradient through it is a reduce-scatter: the sum over 'fsdp', split as the parameters are.
    What is gathered is there until the backward pass has used it. To gather it again there, under
    `jax.checkpoint`, was tried: on TPU it wrote z ⊗ x, which XLA else never does.

    Args:
      params: of one seed, what this device has of them.
      partition: the `PartitionSpec` of each array of all seeds, [S, …]; None if none is split.
    """
    if partition is None:
        return params

    def whole(array: Array, spec: PartitionSpec) -> Array:
        if 'fsdp' not in spec:
            return array
        axis = spec.index('fsdp') - 1
        return jax.lax.all_gather(array, 'fsdp', axis=axis, tiled=True)

    return jax.tree.map(whole, params, partition)


def mean_gradients(gradients: Any, partition: Any) -> Any:
    """Return the means over the devices that share a batch of gradients through `gather_params`."""
    if partition is None:
        return mean_over_rows(gradients)

    def mean(gradient: Array, spec: PartitionSpec) -> Array:
        if 'fsdp' not in spec:
            return mean_over_rows(gradient)
        copies, shards = jax.lax.axis_size('data'), jax.lax.axis_size('fsdp')
        if copies > 1:
            gradient = jax.lax.psum(gradient, 'data')
        return gradient / (copies * shards)  # the reduce-scatter has summed over 'fsdp'

    return jax.tree.map(mean, gradients, partition)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Return the shapes with a sharding each, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shard_array(array: np.ndarray, sharding: NamedSharding) -> Array:
    """Return an array that every process has whole, each device with its part of it."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shard_batch(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Return arrays of which this process has its rows, their `axis` split over all devices."""
    sharding = batch_sharding(mesh, axis)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def to_local(tree: Any) -> Any:
    """Return arrays that every device has whole as arrays of one device of this process."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree)


def to_host(tree: Any) -> Any:
    """Return arrays as NumPy arrays, wherever their parts are; all processes have to ask."""

    def whole(array: Any) -> np.ndarray:
        if getattr(array, 'is_fully_addressable', True) or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(whole, tree)
