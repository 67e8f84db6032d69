"""The host process: memory allocator, XLA flags, and a description of the machine."""

import ctypes
import gc
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re

import jax


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, for faster steps on CPU at the cost of more memory.

    On CPU, XLA allocates the temporaries of a program on every call. By default, the system
    provides fresh pages for them, which are slow to touch. Call this function before creating any
    array. It has no effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
        mallopt(arena_max, 1)


def collect_garbage_rarely() -> None:
    """Make Python look for cyclic garbage less often, which shortens tracing and lowering.

    A trace allocates containers that live as long as its program, so that collections visit all of
    them, and all modules, again and again, and find nothing.
    """
    gc.set_threshold(50_000)  # containers; Python's default is 700 or 2,000


XLA_FLAGS = {
    # This scheduler can deadlock jaxlib 0.10.2 on two cores, in the training step of an LSTM.
    '--xla_cpu_enable_concurrency_optimized_scheduler': 'false',
}


CPU_INFO = pathlib.Path('/proc/cpuinfo')
# Fields of /proc/cpuinfo that name a model and its instructions, on x86 and on Arm.
PROCESSOR_FIELDS = (
    *('vendor_id', 'cpu family', 'model', 'model name', 'flags'),
    *('CPU implementer', 'CPU architecture', 'CPU variant', 'CPU part', 'Features'),
)


YNN_FLAG = '--xla_cpu_experimental_ynn_fusion_type'


YNN_FAULTS_SINCE = (0, 10, 2)  # jaxlib


def safe_xla_flags(current_flags: str = '', jaxlib: str | None = None) -> str:
    """Add flags that avoid known faults of XLA on CPU.

    Flags that are already set keep their values. From jaxlib 0.10.2 on, one flag disables fusions
    by XLA's YNN library. With these fusions, 0.10.2 crashes in reductions on CPUs without AVX-512
    (AMD EPYC), and 0.11.0 and 0.12.0.1 compute wrong numbers (Intel Xeon): the mean square of a
    hypernetwork's output is infinity or 1e23 instead of 1. On a busy machine with 0.12.0.1, fusing
    only matrix products failed in 3 of 14 processes, and disabling all fusions in 0 of 26.

    Args:
      current_flags: value of the environment variable XLA_FLAGS.
      jaxlib: version of jaxlib, or None for the installed one.

    Returns:
      The new value of XLA_FLAGS.
    """
    flags = dict(XLA_FLAGS)
    version = re.findall(r'\d+', jaxlib or importlib.metadata.version('jaxlib'))
    if tuple(map(int, version[:3])) >= YNN_FAULTS_SINCE:
        flags[YNN_FLAG] = ''
    missing_flags = [
        f'{flag_name}={flag_value}'
        for flag_name, flag_value in flags.items()
        if flag_name not in current_flags
    ]
    return ' '.join([current_flags, *missing_flags]).strip()


def set_xla_flags() -> None:
    """Set XLA_FLAGS to `safe_xla_flags`. Call this function before any computation."""
    os.environ['XLA_FLAGS'] = safe_xla_flags(os.environ.get('XLA_FLAGS', ''))


def get_cores() -> list[int]:
    """Return the cores that this process may use, or all cores if the system does not say."""
    if hasattr(os, 'sched_getaffinity'):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def describe_machine() -> str:
    """Describe the devices for the report, as in '2 × NVIDIA H100'."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        return f'{jax.device_count()} × {device.device_kind}'
    return f'{_read_processor_name()}, {len(get_cores())} cores'


def hash_processor() -> str:
    """Hash the model and the features of the CPU, which determine the code that XLA compiles."""
    fields = _read_processor_fields()
    known_fields = {name: fields.get(name, '') for name in PROCESSOR_FIELDS}
    known_fields |= {'machine': platform.machine(), 'processor': platform.processor()}
    return hashlib.sha256(json.dumps(known_fields).encode()).hexdigest()[:16]


def _read_processor_name() -> str:
    """Return the name of the CPU."""
    name = _read_processor_fields().get('model name', '')
    return name or platform.processor() or platform.machine()


def _read_processor_fields() -> dict[str, str]:
    """Read the fields of the first CPU in /proc/cpuinfo. Return {} if there is no such file."""
    if not CPU_INFO.exists():
        return {}
    first_cpu = CPU_INFO.read_text().partition('\n\n')[0]
    pairs = (line.partition(':') for line in first_cpu.splitlines())
    return {name.strip(): field.strip() for name, _, field in pairs}
