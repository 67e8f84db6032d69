import gc
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # see launch/compilation_cache.py

import jax
import pytest

from launch import compilation_cache
from mi.lm.data import sources
from mi.training import host

# The flags of a training run, and what compiles sooner: no optimization by LLVM, one module of LLVM
# for each program, and, where jaxlib still has it, the older emitter of loops, which halved the
# time of the tests of agents' networks.
FAST_COMPILATION = '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
if importlib.metadata.version('jaxlib') < '0.12':
    FAST_COMPILATION += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', host.safe_xla_flags(FAST_COMPILATION))

jax.config.update('jax_numpy_rank_promotion', 'raise')
if os.environ['JAX_PLATFORMS'] != 'cpu':  # f32 products are TF32 on a GPU, bf16 on a TPU
    jax.config.update('jax_default_matmul_precision', 'highest')

ROOT = pathlib.Path(__file__).parents[1]

# Half of a run is compilation, so programs are kept for the next run, and shared with the processes
# that tests start. The process that starts the workers gets here first; they inherit what it sets.
CACHE_MEGABYTES = 2048
for name, value in compilation_cache.prepare(ROOT / '.pytest_cache', CACHE_MEGABYTES).items():
    os.environ[name] = value
    if name.startswith('JAX_'):
        jax.config.update(name.lower(), float(value) if name.endswith('SECS') else value)


def forced(devices: int) -> str:
    """XLA_FLAGS of a program of its own: those of the tests, and this number of CPU devices."""
    return f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'


def printed_on_devices(count: int, module: str, *arguments: str) -> Any:
    """Return the JSON that a module prints last, run with this number of CPU devices."""
    done = subprocess.run(
        [sys.executable, '-m', module, *arguments],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': forced(count), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the installations, which are the longest tests: others can run beside them."""
    items.sort(key=lambda item: 'test_package' not in item.nodeid)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting modules and collected tests again and again."""
    gc.freeze()
    host.collect_garbage_rarely()


@pytest.fixture(scope='session', autouse=True)
def _from_the_root() -> None:
    os.chdir(ROOT)  # configs/ and experiments/ are named relative to it


@pytest.fixture(scope='session')
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a little of each split of Austen: real text, evaluated in no time."""
    directory = tmp_path_factory.mktemp('texts')
    for split, [(_, text)] in sources.load_austen().items():
        (directory / f'{split}.txt').write_bytes(text[:12_000])
    return str(directory)


@pytest.fixture(scope='session')
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp('tokens'))
