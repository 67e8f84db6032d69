"""A cache of compiled programs for the members of a sweep, in SWEEP/compilation_cache/PROCESSOR.

Members that differ only in seeds, or in hyperparameters that are arguments of a program, compile
the same programs. JAX's persistent cache stores a program under a hash of the program, the compiler
and its options. On CPU this hash does not cover the instruction set, and a program for AVX-512
crashes on a processor without it. Each processor model and set of features therefore has its own
directory.

The cache may be deleted at any time. If `JAX_COMPILATION_CACHE_DIR` is set, it takes precedence.
"""

import contextlib
import os
import pathlib
import stat

from mi.training import host

DIRECTORY = 'compilation_cache'
MEGABYTE = 2**20


def prepare(sweep_dir: pathlib.Path, max_megabytes: int) -> dict[str, str]:
    """Make space in the cache of a sweep, and return environment variables for a new member.

    The oldest programs are deleted until the rest take up at most `max_megabytes`.

    Args:
      sweep_dir: directory of the sweep.
      max_megabytes: maximum size of the cache before the member adds its programs, or 0 for no
        cache.

    Returns:
      Environment variables, or {} without a cache or if JAX_COMPILATION_CACHE_DIR is set.
    """
    if not max_megabytes or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return {}
    directory = (sweep_dir / DIRECTORY).absolute()
    _delete_oldest(directory, max_megabytes * MEGABYTE)
    return _make_variables(directory)


def _make_variables(directory: pathlib.Path) -> dict[str, str]:
    """Return the environment variables that make JAX use a cache."""
    # Most programs of a small member compile in less than JAX's minimum of one second.
    min_seconds = os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    # On Intel, jaxlib 0.10 logs 4 kB of errors for each program that it loads, because it takes
    # prefer-no-gather, a preference of its compiler, for a processor feature. Level 3 logs only
    # fatal errors. Other errors reach Python as exceptions.
    log_level = os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1')
    if log_level == '1':  # which `import jax` sets where the user does not
        log_level = '3'
    return {
        'JAX_COMPILATION_CACHE_DIR': str(directory / host.hash_processor()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': min_seconds,
        'TF_CPP_MIN_LOG_LEVEL': log_level,
    }


def _delete_oldest(directory: pathlib.Path, max_bytes: int) -> None:
    """Delete the oldest files in a directory until at most `max_bytes` remain.

    JAX's own limit, jax_compilation_cache_max_size, is not used, because it stores the time of the
    last use of each program in a file NAME-atime. A member that is killed before it writes this
    file leaves a program without it, and no member can store a program after that.
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
