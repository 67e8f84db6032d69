"""The layers against PyTorch, naive einsum and the machine's matrix products, forward and backward.

    pip install -e '.[benchmark]' && python -m benchmarks.layers

Every regime is timed with all terms (zᵀU, Vx and b too) in f32; 'fb' is the forward pass and the
gradients of x, z and all parameters. Ours and PyTorch's sides have a process each with the same
allocator settings, take turns, and a turn starts with an untimed call, but for calls of more than a
second. The tables have medians over the rounds: `share` is useful operations over time, of the
fastest product of two 2048 × 2048 matrices of the same run; a ratio above 1 means that ours is
faster. Memory, for R1 to R6, is the peak resident size above inputs in one call of a fresh process;
the error is that of the output against float64, with products in f32 on every device. `--orders`
compares `contract.choose_order` with every order on shapes drawn at random.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import mi
from mi.kernels import bilinear as kernels_bilinear
from mi.motifs.normalization import FeatureWiseModulation
from mi.training import host

ROUNDS = flags.DEFINE_integer('rounds', 7, 'Interleaved rounds.', lower_bound=1)
ORDERS = flags.DEFINE_bool('orders', False, 'The rule against every order, on random shapes.')
ONLY = flags.DEFINE_list('only', [], 'Names of regimes; all by default.')
WORKER = flags.DEFINE_enum('worker', None, ['jax', 'torch'], 'For the workers.')
MEMORY = flags.DEFINE_bool('measure_memory', False, 'For the workers: measure memory, not time.')
JSON = flags.DEFINE_string('json', None, 'Where to write the figures too.')

PEAK = 2048


@dataclasses.dataclass(frozen=True)
class Regime:
    """A layer and its sizes; x is [rows, n] or [S, T, n], z the same or [S, 1, m]."""

    name: str
    form: str  # full, ids, film, low_rank
    rows: tuple[int, ...]
    m: int
    n: int
    k: int
    shared: bool = False
    rank: int = 0
    ids: str = ''  # balanced, random, skewed

    def operations(self) -> int:
        """Of the products in the order with fewest, forward."""
        B, m, n, k, r = math.prod(self.rows), self.m, self.n, self.k, self.rank
        if self.form == 'film':
            return 4 * B * m * n
        if self.form == 'ids':
            return 2 * B * n * k
        if self.form == 'low_rank':
            return 2 * B * (m * r + n * r + r * k + (m + n) * k)
        S = self.rows[0] if self.shared else B
        return 2 * (S * m * n * k + S * m * k + B * n * k * (2 if self.shared else 1))

    def z_rows(self) -> tuple[int, ...]:
        return (self.rows[0], 1) if self.shared else self.rows

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        m, n, k, r = self.m, self.n, self.k, self.rank

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return rng.normal(scale=scale, size=shape).astype(np.float32)

        a = {'x': normal(*self.rows, n), 'dy': normal(*self.rows, k)}
        if self.form == 'ids':
            B = math.prod(self.rows)
            p = np.arange(1, m + 1.0) ** -1.5
            drawn = {
                'balanced': np.arange(B) % m,
                'random': rng.integers(m, size=B),
                'skewed': rng.choice(m, size=B, p=p / p.sum()),
            }
            a |= {'z': drawn[self.ids].astype(np.int32), 'W': normal(m, n, k, scale=n**-0.5)}
            return a | {'U': normal(m, k)}
        a['z'] = normal(*self.z_rows(), m)
        if self.form == 'film':
            return a | {'gamma': normal(m, n, scale=m**-0.5), 'beta': normal(m, n, scale=m**-0.5)}
        a |= {'U': normal(m, k, scale=m**-0.5), 'V': normal(n, k, scale=n**-0.5), 'b': normal(k)}
        if self.form == 'low_rank':
            a |= {'P': normal(m, r, scale=m**-0.5), 'Q': normal(n, r, scale=n**-0.5)}
            return a | {'O': normal(r, k, scale=r**-0.5)}
        return a | {'W': normal(m, n, k, scale=(m * n) ** -0.5)}


REGIMES = [
    Regime('R1 narrow out', 'full', (256,), 30, 256, 15),
    Regime('R2 shared T=20', 'full', (32, 20), 32, 256, 256, shared=True),
    Regime('R3 large', 'full', (1024,), 64, 512, 512),
    Regime('R4 ids balanced', 'ids', (512,), 30, 256, 256, ids='balanced'),
    Regime('R4 ids random', 'ids', (512,), 30, 256, 256, ids='random'),
    Regime('R4 ids skewed', 'ids', (512,), 30, 256, 256, ids='skewed'),
    Regime('R5 FiLM', 'film', (4096,), 128, 1024, 1024),
    Regime('R6 low rank', 'low_rank', (4096,), 64, 512, 512, rank=64),
    *(
        Regime(f'T = {T}', 'full', (1024 // T, T), 32, 256, 256, shared=True)
        for T in (1, 2, 4, 8, 32)
    ),
    Regime('B = 1', 'full', (1,), 32, 256, 256),
    Regime('B = 8', 'full', (8,), 32, 256, 256),
]


def random_regimes() -> list[Regime]:
    """A dozen shapes, the same at every run, some of them larger on a GPU."""
    rng = np.random.default_rng(20_200_426)
    octaves, most = (11, 2e10) if jax.default_backend() == 'cpu' else (16, 1e12)
    regimes: list[Regime] = []
    while len(regimes) < 12:
        B = int(2 ** rng.uniform(0, octaves))
        m, n, k = (int(2 ** rng.uniform(3, 9)) for _ in range(3))
        if B * m * n * k < most:
            regimes.append(Regime(f'{B}, {m}, {n}, {k}', 'full', (B,), m, n, k))
    return regimes


Side = Callable[[dict[str, Any]], Any]


def jax_sides(regime: Regime) -> dict[str, Side]:
    """Functions of all arrays but dy, ours first."""
    module: Any
    if regime.form == 'film':
        module = FeatureWiseModulation()

        def film(a: dict[str, Any]) -> Any:
            zeros = jnp.zeros(regime.n)
            p = {name: {'V': a[name], 'b': zeros} for name in ('gamma', 'beta')}
            return module.apply({'params': p}, a['x'], a['z'])

        def one_product(a: dict[str, Any]) -> Any:
            both = a['z'] @ jnp.concatenate([a['gamma'], a['beta']], axis=1)
            gamma, beta = jnp.split(both, 2, axis=1)
            return (1 + gamma) * a['x'] + beta

        return {'mi': film, 'one product': one_product}
    if regime.form == 'ids':
        module = mi.MultiHead(regime.k, contexts=regime.m)

        def dense(a: dict[str, Any]) -> Any:
            z = jax.nn.one_hot(a['z'], regime.m)
            return jnp.einsum('bm,mnk,bn->bk', z, a['W'], a['x']) + z @ a['U']

        def gather(a: dict[str, Any]) -> Any:
            return jnp.einsum('bn,bnk->bk', a['x'], a['W'][a['z']]) + a['U'][a['z']]

        ours = lambda a: module.apply({'params': {n: a[n] for n in 'WU'}}, a['x'], a['z'])  # noqa: E731
        return {'mi': ours, 'einsum': dense, 'gather': gather}
    if regime.form == 'low_rank':
        module, names = mi.LowRankMultiplicativeInteraction(regime.k, rank=regime.rank), 'PQOUVb'
        naive = 'bm,mr,nr,rk,bn->bk', 'zPQOx'
    else:
        module, names = mi.MultiplicativeInteraction(regime.k), 'WUVb'
        naive = ('sm,mnk,stn->stk' if regime.shared else 'bm,mnk,bn->bk'), 'zWx'

    def einsum(a: dict[str, Any]) -> Any:
        squeezed = a | {'z': a['z'][:, 0]} if regime.shared else a
        y = jnp.einsum(naive[0], *(squeezed[name] for name in naive[1]))
        return y + a['z'] @ a['U'] + a['x'] @ a['V'] + a['b']

    ours = lambda a: module.apply({'params': {n: a[n] for n in names}}, a['x'], a['z'])  # noqa: E731
    return {'mi': ours, 'einsum': einsum}


def torch_sides(regime: Regime) -> dict[str, Side]:
    """PyTorch's own layer, and orders written by hand."""
    import torch

    F = torch.nn.functional
    m, n, k = regime.m, regime.n, regime.k
    if regime.form == 'film':

        def film(a: dict[str, Any]) -> Any:
            return (1 + a['z'] @ a['gamma']) * a['x'] + a['z'] @ a['beta']

        return {'by hand': film, 'compiled': torch.compile(film)}
    if regime.form == 'ids':

        def loop(a: dict[str, Any]) -> Any:
            y = torch.zeros(*a['x'].shape[:-1], k)
            for i in range(m):
                rows = (a['z'] == i).nonzero()[:, 0]
                y = y.index_add(0, rows, torch.addmm(a['U'][i], a['x'][rows], a['W'][i]))
            return y

        def sort_and_split(a: dict[str, Any]) -> Any:
            order = torch.argsort(a['z'])
            parts = torch.split(a['x'][order], torch.bincount(a['z'], minlength=m).tolist())
            y = torch.cat([x @ W for x, W in zip(parts, a['W'].unbind(0), strict=True)])
            return y[torch.argsort(order)] + a['U'][a['z']]

        return {'loop over ids': loop, 'sort and split': sort_and_split}

    def rest(a: dict[str, Any]) -> Any:
        return a['z'] @ a['U'] + F.linear(a['x'], a['V'].T, a['b'])

    if regime.form == 'low_rank':
        return {'by hand': lambda a: ((a['z'] @ a['P']) * (a['x'] @ a['Q'])) @ a['O'] + rest(a)}

    def bilinear(a: dict[str, Any]) -> Any:  # torch.nn.Bilinear's function
        z = a['z'].expand(*a['x'].shape[:-1], m).contiguous()
        return F.bilinear(z, a['x'], a['W'].permute(2, 0, 1)) + rest(a)

    def x_first(a: dict[str, Any]) -> Any:
        x = a['x'].reshape(-1, n)
        xW = (x @ a['W'].transpose(0, 1).reshape(n, m * k)).view(-1, m, k)
        z = a['z'].expand(*a['x'].shape[:-1], m).reshape(-1, 1, m)
        return torch.bmm(z, xW).view(*a['x'].shape[:-1], k) + rest(a)

    def z_first(a: dict[str, Any]) -> Any:
        zW = (a['z'].reshape(-1, m) @ a['W'].view(m, n * k)).view(-1, n, k)
        x = a['x'].reshape(zW.shape[0], -1, n)
        return torch.bmm(x, zW).view(*a['x'].shape[:-1], k) + rest(a)

    sides = {'Bilinear': bilinear, 'x first': x_first}
    if regime.shared or math.prod(regime.rows) * n * k < 2**28:
        sides['z first'] = z_first
    return sides


def prepare(library: str, regime: Regime) -> tuple[dict[tuple[str, str], Callable[[], Any]], dict]:
    """(side, phase) → a call that waits for its result; and facts about each."""
    arrays = regime.arrays()
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    facts: dict[str, Any] = {}
    if library == 'torch':
        import torch

        a = {name: torch.from_numpy(value) for name, value in arrays.items()}
        if regime.form == 'ids':
            a['z'] = a['z'].long()
        dy = a.pop('dy')
        wanted = [t.requires_grad_() for t in a.values() if t.is_floating_point()]
        for side, f in torch_sides(regime).items():

            def forward(f: Side = f) -> Any:
                with torch.no_grad():
                    return f(a)

            calls[side, 'f'] = forward
            calls[side, 'fb'] = lambda f=f: torch.autograd.grad(f(a), wanted, dy)
        return calls, facts

    values = {name: jnp.asarray(value) for name, value in arrays.items()}
    dy = values.pop('dy')
    ids = {'z': values.pop('z')} if regime.form == 'ids' else {}
    for side, f in jax_sides(regime).items():

        def gradient(values: Any, ids: Any, dy: Any, f: Side = f) -> Any:
            y, vjp = jax.vjp(lambda values: f(values | ids), values)
            return y, vjp(dy)

        start = time.perf_counter()
        forward = jax.jit(lambda values, ids, f=f: f(values | ids)).lower(values, ids).compile()
        both = jax.jit(gradient).lower(values, ids, dy).compile()
        facts[side] = {'compile': time.perf_counter() - start}
        if side == 'mi':
            with jax.default_matmul_precision('highest'):  # of the order, not of TF32
                y = jax.jit(lambda values, ids, f=f: f(values | ids))(values, ids)
            facts[side]['error'] = error(regime, arrays, np.asarray(y))
        calls[side, 'f'] = lambda c=forward: jax.block_until_ready(c(values, ids))
        calls[side, 'fb'] = lambda c=both: jax.block_until_ready(c(values, ids, dy))
    return calls, facts


def error(regime: Regime, arrays: dict[str, np.ndarray], y: np.ndarray) -> float:
    """‖y − exact‖ / ‖exact‖ on the first rows, exact in float64."""
    a = {name: v.astype(np.float64) for name, v in arrays.items() if v.dtype != np.int32}
    x = a['x'].reshape(-1, regime.n)[:16]
    if regime.form == 'ids':
        z = arrays['z'][:16]
        exact = np.einsum('bn,bnk->bk', x, a['W'][z]) + a['U'][z]
    else:
        z = np.broadcast_to(a['z'], (*regime.rows, regime.m)).reshape(-1, regime.m)[:16]
        if regime.form == 'film':
            exact = (1 + z @ a['gamma']) * x + z @ a['beta']
        else:
            W = a['W'] if 'W' in a else np.einsum('mr,nr,rk->mnk', a['P'], a['Q'], a['O'])
            exact = np.einsum('bn,bnk->bk', x, np.einsum('bm,mnk->bnk', z, W))
            exact += z @ a['U'] + x @ a['V'] + a['b']
    off = y.reshape(-1, y.shape[-1])[:16] - exact
    return float(np.linalg.norm(off) / np.linalg.norm(exact))


def work(library: str, memory: bool) -> None:
    """A worker: reads a regime's index, then (side, phase) lines, and answers with seconds."""
    if not memory:
        host.keep_freed_memory()
    regimes = REGIMES + random_regimes()
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if 'regime' in request:
            calls.clear()
            gc.collect()
            calls, facts = prepare(library, regimes[request['regime']])
            answer: Any = {'sides': sorted({side for side, _ in calls}), 'facts': facts}
        elif 'peak' in request:
            answer = peak(library)
        else:
            call = calls[request['side'], request['phase']]
            answer = resident(call) if memory else seconds(call)
        print(json.dumps(answer), flush=True)


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: result) -> float:
    """Of a call, in a row of them; `wait` is for the last, where calls return before they end."""
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    if once > 1:  # nothing to warm up
        return once
    repeats = math.ceil(0.03 / once)
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / repeats


def resident(call: Callable[[], Any]) -> float:
    """Peak resident bytes of a call above those before it; Linux."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # forgets the peak
    before = _status('VmRSS')
    call()
    return _status('VmHWM') - before


def _status(key: str) -> int:
    with open('/proc/self/status') as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key + ':'))


def peak(library: str) -> float:
    """Operations per second of the product of two large matrices."""
    a = np.random.default_rng(0).normal(size=(PEAK, PEAK)).astype(np.float32)
    if library == 'torch':
        import torch

        t = torch.from_numpy(a)
        return 2 * PEAK**3 / seconds(lambda: t @ t)
    product, b = jax.jit(jnp.matmul), jnp.asarray(a)
    return 2 * PEAK**3 / seconds(lambda: product(b, b).block_until_ready())


class Worker:
    """A process of one library."""

    def __init__(self, library: str, memory: bool = False):
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.layers', f'--worker={library}']
            + (['--measure_memory'] if memory else []),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + '\n')
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f'the worker ended at {request}')
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()


def measure(workers: dict[str, Worker], index: int, rounds: int) -> tuple[dict, dict]:
    """(library, side, phase) → seconds by round, and the facts."""
    started = {library: worker.ask(regime=index) for library, worker in workers.items()}
    times: dict[tuple[str, str, str], list[float]] = {}
    slow = set()
    for i in range(rounds + 1):
        for library, worker in workers.items():
            time.sleep(0.05)  # the threads of the library before spin for a while
            for side in started[library]['sides']:
                for phase in ('f', 'fb'):
                    if (library, side, phase) in slow:
                        continue
                    took = worker.ask(side=side, phase=phase)
                    if took > 5:  # tens of times what is compared: one round of it will do
                        slow.add((library, side, phase))
                    if i or took > 5:
                        times.setdefault((library, side, phase), []).append(took)
    return times, {library: s['facts'] for library, s in started.items()}


def memory(index: int, sides: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """(library, side) → peak resident bytes of forward and backward."""
    result = {}
    for library, side in sides:
        worker = Worker(library, memory=True)
        worker.ask(regime=index)
        result[library, side] = worker.ask(side=side, phase='fb')
        worker.close()
    return result


def table(chosen: list[int]) -> list[dict[str, Any]]:
    workers = {library: Worker(library) for library in ('jax', 'torch')}
    print(
        f'{"regime":<16}{"ph":<3}{"mi ms":>9}{"share":>7}{"einsum":>8}{"best torch":>22}'
        f'{"Bilinear":>9}{"MiB":>7}{"einsum":>7}{"torch":>7}{"error":>9}{"compile":>8}'
    )
    figures = []
    for index in chosen:
        regime = (REGIMES + random_regimes())[index]
        peaks = [w.ask(peak=True) for w in workers.values() for _ in range(3)]
        times, facts = measure(workers, index, ROUNDS.value)
        peaks += [w.ask(peak=True) for w in workers.values() for _ in range(3)]
        fastest = max(statistics.median(peaks[i::6]) for i in range(6))
        for phase in ('f', 'fb'):
            took = {
                (library, side): statistics.median(s)
                for (library, side, p), s in times.items() if p == phase
            }  # fmt: skip
            ours = took['jax', 'mi']
            naive = next((s for s in ('einsum', 'one product') if ('jax', s) in took), 'mi')
            by_torch = {side: t for (library, side), t in took.items() if library == 'torch'}
            best = min(by_torch, key=lambda side: by_torch[side])
            sides = [('jax', 'mi'), ('jax', naive), ('torch', best)]
            if phase == 'f' or not regime.name.startswith('R'):
                used = dict.fromkeys(sides, math.nan)
            else:
                used = memory(index, sides)
            share = regime.operations() * (3 if phase == 'fb' else 1) / ours / fastest
            figure = {
                'regime': regime.name, 'phase': phase, 'mi_ms': 1e3 * ours, 'share': share,
                'einsum_over_mi': took['jax', naive] / ours, 'best_torch': best,
                'best_torch_over_mi': by_torch[best] / ours,
                'bilinear_over_mi': by_torch.get('Bilinear', math.nan) / ours,
                'mi_mib': used['jax', 'mi'] / 2**20, 'einsum_mib': used['jax', naive] / 2**20,
                'torch_mib': used['torch', best] / 2**20, **facts['jax']['mi'],
                'peak_gflops': fastest / 1e9,
            }  # fmt: skip
            figures.append(figure)
            print(
                f'{regime.name:<16}{phase:<3}{figure["mi_ms"]:9.2f}{share:7.2f}'
                f'{figure["einsum_over_mi"]:7.2f}×{best:>15}{figure["best_torch_over_mi"]:6.2f}×'
                f'{figure["bilinear_over_mi"]:8.2f}×{figure["mi_mib"]:7.0f}'
                f'{figure["einsum_mib"]:7.0f}{figure["torch_mib"]:7.0f}{figure["error"]:9.1e}'
                f'{figure["compile"]:7.1f}s',
                flush=True,
            )
    for worker in workers.values():
        worker.close()
    return figures


def _gradient(order: kernels_bilinear.Order, args: Any, dy: Any) -> Any:
    y, vjp = jax.vjp(lambda *a: kernels_bilinear.bilinear(*a, order=order), *args)
    return y, vjp(dy)


def orders() -> list[dict[str, Any]]:
    """The order that `plan` takes against the fastest of all, forward and backward."""
    host.keep_freed_memory()
    print(f'{"B, m, n, k":<22}{"plan":>15}{"best":>16}{"plan/best":>11}   all, ms')
    figures = []
    for regime in random_regimes():
        a = {name: jnp.asarray(v) for name, v in regime.arrays().items()}
        args, dy = (a['x'], a['z'], a['W']), a['dy']
        platform: Any = jax.default_backend()
        planned = kernels_bilinear.choose_order(
            args[0].shape, args[1].shape, regime.k, platform=platform
        )
        calls = {}
        for order in kernels_bilinear.DENSE_ORDERS:
            largest = {'outer': regime.n * regime.m, 'z_first': regime.n * regime.k}.get(order, 0)
            if math.prod(regime.rows) * largest < (2**29 if platform == 'cpu' else 2**32):
                gradient = jax.jit(functools.partial(_gradient, order))
                compiled = gradient.lower(args, dy).compile()
                calls[order] = functools.partial(compiled, args, dy)
        took = {order: [] for order in calls}
        for i in range(ROUNDS.value + 1):
            for order, call in calls.items():
                s = seconds(call, wait=jax.block_until_ready)
                if i:
                    took[order].append(s)
        medians = {order: statistics.median(s) for order, s in took.items()}
        best = min(medians, key=lambda order: medians[order])
        ratio = medians[planned] / medians[best]
        figures.append({'shape': regime.name, 'plan': planned, 'best': best, 'ratio': ratio})
        every = ', '.join(f'{order} {1e3 * s:.2f}' for order, s in medians.items())
        print(f'{regime.name:<22}{planned:>15}{best:>16}{ratio:11.2f}   {every}', flush=True)
    ratios = [f['ratio'] for f in figures]
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    print(f'geometric mean {mean:.2f}, worst {max(ratios):.2f}')
    return figures


def main(argv: Sequence[str]) -> None:
    del argv
    if WORKER.value:
        work(WORKER.value, MEMORY.value)
        return
    print(f'{host.machine()}, jax {jax.__version__}, f32')
    if ORDERS.value:
        figures = orders()
    else:
        names = [regime.name for regime in REGIMES + random_regimes()]
        for name in ONLY.value:
            if not any(known.startswith(name) for known in names):
                raise app.UsageError(f'--only: unknown regime {name!r}; known: {", ".join(names)}')
        figures = table(
            [i for i, n in enumerate(names) if not ONLY.value or n.startswith(tuple(ONLY.value))]
        )
    if JSON.value:
        record = {'machine': host.machine(), 'jax': jax.__version__, 'figures': figures}
        with open(JSON.value, 'w') as file:
            json.dump(record, file, indent=2)


if __name__ == '__main__':
    app.run(main)
