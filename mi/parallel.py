"""Several devices, in one process or in many: one mesh, of the axes 'data' and 'fsdp'.

Batches are split over both axes. Parameters and what the optimiser keeps of them are split over
'fsdp' and the same along 'data'; with an 'fsdp' of one, the default, every device has them whole.
All processes run the same program on the same config; the first alone writes to the run directory.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mi import progress
from mi.config import UserError

HEARTBEAT = 30  # seconds after which a process that is gone ends the others
ROWS = ('data', 'fsdp')  # the axes that a batch is split over


def join(how: str) -> None:
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
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        return
    match = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', how)
    if match is None or int(match[3]) >= int(match[2]):
        raise UserError(
            f"--distributed={how}: expected 'auto', or 'HOST:PORT,COUNT,INDEX' with INDEX from 0 "
            f'to COUNT - 1'
        )
    with progress.Work('waiting for the other processes'):
        jax.distributed.initialize(
            match[1], int(match[2]), int(match[3]), heartbeat_timeout_seconds=HEARTBEAT
        )


def first() -> bool:
    """Whether this is the process that writes; a process on its own is."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when every process has come here."""
    with progress.Work(f'waiting for the other processes: {name}'):
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def sum_of(number: int) -> int:
    """The sum over all processes; all have to ask."""
    if jax.process_count() == 1:
        return number
    return int(np.sum(multihost_utils.process_allgather(np.asarray(number))))


def of_first(number: int) -> int:
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


def once(function: Callable[..., Any], *args: Any, out_shardings: Any = None) -> Any:
    """Return the result of a function that is run this one time, as those that draw parameters."""
    return compile_fast(function, *args, out_shardings=out_shardings)(*args)


def mesh(batch: int, fsdp: int = 1) -> Mesh:
    """A mesh [data, fsdp] of all devices, or of as many as divide the batch evenly.

    Raises:
      UserError: if `fsdp` does not divide their number, or, with several processes, their number
        does not divide the batch.
    """
    devices = jax.device_count()
    count = max(n for n in range(1, devices + 1) if batch % n == 0)
    if jax.process_count() > 1 and count < devices:
        raise UserError(
            f'config.train.batch = {batch}: expected a multiple of {devices}, the devices of all '
            f'{jax.process_count()} processes'
        )
    if count % fsdp:
        raise UserError(
            f'config.train.fsdp = {fsdp}: expected a divisor of {count}, the devices that share '
            f'config.train.batch = {batch}'
        )
    return jax.make_mesh(
        (count // fsdp, fsdp),
        ROWS,
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:count],
    )


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """With this axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def by_size(tree: Any, mesh: Mesh, skip: int = 0, least: int = 2**12) -> Any:
    """The sharding of each array over 'fsdp': its longest axis that divides, if it is large.

    Args:
      tree: of arrays or of their shapes.
      mesh: from `mesh`.
      skip: leading axes that are not split.
      least: numbers of the smallest array that is split.
    """
    shards = mesh.shape['fsdp']

    def of(a: Any) -> NamedSharding:
        axes = [i for i in range(skip, len(a.shape)) if a.shape[i] % shards == 0]
        if shards == 1 or not axes or a.size < least:
            return whole(mesh)
        longest = max(axes, key=lambda i: a.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, 'fsdp'))

    return jax.tree.map(of, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """The shapes with a sharding each, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def split(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Arrays of which this process has its rows, their `axis` split over all devices."""
    sharding = by_rows(mesh, axis)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def here(tree: Any) -> Any:
    """Arrays that every device has whole, as arrays of one device of this process."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree)


def rows(batch: int) -> slice:
    """The rows of a batch that this process has, in the order of `split`."""
    each = batch // jax.process_count()
    return slice(each * jax.process_index(), each * (jax.process_index() + 1))


def keep_rows(x: Array, axis: int) -> Array:
    """x, kept split by its `axis` over all devices of the mesh around it, if there is one.

    Between the layers of a model whose parameters are split, it says that weights are to be
    gathered where they are needed and activations are to stay.
    """
    around = jax.sharding.get_abstract_mesh()
    if around.empty or around.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, ROWS))
