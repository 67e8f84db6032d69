"""The layers and sizes that `benchmarks.layers` and `benchmarks.layers_tpu` measure."""

import dataclasses
import math

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Regime:
    """A layer and its sizes.

    Attributes:
      name: title for tables.
      form: 'full', 'ids', 'film' or 'low_rank'.
      rows: leading axes of x, [B] or [S, T].
      m: number of features of z, or number of ids.
      n: number of features of x.
      k: number of features of y.
      shared: whether z is [S, 1, m] and shared along T.
      rank: rank, for the form 'low_rank'.
      ids: distribution of the ids, for the form 'ids': 'balanced', 'random' or 'skewed'.
    """

    name: str
    form: str
    rows: tuple[int, ...]
    m: int
    n: int
    k: int
    shared: bool = False
    rank: int = 0
    ids: str = ''

    def count_operations(self) -> int:
        """Return the number of operations in the forward products, in the cheapest order."""
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
        """Leading axes of z."""
        return (self.rows[0], 1) if self.shared else self.rows

    def draw_arrays(self) -> dict[str, np.ndarray]:
        """Draw x, z, the parameters and the cotangent dy of y."""
        rng = np.random.default_rng(0)
        m, n, k, r = self.m, self.n, self.k, self.rank

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return rng.normal(scale=scale, size=shape).astype(np.float32)

        arrays = {'x': normal(*self.rows, n), 'dy': normal(*self.rows, k)}
        # One id per row, with the distribution of the regime.
        if self.form == 'ids':
            B = math.prod(self.rows)
            id_weights = np.arange(1, m + 1.0) ** -1.5
            id_arrays = {
                'balanced': np.arange(B) % m,
                'random': rng.integers(m, size=B),
                'skewed': rng.choice(m, size=B, p=id_weights / id_weights.sum()),
            }
            arrays['z'] = id_arrays[self.ids].astype(np.int32)
            return arrays | {'W': normal(m, n, k, scale=n**-0.5), 'U': normal(m, k)}

        # All other forms have a context of numbers.
        arrays['z'] = normal(*self.z_rows(), m)
        if self.form == 'film':
            gamma, beta = (normal(m, n, scale=m**-0.5) for _ in range(2))
            return arrays | {'gamma': gamma, 'beta': beta}
        arrays['U'], arrays['V'] = normal(m, k, scale=m**-0.5), normal(n, k, scale=n**-0.5)
        arrays['b'] = normal(k)
        if self.form == 'low_rank':
            arrays |= {'P': normal(m, r, scale=m**-0.5), 'Q': normal(n, r, scale=n**-0.5)}
            return arrays | {'O': normal(r, k, scale=r**-0.5)}
        return arrays | {'W': normal(m, n, k, scale=(m * n) ** -0.5)}


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
    """Return a dozen random regimes, the same in every run. Some are larger on a GPU."""
    rng = np.random.default_rng(20_200_426)
    octaves, max_operations = (11, 2e10) if jax.default_backend() == 'cpu' else (16, 1e12)
    regimes: list[Regime] = []
    while len(regimes) < 12:
        B = int(2 ** rng.uniform(0, octaves))
        m, n, k = (int(2 ** rng.uniform(3, 9)) for _ in range(3))
        if B * m * n * k < max_operations:
            regimes.append(Regime(f'{B}, {m}, {n}, {k}', 'full', (B,), m, n, k))
    return regimes


def relative_error(regime: Regime, arrays: dict[str, np.ndarray], output: np.ndarray) -> float:
    """Return ‖output − exact‖ / ‖exact‖ over the first 16 rows, where exact is in float64."""
    terms = {
        name: array.astype(np.float64) for name, array in arrays.items() if array.dtype != np.int32
    }
    x = terms['x'].reshape(-1, regime.n)[:16]
    if regime.form == 'ids':
        z = arrays['z'][:16]
        exact = np.einsum('bn,bnk->bk', x, terms['W'][z]) + terms['U'][z]
    else:
        z = np.broadcast_to(terms['z'], (*regime.rows, regime.m)).reshape(-1, regime.m)[:16]
        if regime.form == 'film':
            exact = (1 + z @ terms['gamma']) * x + z @ terms['beta']
        else:
            if regime.form == 'low_rank':
                W = np.einsum('mr,nr,rk->mnk', terms['P'], terms['Q'], terms['O'])
            else:
                W = terms['W']
            exact = np.einsum('bn,bnk->bk', x, np.einsum('bm,mnk->bnk', z, W))
            exact += z @ terms['U'] + x @ terms['V'] + terms['b']
    difference = output.reshape(-1, output.shape[-1])[:16] - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))
