"""Time of the parts of a language model's training step on a CPU.

    pip install -e '.[benchmark]' && python -m benchmarks.shares

XLA's profiler times every instruction of the compiled step on one thread. An instruction belongs to
the part of the model that its JAX operation is in, except that matrix products are counted by
themselves. The profiler makes a step longer, so the milliseconds of all parts are scaled to sum to
the step without it. The rate of the products is compared with that of a large square product in XLA
and in PyTorch, the most that a step could reach with all its products at full speed.

The steps are the Transformers of `benchmarks.lm` and the recipe of `benchmarks.nanogpt`.
"""

import collections
import contextlib
import glob
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import lm, nanogpt, options
from mi.estimate import hlo, program
from mi.training import host

STEPS = ('small', 'default', 'long', 'nanogpt')
ONLY = options.define_only(f'Steps: {", ".join(STEPS)}')
SIDE = options.define_side()
JSON = options.define_json()

NUM_STEPS = 20
LARGE = 1024  # rows and columns of the square product
PRODUCTS = 'matrix products'
# Part of the model → regular expression for the operations in it; the first match counts.
PARTS = {
    'attention without products': r'/attention/',
    'feed-forward without products': r'/feed_forward/',
    'normalization': r'/norm\w*/',
    'embedding, residual sums and loss': r'LanguageModel',
    'optimizer': r'',
}
CONTROL_FLOW = ('while', 'call', 'conditional')  # whose time is that of their instructions


class Share(NamedTuple):
    """Seconds per step in the instructions of a part, and their number."""

    seconds: float
    instructions: int


def get_config(name: str) -> tuple[ml_collections.ConfigDict, int]:
    """Return the config of a step, and its vocabulary size."""
    if name == 'nanogpt':
        return nanogpt.make_config(nanogpt.Recipe()).unlock(), 65
    return lm.make_config('transformer', name, 'mi'), lm.get_sizes()['transformer'][name][0]


def find_part(
    instruction: hlo.Instruction, computation: hlo.Computation, module: hlo.Module
) -> str:
    """Return the part of the model that an instruction of a computation belongs to.

    XLA's own instructions, such as the halves of a reduction, have no operation of JAX. They belong
    to the part of their first operand.
    """
    called = [module.computations[name] for name in instruction.called('calls')]
    opcodes = [inner.opcode for part in called for inner in part.instructions.values()]
    if 'dot' in [instruction.opcode, *opcodes]:
        return PRODUCTS
    source: hlo.Instruction | None = instruction
    while source is not None and not source.operation and source.operands:
        source = computation.instructions.get(source.operands[0])
    operation = (source and source.operation) or ''
    return next(part for part, pattern in PARTS.items() if re.search(pattern, operation))


def read_trace(folder: str) -> collections.Counter[str]:
    """Return the seconds of each name in a trace of JAX's profiler."""
    (file,) = glob.glob(f'{folder}/**/*.trace.json.gz', recursive=True)
    with gzip.open(file) as trace_file:
        events = json.load(trace_file)['traceEvents']
    seconds: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get('ph') == 'X':
            seconds[event['name']] += 1e-6 * event['dur']
    return seconds


def compute_shares(hlo_text: str, seconds: collections.Counter[str]) -> dict[str, Share]:
    """Return the share of each part, most seconds first, for the seconds of one step by name."""
    module = hlo.parse(hlo_text)
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for computation in module.computations.values():
        for name, instruction in computation.instructions.items():
            if name in seconds and instruction.opcode not in CONTROL_FLOW:
                part = find_part(instruction, computation, module)
                totals[part] += seconds[name]
                counts[part] += 1
    return {part: Share(total, counts[part]) for part, total in totals.most_common()}


def measure(name: str) -> dict[str, Any]:
    """Measure a step on one thread, and return its figures for the JSON file."""
    compiled, step = lm.compile_step(*get_config(name))
    for _ in range(5):
        step()
    step_seconds = measure_step(step)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            profiled_seconds = measure_step(step)
        traced = read_trace(folder)
    seconds = collections.Counter({key: value / NUM_STEPS for key, value in traced.items()})
    shares = compute_shares(compiled.as_text(), seconds)
    return {
        'step': name,
        'seconds': step_seconds,
        'profiled_seconds': profiled_seconds,
        'gflops': program.analyze(compiled).flops / 1e9,
        'shares': {part: share._asdict() for part, share in shares.items()},
        'large_product': {'XLA': measure_xla_rate(), 'torch': measure_torch_rate()},
    }


def measure_step(step: Callable[[], object]) -> float:
    """Return the mean seconds of a step."""
    start_time = time.perf_counter()
    for _ in range(NUM_STEPS):
        step()
    return (time.perf_counter() - start_time) / NUM_STEPS


def measure_rate(multiply: Callable[[], object]) -> float:
    """Return the GFLOP/s of a square product, the median of ten."""
    times = []
    for _ in range(11):
        start_time = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start_time)
    return 2 * LARGE**3 / statistics.median(times[1:]) / 1e9


def measure_xla_rate() -> float:
    """Return the GFLOP/s of a large square product in XLA."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(LARGE, LARGE)), jnp.float32)
    product = jax.jit(jnp.matmul)
    return measure_rate(lambda: jax.block_until_ready(product(matrix, matrix)))


def measure_torch_rate() -> float | None:
    """Return the GFLOP/s of a large square product in PyTorch, or None without it."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
        matrix = torch.randn(LARGE, LARGE)
        return measure_rate(lambda: matrix @ matrix)
    return None


def scale_shares(figures: dict[str, Any]) -> dict[str, float]:
    """Return part → seconds, such that the parts of a step sum to its time without the profiler."""
    shares = figures['shares']
    scale = figures['seconds'] / sum(share['seconds'] for share in shares.values())
    return {part: scale * share['seconds'] for part, share in shares.items()}


def print_table(figures: dict[str, Any]) -> None:
    """Print the parts of a step, scaled to the step without the profiler, and product rates."""
    seconds, shares = figures['seconds'], figures['shares']
    scaled_seconds = scale_shares(figures)
    profiled_total = sum(share['seconds'] for share in shares.values())
    print(
        f'\n{figures["step"]}, one thread; in the profile, a step takes '
        f'{1000 * figures["profiled_seconds"]:.1f} ms, and its instructions '
        f'{1000 * profiled_total:.1f} ms'
    )
    print(f'{"part":<36}{"instructions":>13}{"ms":>9}{"share":>8}')
    for part, part_seconds in scaled_seconds.items():
        print(
            f'{part:<36}{shares[part]["instructions"]:13d}{1000 * part_seconds:9.2f}'
            f'{part_seconds / seconds:8.2f}'
        )
    print(f'{"whole step, unprofiled":<49}{1000 * seconds:9.2f}{1:8.2f}')
    rates = {'products of the step': figures['gflops'] / scaled_seconds[PRODUCTS]}
    rates |= {
        f'{LARGE} × {LARGE} in {library}': rate
        for library, rate in figures['large_product'].items()
        if rate is not None
    }
    print(
        'GFLOP/s: ' + ', '.join(f'{label} {rate:.0f}' for label, rate in rates.items()), flush=True
    )


def main(argv: Sequence[str]) -> None:
    """Measure every step in a process of its own with one thread, or serve as that process."""
    del argv
    if SIDE.value:
        host.keep_freed_memory()
        host.set_xla_flags()
        print(json.dumps(measure(SIDE.value)))
        return
    machine = host.describe_machine()
    print(f'{machine}, jax {jax.__version__}')
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
    environment = os.environ | {'XLA_FLAGS': flags, 'OMP_NUM_THREADS': '1'}
    if hasattr(os, 'sched_setaffinity'):  # which some of XLA's products need beside the flag
        os.sched_setaffinity(0, host.get_cores()[-1:])  # inherited by the processes
    figures = []
    for name in options.select(ONLY, STEPS):
        command = [sys.executable, '-m', 'benchmarks.shares', f'--side={name}']
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        figures.append(json.loads(done.stdout.splitlines()[-1]))
        print_table(figures[-1])
    options.write_json(JSON.value, ['torch'], machine=machine, figures=figures)


if __name__ == '__main__':
    options.run(main)
