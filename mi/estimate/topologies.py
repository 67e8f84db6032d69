"""Descriptions of TPU slices and NVIDIA GPUs, to compile for devices that are not present.

    devices = topologies.describe('v5e:4x4')
    mesh = parallel.mesh(seeds, batch, devices=devices)
    jax.jit(step).lower(*shapes_on_that_mesh).compile()

XLA's compilers run without the devices. The compiled programs cannot be executed here, but they
show how much memory they need, what they send, and which kernels they launch. TPUs require the
package libtpu, from the extra `tpu`, and GPUs require the CUDA plugin, from the extra `cuda`.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import topologies

from mi.config import UserError, suggest, suggest_install

GIBIBYTE = 2**30
PLANES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4')  # larger ones are multiples of 4x4x4
HOST = 8  # GPUs of a host


class Tpu(NamedTuple):
    """A generation of TPUs.

    Attributes:
      kind: `device_kind` of its devices in JAX.
      memory: bytes of a device's memory that a program can use.
      clock: cycles per second, in the units of the compiler's estimates for kernels.
      largest: number of chips of the largest slice.
      options: options for `get_topology_desc`.
    """

    kind: str
    memory: int
    clock: float
    largest: int
    options: dict[str, str]


class Gpu(NamedTuple):
    """A kind of NVIDIA GPU, with the properties that XLA's compiler needs.

    Attributes:
      kind: `device_kind` of its devices in JAX.
      memory: bytes of memory.
      bandwidth: memory bandwidth in bytes per second.
      cores: number of streaming multiprocessors.
      fpus: number of f32 units per multiprocessor.
      clock: clock rate in GHz.
      capability: major compute capability.
      shared_memory: bytes of shared memory per multiprocessor.
      l2_cache: bytes of L2 cache.
    """

    kind: str
    memory: int
    bandwidth: int
    cores: int
    fpus: int
    clock: float
    capability: int
    shared_memory: int
    l2_cache: int


# memory: what libtpu 0.0.52 names in its error for a program that takes more. clock: the peak of
# https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e), 275, 197, 459 and 918 TFLOP/s in bf16, over
# the FLOPs of a cycle that the same compiler counts for a large product, 2^18, 2^17, 2^18 and 2^19.
# largest: from the same pages.
TPUS = {
    'v4': Tpu('TPU v4', int(30.75 * GIBIBYTE), 1.05e9, 4096, {'chip_config_name': 'megacore'}),
    'v5e': Tpu('TPU v5 lite', int(15.75 * GIBIBYTE), 1.5e9, 256, {}),
    'v5p': Tpu('TPU v5', int(95.73 * GIBIBYTE), 1.75e9, 6144, {}),
    'v6e': Tpu('TPU v6 lite', int(31.24 * GIBIBYTE), 1.75e9, 256, {}),
}
# openxla/xla: xla/backends/gpu/target_config/specs, a100_sxm_80, h100_sxm, h200 and b200.
GPUS = {
    'a100': Gpu(
        'NVIDIA A100-SXM4-80GB', 85100068864, 2039040000000, 108, 64, 1.41, 8, 167936, 41943040
    ),
    'h100': Gpu(
        'NVIDIA H100 80GB HBM3', 84942979072, 3352320000000, 132, 128, 1.98, 9, 233472, 52428800
    ),
    'h200': Gpu(
        'NVIDIA H200 141GB HBM3e', 151397597184, 4800000000000, 132, 128, 1.98, 9, 233472, 52428800
    ),
    'b200': Gpu('NVIDIA B200', 191514411008, 7672320000000, 148, 128, 1.965, 10, 233472, 132644864),
}


def prepare_process() -> None:
    """Prevent a process that compiles for described devices from using the real ones.

    Call this before any other function of JAX. Arrays of the process stay on the CPU, so that it
    does not take a TPU from a run. Programs are not written to the persistent cache, which could
    not read them.
    """
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_enable_compilation_cache', False)


def describe(name: str) -> list[jax.Device]:
    """Return the devices of a named topology.

    The devices need not be present: programs can be compiled for them but not executed.

    Args:
      name: a TPU slice, such as 'v5e:4x4' or 'v5p:2x2x2', or GPUs, such as 'h100:8'. More than 8
        GPUs are divided into hosts of 8.

    Raises:
      UserError: if the topology does not exist, or its compiler is not installed.
    """
    family, size = _parse(name)
    if family in TPUS:
        return _describe_tpus(family, size)
    return _describe_gpus(family, int(size))


def describe_one(name: str) -> jax.Device:
    """Return a single device of the kind in a named topology."""
    family, _ = _parse(name)
    if family in TPUS:
        return _describe_tpus(family, '1x1' if _is_flat(family) else '1x1x1')[0]
    return _describe_gpus(family, 1)[0]


def get_memory(device: jax.Device) -> int | None:
    """Return the bytes of device memory for programs, or None if unknown, as on a CPU."""
    chips: list[Tpu | Gpu] = [*TPUS.values(), *GPUS.values()]
    for chip in chips:
        if chip.kind == device.device_kind:
            return chip.memory
    if device.platform == 'cpu':
        return None
    memory_stats = device.memory_stats() or {}
    return memory_stats.get('bytes_limit')


def get_clock(device: jax.Device) -> float | None:
    """Return the clock of a TPU in XLA's cycles per second, or None for other devices."""
    clocks = {tpu.kind: tpu.clock for tpu in TPUS.values()}
    return clocks.get(device.device_kind)


def _is_flat(family: str) -> bool:
    return family in ('v5e', 'v6e')


def _parse(name: str) -> tuple[str, str]:
    """Parse a name into the family and the size of an existing topology."""
    family, _, size = name.partition(':')
    if family not in (*TPUS, *GPUS):
        raise UserError(
            f'--topology={name}: {family!r} is unknown; {suggest(family, (*TPUS, *GPUS))}'
        )
    if family in GPUS:
        expected_sizes = f'1, 2, 4 or a multiple of {HOST} devices'
        is_size = re.fullmatch(r'[1-9]\d*', size) is not None
        is_known = is_size and (size in ('1', '2', '4') or int(size) % HOST == 0)
        example = f'{family}:{HOST}'
    elif _is_flat(family):
        expected_sizes, is_known, example = (
            f'one of {", ".join(PLANES)}',
            size in PLANES,
            f'{family}:4x4',
        )
    else:
        dims = [int(dim) for dim in size.split('x')] if re.fullmatch(r'\d+x\d+x\d+', size) else []
        is_large = dims == sorted(dims) and all(dim and dim % 4 == 0 for dim in dims)
        expected_sizes = f'one of {", ".join(CUBES)}, or multiples of 4 as in 4x4x8'
        expected_sizes += f', up to {TPUS[family].largest:,} chips'
        is_known = size in CUBES or (
            bool(dims) and is_large and math.prod(dims) <= TPUS[family].largest
        )
        example = f'{family}:2x2x2'
    if not is_known:
        raise UserError(f'--topology={name}: expected {expected_sizes}. Try {example}')
    return family, size


def _describe_tpus(family: str, size: str) -> list[jax.Device]:
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(
            f'--topology={family}:{size}: libtpu is not installed. Try {suggest_install("tpu")}'
        )
    dims = [int(dim) for dim in size.split('x')]
    # A host has up to 2 × 2 chips.
    host_bounds = [min(2, dims[0]), min(2, dims[1]), 1]
    variables = {
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nothing here takes a TPU from another process
        # What a machine with TPUs would tell; else libtpu asks a server and complains.
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
        'TPU_STDERR_LOG_LEVEL': '3',
        'TPU_MIN_LOG_LEVEL': '3',
    }
    with _environment(variables):
        return list(
            topologies.get_topology_desc(
                platform='tpu',
                topology_name=f'{family}:{size}',
                chips_per_host_bounds=host_bounds,
                **TPUS[family].options,
            ).devices
        )


def _describe_gpus(family: str, num_devices: int) -> list[jax.Device]:
    topology_name = f'{family}:{num_devices}'
    plugins = ('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12')
    if not any(_has_module(plugin) for plugin in plugins):
        raise UserError(
            f'--topology={topology_name}: the CUDA plugin of JAX is not installed. Try '
            f'{suggest_install("cuda")}'
        )
    num_hosts = max(1, num_devices // HOST)
    with _environment({'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}):  # no driver is present
        return list(
            topologies.get_topology_desc(
                platform='cuda',
                topology_name=family,
                topology=f'1x{num_hosts}x{num_devices // num_hosts}',
                target_config=_target(GPUS[family]),
            ).devices
        )


def _has_module(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables that have no value yet, while the context is open."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _target(gpu: Gpu) -> str:
    """Return a GPU as a `stream_executor.GpuTargetConfigProto` in text format."""
    block_memory = gpu.shared_memory - 1024  # a block can have all of a core's but 1 kB
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block_memory}
  shared_memory_per_core: {gpu.shared_memory}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {gpu.bandwidth}
  device_memory_size: {gpu.memory}
  l2_cache_size: {gpu.l2_cache}
  cuda_compute_capability {{ major: {gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kind}"
"""
