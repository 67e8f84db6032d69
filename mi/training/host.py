"""Settings of the host process: memory allocator, XLA flags, name of the machine."""

import ctypes
import importlib.metadata
import os
import pathlib
import platform
import re

import jax


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: faster steps on CPU, at the price of a larger process.

    XLA on CPU allocates the temporaries of a program at every call, by default from the system, and
    touching their pages for the first time took 15 to 20 % of a training step. Elsewhere than on
    glibc it does nothing. It has to be called before the arrays are made.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
        mallopt(arena_max, 1)


XLA_FLAGS = {
    # With it, jaxlib 0.10.2 on two cores can deadlock in a training step: an LSTM with a full MI
    # did so in a quarter of its starts.
    '--xla_cpu_enable_concurrency_optimized_scheduler': 'false',
}


YNN_FLAG = '--xla_cpu_experimental_ynn_fusion_type'


YNN_FAULTS_SINCE = (0, 10, 2)  # jaxlib


def safe_xla_flags(given: str = '', jaxlib: str | None = None) -> str:
    """Return XLA flags that avoid known faults of XLA on CPU, after those that are given.

    A flag that is given already, with any value, is left alone. jaxlib from 0.10.2 on gets one
    more flag, with which XLA's YNN library computes matrix products only, and as fast as before.
    Without it, 0.10.2 crashes in reductions on CPUs without AVX-512 (seen on an AMD EPYC), and
    0.11.0 and 0.12.0.1 compute wrong numbers: the mean square of a hypernetwork's output, which is
    1, came out as infinity or 1e23 (seen on an Intel Xeon).

    Args:
      given: the flags so far, as in the environment variable XLA_FLAGS.
      jaxlib: version of jaxlib; None for the one that is installed.
    """
    flags = dict(XLA_FLAGS)
    version = re.findall(r'\d+', jaxlib or importlib.metadata.version('jaxlib'))
    if tuple(map(int, version[:3])) >= YNN_FAULTS_SINCE:
        flags[YNN_FLAG] = 'LIBRARY_FUSION_TYPE_DOT'
    missing = [f'{name}={value}' for name, value in flags.items() if name not in given]
    return ' '.join([given, *missing]).strip()


def set_xla_flags() -> None:
    """Set XLA_FLAGS to `safe_xla_flags`; to be called before anything is computed."""
    os.environ['XLA_FLAGS'] = safe_xla_flags(os.environ.get('XLA_FLAGS', ''))


def describe_machine() -> str:
    """What the run ran on, in words, for the report."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        return f'{jax.device_count()} × {device.device_kind}'
    return f'{_processor()}, {len(os.sched_getaffinity(0))} cores'


def _processor() -> str:
    info = pathlib.Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()
