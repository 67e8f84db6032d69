"""A comparison of our layers with PyTorch, naive einsum and the machine's peak speed.

    pip install -e '.[benchmark]' && python -m benchmarks.layers

Every regime is timed in f32 with all terms, including zᵀU, Vx and b. The pass 'f' is the forward
pass. 'fb' adds the gradients of x, z and all parameters. JAX and PyTorch run in separate processes
with the same allocator settings, and take turns. A turn starts with an untimed call, unless a call
takes more than a second. Both are on the CPU.

The tables show medians over the rounds. `share` is the rate of useful operations, divided by that
of the fastest product of two 2048 × 2048 matrices in the same run. A ratio above 1 means that ours
is faster. Memory, for R1 to R6, is the peak resident size above the inputs, in one call of a fresh
process. The error is the relative error of the output against float64, with f32 products on every
device. `--orders` compares `choose_order` with all orders on random shapes.
"""

import ctypes
import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import options
from benchmarks.layer_sides import Arrays, Side, Tensor, jax_sides, torch_sides
from benchmarks.regimes import REGIMES, Regime, random_regimes, relative_error
from mi.kernels import bilinear as kernels
from mi.training import host

ORDERS = flags.DEFINE_bool('orders', False, 'Compare the plan with every order on random shapes.')
MEMORY = flags.DEFINE_bool('measure_memory', False, 'For the workers: measure memory, not time.')
ROUNDS = options.define_rounds()
ONLY = options.define_only('Beginnings of names of regimes')
SIDE = options.define_side()
JSON = options.define_json()

PEAK_SIZE = 2048
SLOW = 5.0  # seconds: one round is enough for a side that takes longer

Call = Callable[[], object]  # waits for its result
SidePhase = tuple[str, str]  # and phase is f or fb
Facts = dict[str, dict[str, float]]  # side → compile time and error
Figure = dict[str, Any]  # a row of a table, for the JSON file


def prepare(library: str, regime: Regime) -> tuple[dict[SidePhase, Call], Facts]:
    """Return a call for each side and phase, and the compile time and error of each side."""
    arrays = regime.draw_arrays()
    if library == 'torch':
        return _prepare_torch(regime, arrays), {}
    return _prepare_jax(regime, arrays)


def _prepare_torch(regime: Regime, arrays: Mapping[str, np.ndarray]) -> dict[SidePhase, Call]:
    import torch

    calls: dict[SidePhase, Call] = {}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if regime.form == 'ids':
        tensors['z'] = tensors['z'].long()
    output_grad = tensors.pop('dy')
    differentiable = [
        tensor.requires_grad_() for tensor in tensors.values() if tensor.is_floating_point()
    ]

    def forward(layer: Side) -> object:
        with torch.no_grad():
            return layer(tensors)

    def forward_and_gradient(layer: Side) -> object:
        return torch.autograd.grad(layer(tensors), differentiable, output_grad)

    for side, layer in torch_sides(regime).items():
        calls[side, 'f'] = functools.partial(forward, layer)
        calls[side, 'fb'] = functools.partial(forward_and_gradient, layer)
    for call in calls.values():  # compile, as JAX's sides do before they are timed
        call()
    return calls


def _prepare_jax(
    regime: Regime, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[SidePhase, Call], Facts]:
    calls: dict[SidePhase, Call] = {}
    facts: Facts = {}
    inputs = {name: jnp.asarray(array) for name, array in arrays.items()}
    output_grad = inputs.pop('dy')
    ids = {'z': inputs.pop('z')} if regime.form == 'ids' else {}

    def forward(layer: Side, inputs: Arrays, ids: Arrays) -> Tensor:
        return layer(inputs | ids)

    def forward_and_gradient(
        layer: Side, inputs: Arrays, ids: Arrays, output_grad: Tensor
    ) -> tuple[Tensor, Arrays]:
        output, pull_back = jax.vjp(lambda inputs: layer(inputs | ids), inputs)
        return output, pull_back(output_grad)

    for side, layer in jax_sides(regime).items():
        # Compile the forward pass, alone and with the gradients.
        start_time = time.perf_counter()
        lowered = jax.jit(functools.partial(forward, layer)).lower(inputs, ids)
        calls[side, 'f'] = functools.partial(_call_and_wait, lowered.compile(), inputs, ids)
        arguments = inputs, ids, output_grad
        lowered = jax.jit(functools.partial(forward_and_gradient, layer)).lower(*arguments)
        calls[side, 'fb'] = functools.partial(_call_and_wait, lowered.compile(), *arguments)
        facts[side] = {'compile': time.perf_counter() - start_time}
        # Measure the error of our order, without that of TF32.
        if side == 'mi':
            with jax.default_matmul_precision('highest'):
                output = jax.jit(functools.partial(forward, layer))(inputs, ids)
            facts[side]['error'] = relative_error(regime, arrays, np.asarray(output))
    return calls, facts


def _call_and_wait(compiled: jax.stages.Compiled, *arguments: Tensor) -> Tensor:
    return jax.block_until_ready(compiled(*arguments))


def serve(library: str, has_memory: bool) -> None:
    """Answer requests from `Worker` on stdin: the index of a regime, then sides and phases."""
    if not has_memory:
        host.keep_freed_memory()
    regimes = REGIMES + random_regimes()
    calls: dict[SidePhase, Call] = {}
    for request_line in sys.stdin:
        request = json.loads(request_line)
        if 'regime' in request:
            calls.clear()
            gc.collect()
            calls, facts = prepare(library, regimes[request['regime']])
            answer: Any = {'sides': sorted({side for side, _ in calls}), 'facts': facts}
        elif 'peak' in request:
            answer = measure_peak(library)
        else:
            call = calls[request['side'], request['phase']]
            answer = measure_memory(call) if has_memory else measure_seconds(call)
        print(json.dumps(answer), flush=True)


def measure_seconds(call: Call, wait: Callable[[object], object] = lambda result: result) -> float:
    """Return the mean seconds per call over a series of calls.

    Args:
      call: function to time.
      wait: function that waits for a result, for calls that return before they end.
    """
    start_time = time.perf_counter()
    wait(call())
    first_seconds = time.perf_counter() - start_time
    if first_seconds > 1:  # too long for a warm-up to matter
        return first_seconds
    repeats = math.ceil(0.03 / first_seconds)
    start_time = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return (time.perf_counter() - start_time) / repeats


def measure_memory(call: Call) -> float:
    """Return the peak resident bytes of a call, minus those at its start, on Linux only."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open('/proc/self/clear_refs', 'w') as proc_file:
        proc_file.write('5')  # reset the peak
    start_bytes = _read_status('VmRSS')
    call()
    return _read_status('VmHWM') - start_bytes


def _read_status(field_name: str) -> int:
    with open('/proc/self/status') as proc_file:
        line = next(line for line in proc_file if line.startswith(f'{field_name}:'))
    return 1024 * int(line.split()[1])


def measure_peak(library: str) -> float:
    """Return the operations per second of the product of two large matrices."""
    matrix = np.random.default_rng(0).normal(size=(PEAK_SIZE, PEAK_SIZE)).astype(np.float32)
    if library == 'torch':
        import torch

        tensor = torch.from_numpy(matrix)
        return 2 * PEAK_SIZE**3 / measure_seconds(lambda: tensor @ tensor)
    product = functools.partial(jax.jit(jnp.matmul), *[jnp.asarray(matrix)] * 2)
    return 2 * PEAK_SIZE**3 / measure_seconds(lambda: product().block_until_ready())


class Worker:
    """A process that runs JAX or PyTorch."""

    def __init__(self, library: str, has_memory: bool = False):
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.layers', f'--side={library}']
            + (['--measure_memory'] if has_memory else []),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._library = library

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + '\n')
        stdin.flush()
        answer_line = stdout.readline()
        if not answer_line:
            exit_code = self._process.wait()
            raise RuntimeError(
                f'{self._library} ended with exit code {exit_code} during the request {request}'
            )
        return json.loads(answer_line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()


Times = dict[tuple[str, str, str], list[float]]  # library, side, phase → seconds by round


def measure(
    workers: Mapping[str, Worker], index: int, rounds: int
) -> tuple[Times, dict[str, Facts]]:
    """Time all sides of a regime in turns and return the times, and library → facts by side."""
    answers = {library: worker.ask(regime=index) for library, worker in workers.items()}
    times: Times = {}
    slow_sides = set()
    for round_index in range(rounds + 1):  # the first round is a warm-up
        for library, worker in workers.items():
            time.sleep(0.05)  # until the other library's threads have stopped spinning
            for side in answers[library]['sides']:
                for phase in ('f', 'fb'):
                    if (library, side, phase) in slow_sides:
                        continue
                    seconds = worker.ask(side=side, phase=phase)
                    if seconds > SLOW:
                        slow_sides.add((library, side, phase))
                    if round_index or seconds > SLOW:
                        times.setdefault((library, side, phase), []).append(seconds)
    return times, {library: answer['facts'] for library, answer in answers.items()}


def peak_memory(index: int, sides: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Return (library, side) → peak resident bytes of the forward and backward pass."""
    peak_bytes = {}
    for library, side in sides:
        worker = Worker(library, has_memory=True)
        worker.ask(regime=index)
        peak_bytes[library, side] = worker.ask(side=side, phase='fb')
        worker.close()
    return peak_bytes


class Comparison(NamedTuple):
    """Median times of one phase in a regime.

    Attributes:
      ours: seconds of our layer.
      naive: name of the naive JAX side.
      naive_seconds: seconds of the naive JAX side.
      by_torch: torch side → seconds.
    """

    ours: float
    naive: str
    naive_seconds: float
    by_torch: dict[str, float]

    @property
    def best_torch(self) -> str:
        """Name of the fastest torch side."""
        return min(self.by_torch, key=lambda side: self.by_torch[side])


def compare(times: Times, phase: str) -> Comparison:
    """Return the median times of one phase."""
    medians = {
        (library, side): statistics.median(rounds)
        for (library, side, timed_phase), rounds in times.items()
        if timed_phase == phase
    }
    naive_sides = ('einsum', 'one product')
    naive = next((side for side in naive_sides if ('jax', side) in medians), 'mi')
    return Comparison(
        ours=medians['jax', 'mi'],
        naive=naive,
        naive_seconds=medians['jax', naive],
        by_torch={
            side: seconds for (library, side), seconds in medians.items() if library == 'torch'
        },
    )


def race(indices: Sequence[int]) -> list[Figure]:
    """Compare all sides of the given regimes, and print and return a row for each phase."""
    workers = {library: Worker(library) for library in ('jax', 'torch')}
    print(
        f'{"regime":<16}{"ph":<3}{"mi ms":>9}{"share":>7}{"einsum":>8}{"best torch":>22}'
        f'{"Bilinear":>9}{"MiB":>7}{"einsum":>7}{"torch":>7}{"error":>9}{"compile":>8}'
    )
    figures = []
    for index in indices:
        regime = (REGIMES + random_regimes())[index]
        # Measure the peak of both libraries around the race.
        peaks = [worker.ask(peak=True) for worker in workers.values() for _ in range(3)]
        times, facts = measure(workers, index, ROUNDS.value)
        peaks += [worker.ask(peak=True) for worker in workers.values() for _ in range(3)]
        peak = max(statistics.median(peaks[i::6]) for i in range(6))
        for phase in ('f', 'fb'):
            figure = make_figure(index, phase, compare(times, phase), peak) | facts['jax']['mi']
            figures.append(figure | {'peak_gflops': peak / 1e9})
            print(
                f'{regime.name:<16}{phase:<3}{figure["mi_ms"]:9.2f}{figure["share"]:7.2f}'
                f'{figure["einsum_over_mi"]:7.2f}×{figure["best_torch"]:>15}'
                f'{figure["best_torch_over_mi"]:6.2f}×'
                f'{figure["bilinear_over_mi"]:8.2f}×{figure["mi_mib"]:7.0f}'
                f'{figure["einsum_mib"]:7.0f}{figure["torch_mib"]:7.0f}{figure["error"]:9.1e}'
                f'{figure["compile"]:7.1f}s',
                flush=True,
            )
    for worker in workers.values():
        worker.close()
    return figures


def make_figure(index: int, phase: str, comparison: Comparison, peak: float) -> Figure:
    """Return a row of the table, with times, share of the peak, ratios and memory."""
    regime = (REGIMES + random_regimes())[index]
    best_torch = comparison.best_torch
    sides = [('jax', 'mi'), ('jax', comparison.naive), ('torch', best_torch)]
    # Memory is measured in both passes together.
    has_memory = phase == 'fb' and regime.name.startswith('R')
    peak_bytes = peak_memory(index, sides) if has_memory else dict.fromkeys(sides, math.nan)
    operations = regime.count_operations() * (3 if phase == 'fb' else 1)
    our_seconds, torch_seconds = comparison.ours, comparison.by_torch
    return {
        'regime': regime.name,
        'phase': phase,
        'mi_ms': 1e3 * our_seconds,
        'share': operations / our_seconds / peak,
        'einsum_over_mi': comparison.naive_seconds / our_seconds,
        'best_torch': best_torch,
        'best_torch_over_mi': torch_seconds[best_torch] / our_seconds,
        'bilinear_over_mi': torch_seconds.get('Bilinear', math.nan) / our_seconds,
        'mi_mib': peak_bytes['jax', 'mi'] / 2**20,
        'einsum_mib': peak_bytes['jax', comparison.naive] / 2**20,
        'torch_mib': peak_bytes['torch', best_torch] / 2**20,
    }


def _forward_and_gradient(
    order: kernels.Order, inputs: Sequence[Tensor], output_grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    output, pull_back = jax.vjp(lambda *arrays: kernels.bilinear(*arrays, order=order), *inputs)
    return output, pull_back(output_grad)


def compile_orders(regime: Regime) -> tuple[kernels.Order, dict[kernels.Order, Call]]:
    """Return the chosen order, and forward and backward calls of all orders that fit in memory."""
    arrays = {name: jnp.asarray(array) for name, array in regime.draw_arrays().items()}
    inputs, output_grad = (arrays['x'], arrays['z'], arrays['W']), arrays['dy']
    platform: Any = jax.default_backend()
    x, z = arrays['x'].shape, arrays['z'].shape
    planned_order = kernels.choose_order(x, z, regime.k, platform=platform)
    calls: dict[kernels.Order, Call] = {}
    for order in kernels.DENSE_ORDERS:
        largest_size = {'outer': regime.n * regime.m, 'z_first': regime.n * regime.k}.get(order, 0)
        if math.prod(regime.rows) * largest_size < (2**29 if platform == 'cpu' else 2**32):
            gradient = jax.jit(functools.partial(_forward_and_gradient, order))
            compiled = gradient.lower(inputs, output_grad).compile()
            calls[order] = functools.partial(compiled, inputs, output_grad)
    return planned_order, calls


def race_orders(regimes: Sequence[Regime]) -> list[Figure]:
    """Compare the chosen order with all others, and print and return a row per regime."""
    host.keep_freed_memory()
    print(f'{"B, m, n, k":<22}{"plan":>15}{"best":>16}{"plan/best":>11}   all, ms')
    figures = []
    for regime in regimes:
        planned_order, calls = compile_orders(regime)
        # Time all orders in turns; the first round is a warm-up.
        times: dict[kernels.Order, list[float]] = {order: [] for order in calls}
        for round_index in range(ROUNDS.value + 1):
            for order, call in calls.items():
                seconds = measure_seconds(call, wait=jax.block_until_ready)
                if round_index:
                    times[order].append(seconds)
        medians = {order: statistics.median(rounds) for order, rounds in times.items()}
        best_order = min(medians, key=lambda order: medians[order])
        ratio = medians[planned_order] / medians[best_order]
        choice = {'plan': planned_order, 'best': best_order, 'ratio': ratio}
        figures.append({'shape': regime.name, **choice})
        details = ', '.join(f'{order} {1e3 * seconds:.2f}' for order, seconds in medians.items())
        row = f'{regime.name:<22}{planned_order:>15}{best_order:>16}{ratio:11.2f}   {details}'
        print(row, flush=True)
    ratios = [figure['ratio'] for figure in figures]
    mean_ratio = math.exp(statistics.mean(map(math.log, ratios)))
    print(f'geometric mean {mean_ratio:.2f}, worst {max(ratios):.2f}')
    return figures


def main(argv: Sequence[str]) -> None:
    """Run the comparison, or serve as one of its workers."""
    del argv
    host.set_xla_flags()
    if SIDE.value:
        serve(SIDE.value, MEMORY.value)
        return
    print(f'{host.describe_machine()}, jax {jax.__version__}, f32')
    if ORDERS.value:
        by_name = {regime.name: regime for regime in random_regimes()}
        names = options.select(ONLY, by_name, by_beginning=True)
        figures = race_orders([by_name[name] for name in names])
        options.write_json(JSON.value, figures=figures)
        return
    options.require_cpu("PyTorch's sides")
    regime_names = [regime.name for regime in REGIMES + random_regimes()]
    names = options.select(ONLY, regime_names, by_beginning=True)
    figures = race([i for i, name in enumerate(regime_names) if name in names])
    options.write_json(JSON.value, peers=['torch'], figures=figures)


if __name__ == '__main__':
    options.run(main)
