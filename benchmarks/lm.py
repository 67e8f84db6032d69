"""A comparison of language-model training steps with PyTorch, in tokens per second.

    pip install -e '.[benchmark]' && python -m benchmarks.lm

    lstm          embedding → one LSTM layer → affine H → E → affine E → V, against nn.LSTM. `plain`
                  uses automatic differentiation of our recurrence. `products` computes only the six
                  products of the layer, as if its gates cost nothing
    transformer   pre-norm blocks with RMSNorm, rotary positions and SwiGLU, against the same in
                  torch with scaled_dot_product_attention, eager and compiled
    cells         every cell of mi.cells against the plain LSTM
    fusions       every fusion at the encoder, at the decoder and at both, against concat at the
                  same site. All have as many parameters as concat
    loop          a run of the trainer with data, logs and checkpoints, against training steps alone

All sides have mean cross-entropy, gradients through T steps with carried state, global-norm
clipping and Adam, in f32 on all cores with the same allocator settings. They take turns
(`benchmarks.rounds`) and wait for every step. The table shows medians over the rounds, and the
median over rounds of the ratio to the first side.

Sizes are larger on a GPU. There, torch's LSTM is cuDNN's, and so is ours in the side `cudnn`
(`config.model.impl`). Both sides use TF32 for f32 products. Both Transformers are bf16 with f32
parameters (autocast in torch).
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax import Array

from benchmarks import lm_sizes, options, rounds
from configs import lm as configs
from mi import cells
from mi.cells import Carry
from mi.cells import lstm as lstm_cell
from mi.config import UserError
from mi.fusion import FUSIONS, ONE_HOT
from mi.kernels.linear import linear
from mi.kernels.lstm import LSTMWeights, lstm_reference
from mi.lm import factory, train
from mi.lm.data.batches import Batch
from mi.training import host, sharding

CPU_TIME = flags.DEFINE_bool('cpu_time', False, 'Measure the CPU time of one thread.')
ROUNDS = options.define_rounds()
ONLY = options.define_only('Sets: lstm, transformer, cells, fusions, loop')
SIDE = options.define_side()
JSON = options.define_json()

DENSE_FUSIONS = [name for name in FUSIONS if name not in ONE_HOT]
SIDES: dict[str, tuple[str, ...]] = {
    'lstm': ('torch', 'plain', 'products', 'mi'),
    'transformer': ('torch', 'torch compiled', 'mi'),
    'cells': tuple(cells.CELLS),
    'fusions': ('concat', *(name for name in DENSE_FUSIONS if name != 'concat')),
    'loop': ('steps', 'run'),
}


def is_gpu() -> bool:
    """Return whether JAX runs on a GPU. Starts JAX."""
    return jax.default_backend() == 'gpu'


def get_sizes() -> lm_sizes.Sizes:
    """Return set → name → sizes on this device."""
    return lm_sizes.GPU if is_gpu() else lm_sizes.CPU


def list_sides(set_name: str) -> tuple[str, ...]:
    """Return the sides of a set on this device."""
    return (*SIDES[set_name], *(['cudnn'] if set_name == 'lstm' and is_gpu() else []))


def torch_lstm(V: int, E: int, H: int, T: int, B: int) -> Callable[[], object]:
    """Return a function that runs a training step of torch's LSTM."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm = torch.nn.Embedding(V, E), torch.nn.LSTM(E, H)
            self.decoder, self.output = torch.nn.Linear(H, E), torch.nn.Linear(E, V)

        def forward(self, tokens, carry):
            hidden, carry = self.lstm(self.embedding(tokens), carry)
            return self.output(self.decoder(hidden)), carry

    # Model, optimizer and data; the carry goes from step to step, without its gradient.
    device = _torch_device()
    model = Model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    tokens = torch.randint(0, V, (T + 1, B), device=device)
    carry = torch.zeros(1, B, H, device=device), torch.zeros(1, B, H, device=device)

    def step() -> None:
        nonlocal carry
        logits, next_carry = model(tokens[:-1], carry)
        carry = tuple(array.detach() for array in next_carry)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), tokens[1:].reshape(-1))
        _apply_gradient(model, optimizer, loss)

    return step


def torch_transformer(sizes: Sequence[int], is_compiled: bool) -> Callable[[], object]:
    """Return a function that runs a training step of a Transformer in torch."""
    import torch
    from torch.nn import functional

    V, H, num_layers, num_heads, T, B = sizes
    head_size, device = H // num_heads, _torch_device()
    # Rotary positions.
    positions = torch.arange(T, device=device)
    feature_pairs = torch.arange(0, head_size, 2, device=device)
    angles = positions[:, None] * 10_000.0 ** (-feature_pairs / head_size)
    cos, sin = angles.cos(), angles.sin()

    def rotate(features):  # [B, heads, T, head_size], the halves as pairs
        left, right = features.chunk(2, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(H) for _ in range(2))
            self.qkv, self.out = torch.nn.Linear(H, 3 * H), torch.nn.Linear(H, H)
            self.gate_up, self.down = torch.nn.Linear(H, 8 * H), torch.nn.Linear(4 * H, H)

        def forward(self, hidden):
            qkv = self.qkv(self.norms[0](hidden)).view(B, T, 3, num_heads, head_size)
            qkv = qkv.permute(2, 0, 3, 1, 4)
            q, k, v = rotate(qkv[0]), rotate(qkv[1]), qkv[2]
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            hidden = hidden + self.out(attended.transpose(1, 2).reshape(B, T, H))
            gate, up = self.gate_up(self.norms[1](hidden)).chunk(2, -1)
            return hidden + self.down(functional.silu(gate) * up)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(V, H)
            self.blocks = torch.nn.Sequential(*(Block() for _ in range(num_layers)))
            self.norm, self.decoder = torch.nn.RMSNorm(H), torch.nn.Linear(H, H)
            self.output = torch.nn.Linear(H, V)

        def forward(self, tokens, targets):
            hidden = self.norm(self.blocks(self.embedding(tokens)))
            logits = self.output(self.decoder(hidden)).float().reshape(-1, V)
            return functional.cross_entropy(logits, targets.reshape(-1))  # compiled with the model

    # Model, optimizer and data.
    model = Model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model) if is_compiled else model
    tokens = torch.randint(0, V, (B, T + 1), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        _apply_gradient(model, optimizer, loss)

    return step


def _apply_gradient(model: Any, optimizer: Any, loss: Any) -> None:
    """Update a torch model with the clipped gradient of a loss, and wait for the result."""
    import torch

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    loss.item()


def _torch_device() -> str:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA's f32 products, and cuDNN's by default
    if torch.cuda.is_available() != is_gpu():
        raise UserError(
            f"JAX's backend is {jax.default_backend()}: expected that of PyTorch, which has "
            f'{"a" if torch.cuda.is_available() else "no"} GPU. Try JAX_PLATFORMS=cpu with '
            f"CUDA_VISIBLE_DEVICES=, or PyTorch's build for the GPU"
        )
    return 'cuda' if is_gpu() else 'cpu'


@jax.custom_vjp
def products_alone(
    carry: Carry, x: Array, weights: LSTMWeights, reset: None, keep: None
) -> tuple[Carry, Array]:
    """Compute only the products of `mi.kernels.lstm.lstm`. The result is meaningless."""
    return _products_forward(carry, x, weights, reset, keep)[0]


def _products_forward(
    carry: Carry, x: Array, weights: LSTMWeights, reset: None, keep: None
) -> tuple[tuple[Carry, Array], tuple[Array, ...]]:
    del reset, keep
    W, U, _ = weights
    (T, B, n), H = x.shape, U.shape[0]
    U_T = jax.lax.optimization_barrier(U.T)
    gates = jnp.einsum('ng,rn->gr', W, x.reshape(T * B, n))
    h, _ = jax.lax.scan(lambda h, _: (linear(U_T, h)[:H], None), carry[1].T, None, length=T)
    return ((carry[0], h.T), jnp.broadcast_to(h.T, (T, B, H))), (x, W, U, gates)


def _products_backward(
    residuals: tuple[Array, ...], cotangents: tuple[Carry, Array]
) -> tuple[Carry, Array, LSTMWeights, None, None]:
    x, W, U, dgates = residuals
    (dc, _), dhs = cotangents
    (T, B, n), H = x.shape, U.shape[0]
    dh, _ = jax.lax.scan(
        lambda dh, _: (linear(U, jnp.pad(dh, ((0, 3 * H), (0, 0)))), None),
        dhs[-1].T,
        None,
        length=T,
    )
    x_first, h_first = jax.lax.optimization_barrier((x.reshape(T * B, n).T, dgates[:H]))
    dW = jnp.einsum('nr,gr->ng', x_first, dgates)
    dU = jnp.einsum('hr,gr->hg', h_first, dgates)
    db = jnp.tile(dh.mean(axis=1), 4)  # uses dh, or XLA drops it
    dx = jnp.einsum('ng,gr->nr', W, dgates).reshape(n, T, B).transpose(1, 2, 0)
    return (dc, dh.T), dx, LSTMWeights(dW, dU, db), None, None


products_alone.defvjp(_products_forward, _products_backward)


def make_config(set_name: str, size_name: str, side: str) -> ml_collections.ConfigDict:
    """Return the config of a side that uses our code."""
    config = configs.get_config().unlock()
    sizes = get_sizes()[set_name][size_name]
    config.model.update({'site': 'none', 'tied': False})
    for dropout_key in ('input', 'layer', 'output'):
        config.dropout[dropout_key] = 0.0
    if set_name == 'transformer':
        _, hidden_size, num_layers, num_heads, num_steps, batch_size = sizes
        config.model.update({'core': 'transformer', 'layers': num_layers, 'heads': num_heads})
        config.model.update({'embed': hidden_size, 'hidden': hidden_size, 'ffn': 4 * hidden_size})
        config.model.dtype = 'bfloat16' if is_gpu() else 'float32'
    else:
        _, embed_size, hidden_size, num_steps, batch_size = sizes
        config.model.update({'embed': embed_size, 'hidden': hidden_size})
        if side == 'cudnn':
            config.model.impl = 'cudnn'
        if side == 'products':
            config.optim.learning_rate = 1e-12  # its gradients have no meaning and would overflow
        if set_name == 'cells':
            config.model.update({'core': side, 'rank': 64})
        elif set_name == 'fusions':
            config.model.site, config.model.fusion.name = size_name, side
            config.match.by = 'parameters'
    config.train.update({'length': num_steps, 'batch': batch_size})
    return config


def mi_step(config: ml_collections.ConfigDict, vocabulary: int) -> Callable[[], object]:
    """Return a function that runs an update of `mi.lm.trainer` for one seed."""
    return compile_step(config, vocabulary)[1]


def compile_step(
    config: ml_collections.ConfigDict, vocabulary: int
) -> tuple[jax.stages.Compiled, Callable[[], object]]:
    """Return the compiled update of `mi.lm.trainer` for one seed, and a function that runs it."""
    config = factory.match_size(config, vocabulary)
    num_steps, batch_size = config.train.length, config.train.batch
    config.train.steps = 1000
    trainer, mesh = factory.build_trainer(config, vocabulary), sharding.make_mesh(1, batch_size)
    seeds = np.zeros(1, np.int32)
    train_state = trainer.init_seeds(seeds, mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocabulary, size=(1, num_steps + 1, batch_size)).astype(np.int32)
    tokens = sharding.shard_array(tokens, sharding.batch_sharding(mesh, 2, has_seeds=True))
    batch = Batch(
        tokens, None, sharding.shard_array(seeds, sharding.seed_sharding(mesh)), np.int32(0)
    )
    compiled = trainer.compile(train_state, batch, mesh)

    def step() -> None:
        nonlocal train_state
        train_state, metrics = compiled(train_state, batch)
        jax.block_until_ready(metrics)

    return compiled, step


def trainer_run(config: ml_collections.ConfigDict) -> Callable[[], object]:
    """Return a function that runs the trainer and returns a number of steps.

    The number is scaled up such that the time per step excludes set-up and evaluation.
    """
    config.train.update({'steps': 150, 'log_every': 50, 'eval_every': 150, 'save_every': 150})
    config.eval.update({'valid_tokens': 2, 'final_tokens': 2})

    def run_trainer() -> float:
        start_time = time.perf_counter()
        with tempfile.TemporaryDirectory() as workdir:
            train.train(config, workdir)
            with open(f'{workdir}/timing.jsonl') as timing_file:
                records = [json.loads(line) for line in timing_file]
        loop_seconds = sum(record['seconds'] for record in records)
        return config.train.steps * (time.perf_counter() - start_time) / loop_seconds

    return run_trainer


def make_step(set_name: str, size_name: str, side: str) -> Callable[[], object]:
    """Return a function that runs a training step of a side."""
    sizes = get_sizes()[set_name][size_name]
    if side == 'torch' and set_name == 'lstm':
        return torch_lstm(*sizes)
    if side.startswith('torch'):
        return torch_transformer(sizes, is_compiled=side.endswith('compiled'))
    config = make_config(set_name, size_name, side)
    if side == 'run':
        return trainer_run(config)
    replacements = {'plain': lstm_reference, 'products': products_alone}
    if side not in replacements:
        return mi_step(config, sizes[0])
    # The cell calls the recurrence by its name in `mi.cells.lstm`.
    with mock.patch.object(lstm_cell, 'lstm', replacements[side]):
        return mi_step(config, sizes[0])


def main(argv: Sequence[str]) -> None:
    """Compare the sides of every set, or serve as one of them."""
    del argv
    # As in mi.main; must precede default_backend, which starts JAX's threads.
    host.keep_freed_memory()
    host.set_xla_flags()
    if SIDE.value:
        read_clock = time.process_time if CPU_TIME.value else time.perf_counter
        rounds.serve(make_step(*SIDE.value.split('/')), read_clock=read_clock)
        return
    set_names = options.select(ONLY, SIDES)
    if CPU_TIME.value and (is_gpu() or 'loop' in set_names):
        raise UserError(
            '--cpu_time: expected a CPU, and --only=SETS without loop, whose ratio is of times'
        )
    if CPU_TIME.value:  # for the workers
        os.environ['OMP_NUM_THREADS'] = '1'
        flags_of_user = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{flags_of_user} --xla_cpu_multi_thread_eigen=false'
    print(f'{host.describe_machine()}, jax {jax.__version__}')
    figures: list[dict[str, Any]] = []
    for set_name in set_names:
        for size_name, sizes in get_sizes()[set_name].items():
            commands = {
                side: [
                    *('-m', 'benchmarks.lm', f'--side={set_name}/{size_name}/{side}'),
                    f'--cpu_time={CPU_TIME.value}',
                ]
                for side in list_sides(set_name)
            }
            seconds = rounds.race(commands, ROUNDS.value)
            title = f'{set_name}, {size_name} {sizes}'
            num_tokens = dict.fromkeys(commands, math.prod(sizes[-2:]))
            for figure in rounds.print_ratios(title, 'tokens', num_tokens, seconds):
                figures.append({'set': set_name, 'size': size_name, **figure})
    settings = {'rounds': ROUNDS.value, 'cpu_time': CPU_TIME.value}
    options.write_json(JSON.value, peers=['torch'], **settings, figures=figures)


if __name__ == '__main__':
    options.run(main)
