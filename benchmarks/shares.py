"""Time of the parts of a training step on a CPU.

    pip install -e '.[benchmark]' && python -m benchmarks.shares

XLA's profiler times every instruction of the compiled step on one thread. An instruction belongs to
the part of the model that its JAX operation is in, except that matrix products are counted by
themselves. The profiler makes a step longer, so the milliseconds of all parts are scaled to sum to
the step without it. The products of a Transformer's step are also timed alone, in XLA and in
PyTorch, and so is the whole step of PyTorch's model. These take turns with the step, and the median
of the rounds counts. The last line has the memory of a step's temporary arrays.

The steps are the Transformers of `benchmarks.lm`, the recipe of `benchmarks.nanogpt`, and an update
of `benchmarks.rl` on XLand with the fusion `mi`, which acts and learns.
"""

import collections
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import lm, nanogpt, options, rl
from mi.estimate import hlo, program
from mi.training import host

STEPS = ('small', 'default', 'long', 'nanogpt', 'xland')
ONLY = options.define_only(f'Steps: {", ".join(STEPS)}')
SIDE = options.define_side()
JSON = options.define_json()

NUM_PROFILED = 20  # steps in the trace
NUM_ROUNDS = 11
STEPS_PER_ROUND = 3
NANOGPT_VOCABULARY = 65  # characters of tiny Shakespeare
PRODUCTS = 'matrix products'
# Part of the model → regular expression for the operations in it; the first match counts.
TRANSFORMER_PARTS = {
    'attention without products': r'/attention/',
    'feed-forward without products': r'/feed_forward/',
    'normalization': r'/norm\w*/',
    'embedding, residual sums and loss': r'LanguageModel',
    'optimizer': r'',
}
XLAND_PARTS = {
    'learning without products': r'jvp\(Agent\)',
    'acting without products': r'/Agent/',
    'environments and sampled actions': r'(?<!jvp\()vmap\(',
    'losses and optimizer': r'',
}
CONTROL_FLOW = ('while', 'call', 'conditional')  # whose time is that of their instructions


class Dot(NamedTuple):
    """A matrix product of a step, with the axes of `jax.lax.dot_general`.

    Attributes:
      shapes: shapes of both factors.
      contracted: axes of each factor that the product sums over.
      batch: axes of each factor that number the products of a batch.
    """

    shapes: tuple[tuple[int, ...], ...]
    contracted: tuple[tuple[int, ...], ...]
    batch: tuple[tuple[int, ...], ...]

    def permutations(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the orders of both factors' axes for `torch.matmul`."""
        free_axes = [
            tuple(axis for axis in range(len(shape)) if axis not in (*summed, *batched))
            for shape, summed, batched in zip(self.shapes, self.contracted, self.batch, strict=True)
        ]
        left = (*self.batch[0], *free_axes[0], *self.contracted[0])
        right = (*self.batch[1], *self.contracted[1], *free_axes[1])
        return left, right


class Share(NamedTuple):
    """Seconds per step in the instructions of a part, and their number."""

    seconds: float
    instructions: int


def compile_step(name: str) -> tuple[jax.stages.Compiled, Callable[[], object]]:
    """Return the compiled step, and a function that runs it."""
    if name == 'xland':
        config = rl.make_config('xland')
        config.model.fusion.name = 'mi'
        return rl.compile_fused(config)
    if name == 'nanogpt':
        config = nanogpt.make_config(nanogpt.Recipe()).unlock()
        return lm.compile_step(config, NANOGPT_VOCABULARY)
    vocabulary = lm.get_sizes()['transformer'][name][0]
    return lm.compile_step(lm.make_config('transformer', name, 'mi'), vocabulary)


def find_part(
    instruction: hlo.Instruction,
    computation: hlo.Computation,
    module: hlo.Module,
    parts: Mapping[str, str],
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
    return next(part for part, pattern in parts.items() if re.search(pattern, operation))


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


def compute_shares(
    hlo_text: str, seconds: collections.Counter[str], parts: Mapping[str, str]
) -> dict[str, Share]:
    """Return the share of each part, most seconds first, for the seconds of one step by name."""
    module = hlo.parse(hlo_text)
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for computation in module.computations.values():
        for name, instruction in computation.instructions.items():
            if name in seconds and instruction.opcode not in CONTROL_FLOW:
                part = find_part(instruction, computation, module, parts)
                totals[part] += seconds[name]
                counts[part] += 1
    return {part: Share(total, counts[part]) for part, total in totals.most_common()}


def list_dots(hlo_text: str) -> list[Dot]:
    """Return the matrix products of a program without loops."""
    dots = []
    for computation in hlo.parse(hlo_text).computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode == 'dot':
                shapes = (shape.dims for shape in computation.operand_shapes(instruction))
                contracted, batch = (
                    tuple(instruction.dims(f'{factor}_{axes}_dims') for factor in ('lhs', 'rhs'))
                    for axes in ('contracting', 'batch')
                )
                dots.append(Dot(tuple(shapes), contracted, batch))
    return dots


def measure(name: str) -> dict[str, Any]:
    """Measure a step on one thread, and return its figures for the JSON file."""
    compiled, step = compile_step(name)
    peers = {} if name == 'xland' else make_peers(name, list_dots(compiled.as_text()))
    median_seconds = measure_in_turns({'step': step} | peers)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            profiled_seconds = measure_step(step, NUM_PROFILED)
        traced = read_trace(folder)
    seconds = collections.Counter({key: value / NUM_PROFILED for key, value in traced.items()})
    parts = XLAND_PARTS if name == 'xland' else TRANSFORMER_PARTS
    shares = compute_shares(compiled.as_text(), seconds, parts)
    return {
        'step': name,
        'seconds': median_seconds.pop('step'),
        'profiled_seconds': profiled_seconds,
        'gflops': program.analyze(compiled).flops / 1e9,
        'temporaries_mb': compiled.memory_analysis().temp_size_in_bytes / 1e6,
        'shares': {part: share._asdict() for part, share in shares.items()},
        'peers': median_seconds,
    }


def make_peers(name: str, dots: Sequence[Dot]) -> dict[str, Callable[[], object]]:
    """Return functions that compute the products alone, and the whole step in PyTorch."""
    return {
        'products alone in XLA': multiply_in_xla(dots),
        'products alone in torch': multiply_in_torch(dots),
        'whole step in torch': make_torch_step(name),
    }


def measure_in_turns(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each step, over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(NUM_ROUNDS):
        for name, step in steps.items():
            step()  # bring its arrays back into the caches
            seconds[name].append(measure_step(step, STEPS_PER_ROUND))
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_step(step: Callable[[], object], num_steps: int) -> float:
    """Return the mean seconds of a step."""
    start_time = time.perf_counter()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - start_time) / num_steps


def multiply_in_xla(dots: Sequence[Dot]) -> Callable[[], object]:
    """Return a function that computes all products in one program of XLA."""

    def multiply(factors: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return [
            jax.lax.dot_general(left, right, (dot.contracted, dot.batch))
            for dot, (left, right) in zip(dots, factors, strict=True)
        ]

    factors = [tuple(map(jnp.asarray, pair)) for pair in draw_factors(dots)]
    compiled = jax.jit(multiply).lower(factors).compile()
    return lambda: jax.block_until_ready(compiled(factors))


def multiply_in_torch(dots: Sequence[Dot]) -> Callable[[], object]:
    """Return a function that computes all products in PyTorch."""
    import torch

    factors = []
    for dot, pair in zip(dots, draw_factors(dots), strict=True):
        left, right = map(torch.from_numpy, pair)
        left_order, right_order = dot.permutations()
        factors.append((left.permute(left_order), right.permute(right_order)))
    return lambda: [left @ right for left, right in factors]


def draw_factors(dots: Sequence[Dot]) -> Iterator[list[np.ndarray]]:
    """Draw both factors of each product, in f32."""
    rng = np.random.default_rng(0)
    for dot in dots:
        yield [rng.standard_normal(shape, np.float32) for shape in dot.shapes]


def make_torch_step(name: str) -> Callable[[], object]:
    """Return a function that runs the step of the PyTorch model of the same sizes."""
    import torch

    torch.set_num_threads(1)
    if name != 'nanogpt':
        return lm.make_step('transformer', name, 'torch')
    recipe = nanogpt.Recipe()
    side = nanogpt.make_torch_side(recipe, NANOGPT_VOCABULARY, seed=0, is_compiled=False)
    tokens = np.zeros((recipe.batch, recipe.length + 1), np.int32)
    return lambda: side.update(tokens, 0)


def scale_shares(figures: dict[str, Any]) -> dict[str, float]:
    """Return part → seconds, such that the parts of a step sum to its time without the profiler."""
    shares = figures['shares']
    scale = figures['seconds'] / sum(share['seconds'] for share in shares.values())
    return {part: scale * share['seconds'] for part, share in shares.items()}


def print_table(figures: dict[str, Any]) -> None:
    """Print the parts of a step, scaled to the step without the profiler, and its peers."""
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
    rates = [f'in the step {figures["gflops"] / scaled_seconds[PRODUCTS]:.0f}']
    for label, peer_seconds in figures['peers'].items():
        print(f'{label:<49}{1000 * peer_seconds:9.2f}{peer_seconds / seconds:8.2f}')
        if label.startswith('products alone '):
            rates.append(f'{label} {figures["gflops"] / peer_seconds:.0f}')
    print(f'GFLOP/s of the products: {", ".join(rates)}')
    print(f'temporary arrays: {figures["temporaries_mb"]:.1f} MB', flush=True)


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
