"""A race of the layers against PyTorch, naive einsum and the peak of the machine's products.

    pip install -e '.[benchmark]' && python -m benchmarks.layers

Every regime is timed in f32 with all terms (zᵀU, Vx and b too). The pass 'f' is the forward pass,
'fb' adds the gradients of x, z and all parameters. JAX and PyTorch have a process each, with the
same allocator settings, and take turns. A turn starts with an untimed call, except for calls of
more than a second.

The tables have medians over the rounds. `share` is useful operations per second over those of the
fastest product of two 2048 × 2048 matrices in the same run. A ratio above 1 means that ours is
faster. Memory, for R1 to R6, is the peak resident size above the inputs in one call of a fresh
process. The error is that of the output against float64, with products in f32 on every device.
`--orders` compares `choose_order` with every order on random shapes.
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
from absl import app, flags

from benchmarks.layer_sides import Side, jax_sides, torch_sides
from benchmarks.regimes import REGIMES, Regime, random_regimes, relative_error
from mi.kernels import bilinear as kernels
from mi.training import host

ROUNDS = flags.DEFINE_integer('rounds', 7, 'Interleaved rounds.', lower_bound=1)
ORDERS = flags.DEFINE_bool('orders', False, 'Compare the plan with every order on random shapes.')
ONLY = flags.DEFINE_list('only', [], 'Names of regimes; all by default.')
WORKER = flags.DEFINE_enum('worker', None, ['jax', 'torch'], 'For the workers.')
MEMORY = flags.DEFINE_bool('measure_memory', False, 'For the workers: measure memory, not time.')
JSON = flags.DEFINE_string('json', None, 'JSON file to write the figures to.')

PEAK_SIZE = 2048
SLOW = 5.0  # seconds: one round is enough for a side that takes longer

Call = Callable[[], Any]  # waits for its result
SidePhase = tuple[str, str]  # and phase is f or fb


def prepare(
    library: str, regime: Regime
) -> tuple[dict[SidePhase, Call], dict[str, dict[str, float]]]:
    """Return a call per side and phase, and facts by side: compile time and error."""
    arrays = regime.draw_arrays()
    if library == 'torch':
        return _prepare_torch(regime, arrays), {}
    return _prepare_jax(regime, arrays)


def _prepare_torch(regime: Regime, arrays: Mapping[str, np.ndarray]) -> dict[SidePhase, Call]:
    import torch

    calls: dict[SidePhase, Call] = {}
    a = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if regime.form == 'ids':
        a['z'] = a['z'].long()
    dy = a.pop('dy')
    differentiable = [t.requires_grad_() for t in a.values() if t.is_floating_point()]
    for side, f in torch_sides(regime).items():

        def forward(f: Side = f) -> Any:
            with torch.no_grad():
                return f(a)

        calls[side, 'f'] = forward
        calls[side, 'fb'] = lambda f=f: torch.autograd.grad(f(a), differentiable, dy)
    return calls


def _prepare_jax(
    regime: Regime, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[SidePhase, Call], dict[str, dict[str, float]]]:
    calls: dict[SidePhase, Call] = {}
    facts: dict[str, dict[str, float]] = {}
    values = {name: jnp.asarray(value) for name, value in arrays.items()}
    dy = values.pop('dy')
    ids = {'z': values.pop('z')} if regime.form == 'ids' else {}
    for side, f in jax_sides(regime).items():

        def gradient(values: Any, ids: Any, dy: Any, f: Side = f) -> Any:
            y, vjp = jax.vjp(lambda values: f(values | ids), values)
            return y, vjp(dy)

        # Compile the forward pass, alone and with the gradients.
        start = time.perf_counter()
        forward = jax.jit(lambda values, ids, f=f: f(values | ids)).lower(values, ids).compile()
        backward = jax.jit(gradient).lower(values, ids, dy).compile()
        facts[side] = {'compile': time.perf_counter() - start}
        # Measure the error of our order, without that of TF32.
        if side == 'mi':
            with jax.default_matmul_precision('highest'):
                y = jax.jit(lambda values, ids, f=f: f(values | ids))(values, ids)
            facts[side]['error'] = relative_error(regime, arrays, np.asarray(y))
        calls[side, 'f'] = lambda c=forward: jax.block_until_ready(c(values, ids))
        calls[side, 'fb'] = lambda c=backward: jax.block_until_ready(c(values, ids, dy))
    return calls, facts


def serve(library: str, has_memory: bool) -> None:
    """Answer requests of `Worker` on stdin: a regime's index, then sides and phases to measure."""
    if not has_memory:
        host.keep_freed_memory()
    regimes = REGIMES + random_regimes()
    calls: dict[SidePhase, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
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


def measure_seconds(call: Call, wait: Callable[[Any], Any] = lambda result: result) -> float:
    """Return the mean seconds per call of a series.

    Args:
      call: the call.
      wait: waits for a result, if calls return before they end.
    """
    start = time.perf_counter()
    wait(call())
    first_seconds = time.perf_counter() - start
    if first_seconds > 1:  # too long for a warm-up to matter
        return first_seconds
    repeats = math.ceil(0.03 / first_seconds)
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / repeats


def measure_memory(call: Call) -> float:
    """Return the peak resident bytes of a call above those at its start; Linux only."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # reset the peak
    start_bytes = _read_status('VmRSS')
    call()
    return _read_status('VmHWM') - start_bytes


def _read_status(key: str) -> int:
    with open('/proc/self/status') as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key + ':'))


def measure_peak(library: str) -> float:
    """Return the operations per second of the product of two large matrices."""
    a = np.random.default_rng(0).normal(size=(PEAK_SIZE, PEAK_SIZE)).astype(np.float32)
    if library == 'torch':
        import torch

        t = torch.from_numpy(a)
        return 2 * PEAK_SIZE**3 / measure_seconds(lambda: t @ t)
    product, b = jax.jit(jnp.matmul), jnp.asarray(a)
    return 2 * PEAK_SIZE**3 / measure_seconds(lambda: product(b, b).block_until_ready())


class Worker:
    """A process that runs one library."""

    def __init__(self, library: str, has_memory: bool = False):
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.layers', f'--worker={library}']
            + (['--measure_memory'] if has_memory else []),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + '\n')
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f'the worker ended at {request}')
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()


Times = dict[tuple[str, str, str], list[float]]  # library, side, phase → seconds by round


def measure(
    workers: Mapping[str, Worker], index: int, rounds: int
) -> tuple[Times, dict[str, dict[str, dict[str, float]]]]:
    """Time all sides of a regime in turns; return the times, and facts by library and side."""
    prepared = {library: worker.ask(regime=index) for library, worker in workers.items()}
    times: Times = {}
    slow_sides = set()
    for i in range(rounds + 1):  # the first round is a warm-up
        for library, worker in workers.items():
            time.sleep(0.05)  # until the other library's threads have stopped spinning
            for side in prepared[library]['sides']:
                for phase in ('f', 'fb'):
                    if (library, side, phase) in slow_sides:
                        continue
                    seconds = worker.ask(side=side, phase=phase)
                    if seconds > SLOW:
                        slow_sides.add((library, side, phase))
                    if i or seconds > SLOW:
                        times.setdefault((library, side, phase), []).append(seconds)
    return times, {library: answer['facts'] for library, answer in prepared.items()}


def peak_memory(index: int, sides: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Return the peak resident bytes of both passes by library and side."""
    peaks = {}
    for library, side in sides:
        worker = Worker(library, has_memory=True)
        worker.ask(regime=index)
        peaks[library, side] = worker.ask(side=side, phase='fb')
        worker.close()
    return peaks


class Comparison(NamedTuple):
    """Median seconds of one phase in a regime.

    Attributes:
      ours: of our layer.
      naive: name of the naive side of JAX.
      naive_seconds: its seconds.
      by_torch: side of torch → its seconds.
    """

    ours: float
    naive: str
    naive_seconds: float
    by_torch: dict[str, float]

    @property
    def best_torch(self) -> str:
        """Name of torch's fastest side."""
        return min(self.by_torch, key=lambda side: self.by_torch[side])


def compare(times: Times, phase: str) -> Comparison:
    """Return the medians of one phase."""
    medians = {
        (library, side): statistics.median(rounds)
        for (library, side, timed_phase), rounds in times.items()
        if timed_phase == phase
    }
    naive = next((s for s in ('einsum', 'one product') if ('jax', s) in medians), 'mi')
    return Comparison(
        ours=medians['jax', 'mi'],
        naive=naive,
        naive_seconds=medians['jax', naive],
        by_torch={side: s for (library, side), s in medians.items() if library == 'torch'},
    )


def race(indices: Sequence[int]) -> list[dict[str, Any]]:
    """Race all sides of the regimes with these indices; print and return a figure per phase."""
    workers = {library: Worker(library) for library in ('jax', 'torch')}
    print(
        f'{"regime":<16}{"ph":<3}{"mi ms":>9}{"share":>7}{"einsum":>8}{"best torch":>22}'
        f'{"Bilinear":>9}{"MiB":>7}{"einsum":>7}{"torch":>7}{"error":>9}{"compile":>8}'
    )
    figures = []
    for index in indices:
        regime = (REGIMES + random_regimes())[index]
        # Measure the peak of both libraries around the race.
        peaks = [w.ask(peak=True) for w in workers.values() for _ in range(3)]
        times, facts = measure(workers, index, ROUNDS.value)
        peaks += [w.ask(peak=True) for w in workers.values() for _ in range(3)]
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


def make_figure(index: int, phase: str, comparison: Comparison, peak: float) -> dict[str, Any]:
    """Return a row of the table: times, share of the peak, ratios and memory."""
    regime = (REGIMES + random_regimes())[index]
    best = comparison.best_torch
    sides = [('jax', 'mi'), ('jax', comparison.naive), ('torch', best)]
    # Memory is measured in both passes together.
    has_memory = phase == 'fb' and regime.name.startswith('R')
    used = peak_memory(index, sides) if has_memory else dict.fromkeys(sides, math.nan)
    operations = regime.count_operations() * (3 if phase == 'fb' else 1)
    ours, by_torch = comparison.ours, comparison.by_torch
    return {
        'regime': regime.name,
        'phase': phase,
        'mi_ms': 1e3 * ours,
        'share': operations / ours / peak,
        'einsum_over_mi': comparison.naive_seconds / ours,
        'best_torch': best,
        'best_torch_over_mi': by_torch[best] / ours,
        'bilinear_over_mi': by_torch.get('Bilinear', math.nan) / ours,
        'mi_mib': used['jax', 'mi'] / 2**20,
        'einsum_mib': used['jax', comparison.naive] / 2**20,
        'torch_mib': used['torch', best] / 2**20,
    }


def _gradient(order: kernels.Order, args: Sequence[Any], dy: Any) -> Any:
    y, vjp = jax.vjp(lambda *a: kernels.bilinear(*a, order=order), *args)
    return y, vjp(dy)


def compile_orders(regime: Regime) -> tuple[kernels.Order, dict[kernels.Order, Call]]:
    """Return the planned order, and forward and backward calls of all that fit into memory."""
    arrays = {name: jnp.asarray(value) for name, value in regime.draw_arrays().items()}
    args, dy = (arrays['x'], arrays['z'], arrays['W']), arrays['dy']
    platform: Any = jax.default_backend()
    planned = kernels.choose_order(args[0].shape, args[1].shape, regime.k, platform=platform)
    calls: dict[kernels.Order, Call] = {}
    for order in kernels.DENSE_ORDERS:
        largest = {'outer': regime.n * regime.m, 'z_first': regime.n * regime.k}.get(order, 0)
        if math.prod(regime.rows) * largest < (2**29 if platform == 'cpu' else 2**32):
            gradient = jax.jit(functools.partial(_gradient, order))
            compiled = gradient.lower(args, dy).compile()
            calls[order] = functools.partial(compiled, args, dy)
    return planned, calls


def race_orders() -> list[dict[str, Any]]:
    """Race the planned order against all others; print and return a figure per random shape."""
    host.keep_freed_memory()
    print(f'{"B, m, n, k":<22}{"plan":>15}{"best":>16}{"plan/best":>11}   all, ms')
    figures = []
    for regime in random_regimes():
        planned, calls = compile_orders(regime)
        # Time all orders in turns; the first round is a warm-up.
        times: dict[kernels.Order, list[float]] = {order: [] for order in calls}
        for i in range(ROUNDS.value + 1):
            for order, call in calls.items():
                seconds = measure_seconds(call, wait=jax.block_until_ready)
                if i:
                    times[order].append(seconds)
        medians = {order: statistics.median(rounds) for order, rounds in times.items()}
        best = min(medians, key=lambda order: medians[order])
        ratio = medians[planned] / medians[best]
        figures.append({'shape': regime.name, 'plan': planned, 'best': best, 'ratio': ratio})
        details = ', '.join(f'{order} {1e3 * s:.2f}' for order, s in medians.items())
        print(f'{regime.name:<22}{planned:>15}{best:>16}{ratio:11.2f}   {details}', flush=True)
    ratios = [figure['ratio'] for figure in figures]
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    print(f'geometric mean {mean:.2f}, worst {max(ratios):.2f}')
    return figures


def main(argv: Sequence[str]) -> None:
    """Run the race, or serve as one of its workers."""
    del argv
    if WORKER.value:
        serve(WORKER.value, MEMORY.value)
        return
    print(f'{host.describe_machine()}, jax {jax.__version__}, f32')
    if ORDERS.value:
        figures = race_orders()
    else:
        names = [regime.name for regime in REGIMES + random_regimes()]
        for name in ONLY.value:
            if not any(known.startswith(name) for known in names):
                raise app.UsageError(f'--only: unknown regime {name!r}; known: {", ".join(names)}')
        figures = race(
            [i for i, n in enumerate(names) if not ONLY.value or n.startswith(tuple(ONLY.value))]
        )
    if JSON.value:
        record = {'machine': host.describe_machine(), 'jax': jax.__version__, 'figures': figures}
        with open(JSON.value, 'w') as file:
            json.dump(record, file, indent=2)


if __name__ == '__main__':
    app.run(main)
