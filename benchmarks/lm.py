"""Tokens per second of the LSTM language model's training step, against PyTorch's nn.LSTM.

    pip install -e '.[benchmark]' && python -m benchmarks.lm

Both sides: embedding → one LSTM layer → affine H → E → affine E → V, mean cross-entropy, gradient
through T steps with carried state, global-norm clipping, Adam; f32, all cores, the same allocator
settings; the sides take turns (`benchmarks.rounds`). The table has medians over the rounds, and the
median of the rounds' ratios. `plain` is ours with the recurrence left to automatic differentiation.
"""

import json
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from benchmarks import rounds
from configs import lm as configs
from mi import optim, run
from mi.cells import lstm_reference
from mi.lm import train

ROUNDS = flags.DEFINE_integer('rounds', 11, 'Interleaved rounds.', lower_bound=1)
SIDE = flags.DEFINE_string('side', None, 'For the workers: torch, plain, mi.')
SIZE = flags.DEFINE_string('size', None, 'For the workers.')
JSON = flags.DEFINE_string('json', None, 'Where to write the figures too.')

SIZES = {  # V, E, H, T, B
    'quickstart': (1024, 64, 256, 64, 32),
    'default': (256, 128, 512, 64, 32),
    'ptb': (10_000, 650, 650, 35, 20),
}


def torch_step(V: int, E: int, H: int, T: int, B: int) -> Callable[[], object]:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm = torch.nn.Embedding(V, E), torch.nn.LSTM(E, H)
            self.decoder, self.output = torch.nn.Linear(H, E), torch.nn.Linear(E, V)

        def forward(self, tokens, carry):
            h, carry = self.lstm(self.embedding(tokens), carry)
            return self.output(self.decoder(h)), carry

    model = Model()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    tokens = torch.randint(0, V, (T + 1, B))
    carry = torch.zeros(1, B, H), torch.zeros(1, B, H)

    def step() -> float:
        nonlocal carry
        logits, after = model(tokens[:-1], carry)
        carry = tuple(a.detach() for a in after)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), tokens[1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimiser.step()
        return loss.item()

    return step


def jax_step(V: int, E: int, H: int, T: int, B: int) -> Callable[[], object]:
    """The step of `mi.lm.train`, compiled as there, for one seed."""
    config = configs.get_config().unlock()
    config.model.update({'embed': E, 'hidden': H, 'site': 'none', 'tied': False, 'dropout': 0.0})
    model, optimiser = train.build(config, V), optim.optimiser(config.optim, 1000)
    seeds = jnp.zeros(1, jnp.int32)
    state = jax.vmap(lambda seed: train.init(model, optimiser, seed, B))(seeds)
    tokens = np.random.default_rng(0).integers(V, size=(1, T + 1, B)).astype(np.int32)
    compiled = train.compile_step(model, optimiser, state, seeds, tokens)

    def step() -> np.ndarray:
        nonlocal state
        state, measured = compiled(state, seeds, jnp.asarray(0), tokens)
        return np.asarray(measured['nats_per_token'])

    return step


def plain_step(*size: int) -> Callable[[], object]:
    """The same with the recurrence as a plain scan, left to automatic differentiation."""
    from mi import cells

    ours, cells.lstm = cells.lstm, lstm_reference
    try:
        return jax_step(*size)
    finally:
        cells.lstm = ours


SIDES = {'torch': torch_step, 'plain': plain_step, 'mi': jax_step}


def main(argv: Sequence[str]) -> None:
    del argv
    if SIDE.value:
        run.keep_freed_memory()
        rounds.serve(SIDES[SIDE.value](*SIZES[SIZE.value]))
        return
    print(f'{run.machine()}, jax {jax.__version__}, torch {torch.__version__}, tokens per second')
    print(f'{"size":<12}{"V, E, H, T, B":>24}', end='')
    print(f'{"torch":>10}{"plain":>10}{"mi":>10}{"mi/torch":>10}  range')
    figures = []
    for name, size in SIZES.items():
        worker = ['-m', 'benchmarks.lm', f'--size={name}']
        seconds = rounds.race({s: [*worker, f'--side={s}'] for s in SIDES}, ROUNDS.value)
        tokens = size[3] * size[4]
        rates = {side: tokens / statistics.median(s) for side, s in seconds.items()}
        ratios = sorted(t / m for t, m in zip(seconds['torch'], seconds['mi'], strict=True))
        ratio = statistics.median(ratios)
        print(
            f'{name:<12}{str(size)[1:-1]:>24}{rates["torch"]:10,.0f}{rates["plain"]:10,.0f}'
            f'{rates["mi"]:10,.0f}{ratio:10.2f}  {ratios[0]:.2f}–{ratios[-1]:.2f}',
            flush=True,
        )
        figures.append({'size': name, **rates, 'ratio': ratio, 'rounds': ROUNDS.value})
    if JSON.value:
        record = {'machine': run.machine(), 'jax': jax.__version__, 'torch': torch.__version__}
        with open(JSON.value, 'w') as file:
            json.dump(record | {'figures': figures}, file, indent=2)


if __name__ == '__main__':
    app.run(main)
