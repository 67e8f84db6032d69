"""The compiled programs that the members of a sweep share, in SWEEP/compilation_cache/PROCESSOR.

Members that differ only in seeds, or in hyperparameters that are arguments of a program, compile
the same programs. JAX's persistent cache stores each one under a hash of the program, the compiler
and its options. On CPU that hash does not contain the instruction set, and a program for AVX-512
crashes without it, so processors of different models or features have directories of their own.

The cache may be deleted at any time. A `JAX_COMPILATION_CACHE_DIR` of the user has precedence.
"""

import contextlib
import os
import pathlib
import stat

from mi.training import host

DIRECTORY = 'compilation_cache'
MEGABYTE = 2**20


def prepare(sweep_dir: pathlib.Path, max_megabytes: int) -> dict[str, str]:
    """Make space in the cache of a sweep, and return the environment of a member that starts.

    The programs that were written first are deleted until the rest has at most `max_megabytes`.

    Args:
      sweep_dir: directory of the sweep.
      max_megabytes: size that the programs may have before the member adds its own; 0 for no cache.

    Returns:
      Environment variables; none without a cache, or if JAX_COMPILATION_CACHE_DIR is set.
    """
    if not max_megabytes or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return {}
    directory = (sweep_dir / DIRECTORY).absolute()
    _delete_oldest(directory, max_megabytes * MEGABYTE)
    return _make_variables(directory)


def _make_variables(directory: pathlib.Path) -> dict[str, str]:
    """Return the environment variables by which JAX uses a cache."""
    # Most programs of a small member compile in less than JAX's minimum of one second.
    min_seconds = os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    # On Intel, jaxlib 0.10 logs an error of 4 kB for each program that it loads: a preference of
    # its compiler, prefer-no-gather, is no feature of a processor. 3 logs fatal errors only; the
    # others reach Python as exceptions.
    log_level = os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1')
    if log_level == '1':  # which `import jax` sets where the user does not
        log_level = '3'
    return {
        'JAX_COMPILATION_CACHE_DIR': str(directory / host.hash_processor()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': min_seconds,
        'TF_CPP_MIN_LOG_LEVEL': log_level,
    }


def _delete_oldest(directory: pathlib.Path, max_bytes: int) -> None:
    """Delete files below a directory, the oldest by time of writing first, down to `max_bytes`.

    JAX's own limit, jax_compilation_cache_max_size, is not used: it keeps the time of the last use
    of each program in a file NAME-atime. A member that is killed before it has written that file
    leaves a program without it, and no member can then store anything.
    """
    files = []
    for file in directory.rglob('*'):
        with contextlib.suppress(FileNotFoundError):  # deleted by another launcher
            status = file.stat()
            if stat.S_ISREG(status.st_mode):
                files.append((status.st_mtime, status.st_size, file))
    num_bytes = 0
    for _, size, file in sorted(files, reverse=True):
        num_bytes += size
        if num_bytes > max_bytes:
            file.unlink(missing_ok=True)
