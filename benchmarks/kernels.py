"""Kernels and memory use of training steps on a GPU, compared with plain Flax code.

    pip install -e '.[cuda,benchmark]' && python -m benchmarks.kernels --gpu_topology=h100:1
    python -m benchmarks.kernels                     # on the GPU of this machine, with times

    lstm          embedding → LSTM → affine H → E → affine E → V. The peer is `nn.OptimizedLSTMCell`
                  in `nn.RNN`
    transformer   pre-norm blocks with SwiGLU. The peer has `nn.MultiHeadDotProductAttention` and
                  learned positions
    rl            one update of the fused program on XLand, 30 tasks. The peer is the plain loop of
                  `benchmarks.plain_rl`

With a topology, XLA compiles the program for that GPU without running it. Each kernel of the
optimized HLO counts as one launch, multiplied by the number of loop iterations
(`mi.estimate.program`). All sides of a set have the same sizes, batch, loss, clipping and Adam. The
fusion `mi` adds its own products.

`--where=SET/SIDE` lists the launches of one program by the source code that they come from.
"""

import functools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from flax import linen as nn
from jax import Array

from benchmarks import options, plain_rl, rounds
from configs import lm as lm_configs
from configs import rl as rl_configs
from mi.config import UserError, suggest
from mi.estimate import memory, program, topologies
from mi.training import host

# A name that no launcher defines.
TOPOLOGY = flags.DEFINE_string(
    'gpu_topology',
    None,
    'GPU in mi.estimate.topologies to compile for, such as h100:1; None to run here.',
)
WHERE = flags.DEFINE_string('where', None, 'SET/SIDE whose launches are listed by their source.')
ONLY = options.define_only('Sets: lstm, transformer, rl')
ROUNDS = options.define_rounds()
SIDE = options.define_side()
JSON = options.define_json()

SIDES: dict[str, tuple[str, ...]] = {
    'lstm': ('plain', 'none', 'mi'),
    'transformer': ('plain', 'none', 'mi'),
    'rl': ('plain', 'concat', 'mi'),
}
LSTM_SIZES = {'embed': 128, 'hidden': 512}
TRANSFORMER_SIZES = {'embed': 512, 'hidden': 512, 'layers': 8, 'heads': 8, 'ffn': 2048}
VOCABULARY = 256


class Side(NamedTuple):
    """A compiled program of one side.

    Attributes:
      compiled: the program.
      updates: number of updates in one call of the program.
    """

    compiled: jax.stages.Compiled
    updates: int


class PlainLstm(nn.Module):
    """An LSTM language model in the style of Flax's documentation, [B, T] → logits."""

    embed: int
    hidden: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        x = nn.Embed(VOCABULARY, self.embed)(tokens)
        hidden = nn.RNN(nn.OptimizedLSTMCell(self.hidden))(x)
        return nn.Dense(VOCABULARY)(nn.Dense(self.embed)(hidden))


class PlainTransformer(nn.Module):
    """A pre-norm bf16 Transformer in the style of Flax's documentation, [B, T] → logits."""

    embed: int
    hidden: int
    layers: int
    heads: int
    ffn: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        dtype = jnp.bfloat16
        dense = functools.partial(nn.Dense, dtype=dtype)
        norm = functools.partial(nn.RMSNorm, dtype=dtype)
        num_positions = tokens.shape[1]
        positions = self.param(
            'positions', nn.initializers.normal(0.02), (num_positions, self.hidden)
        )
        x = nn.Embed(VOCABULARY, self.embed, dtype=dtype)(tokens) + positions.astype(dtype)
        causal = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, dtype=dtype)
            x = x + attention(norm()(x), mask=causal)
            n = norm()(x)
            x = x + dense(self.hidden)(nn.silu(dense(self.ffn)(n)) * dense(self.ffn)(n))
        return dense(VOCABULARY)(dense(self.embed)(norm()(x))).astype(jnp.float32)


def lm_config(core: str, fusion: str) -> ml_collections.ConfigDict:
    """Return the config of our language model, which has no site if the fusion is 'none'."""
    config = lm_configs.get_config(f'core={core}').unlock()
    for rate in ('input', 'layer', 'output'):
        config.dropout[rate] = 0.0
    if core == 'transformer':
        config.model.update(TRANSFORMER_SIZES | {'dtype': 'bfloat16'})
        config.train.update({'length': 256, 'batch': 64})
    else:
        config.model.update(LSTM_SIZES)
    config.model.update({'tied': False, 'site': 'none' if fusion == 'none' else 'encoder'})
    if fusion != 'none':
        config.model.fusion.name = fusion
    return config


def make_plain_lm(core: str) -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    """Return a plain training step, and a function that initializes its arguments.

    The step computes the loss and its gradient, clips the gradient, and applies Adam.
    """
    config = lm_config(core, 'none')
    net: nn.Module
    if core == 'transformer':
        net = PlainTransformer(**TRANSFORMER_SIZES)
    else:
        net = PlainLstm(**LSTM_SIZES)

    # The step that every peer computes; ours has the same loss, clipping and Adam.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def compute_loss(params: chex.ArrayTree, tokens: Array) -> Array:
        logits = net.apply({'params': params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def step(
        params: chex.ArrayTree, opt_state: optax.OptState, tokens: Array
    ) -> tuple[chex.ArrayTree, optax.OptState, Array]:
        loss, grads = jax.value_and_grad(compute_loss)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def init() -> tuple[chex.ArrayTree, optax.OptState, Array]:
        shape = config.train.batch, config.train.length + 1
        tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCABULARY)
        params = net.init(jax.random.key(0), tokens[:, :-1])['params']
        return params, optimizer.init(params), tokens

    return step, init


def compile_rl(side: str, device: jax.Device) -> Side:
    """Compile an update of our fused program, or of the plain loop with concat."""
    config = rl_configs.get_config().unlock()
    config.model.sites = ('readout',)  # where the plain loop has its fusion
    if side == 'plain':
        update, arguments = plain_rl.make_xland_update(config, 'concat')
        with jax.numpy_rank_promotion('allow'):
            return compile_for(device, update, arguments, donate=(0, 1))
    config.model.fusion.name = side
    return compile_ours(config, device)


def compile_ours(config: ml_collections.ConfigDict, device: jax.Device) -> Side:
    """Compile the training program of a config."""
    programs = memory.make_programs(config, [device])
    return Side(programs.compile(), programs.updates)


def compile_for(
    device: jax.Device, function: Callable[..., object], arguments: object, donate: tuple[int, ...]
) -> Side:
    """Compile an update for a device, which may be only described."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arguments
    )
    assert isinstance(shapes, tuple)
    return Side(jax.jit(function, donate_argnums=donate).lower(*shapes).compile(), 1)


def compile_side(set_name: str, side: str, device: jax.Device) -> Side:
    """Compile the update of a side."""
    if set_name == 'rl':
        return compile_rl(side, device)
    if side == 'plain':
        step, init = make_plain_lm(set_name)
        return compile_for(device, step, jax.eval_shape(init), donate=(0, 1))
    return compile_ours(lm_config(set_name, side), device)


def make_step(set_name: str, side: str) -> Callable[[], object]:
    """Return a function that runs an update of a side on this machine."""
    if set_name == 'rl':
        from benchmarks import rl

        config = rl_configs.get_config().unlock()
        config.model.sites = ('readout',)
        if side == 'plain':
            return plain_rl.xland_step(config, 'concat')
        config.model.fusion.name = side
        return rl.compile_fused(config)[1]
    if side != 'plain':
        from benchmarks import lm

        return lm.mi_step(lm_config(set_name, side), VOCABULARY)
    step, init = make_plain_lm(set_name)
    params, opt_state, tokens = jax.jit(init)()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, tokens).compile()

    def run_step() -> None:
        nonlocal params, opt_state
        params, opt_state, loss = compiled(params, opt_state, tokens)
        jax.block_until_ready(loss)

    return run_step


def measure_side(set_name: str, side: str, device: jax.Device) -> dict[str, Any]:
    """Compile a side and return its kernels, FLOPs, traffic and temporary memory per update."""
    compiled, updates = compile_side(set_name, side, device)
    costs, sizes = program.analyze(compiled), memory.measure(compiled)
    return {
        'set': set_name,
        'side': side,
        'kernels': sum(costs.kernels.values()) / updates,
        'by_opcode': {opcode: count / updates for opcode, count in costs.kernels.items()},
        'by_source': {
            source: (count / updates, num_bytes / updates / 1e6)
            for source, (count, num_bytes) in costs.sources.items()
        },
        'gflops': costs.flops / updates / 1e9,
        'megabytes': costs.bytes_accessed / updates / 1e6,
        'temporaries': None if sizes is None else sizes['temporaries'] / 1e6,
    }


def print_sources(figures: dict[str, Any], limit: int = 40) -> None:
    """Print the kernels of a program by the source code that they come from, most bytes first.

    Layers whose names differ only in a number share an entry.
    """
    launches: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    for source, (count, megabytes) in figures['by_source'].items():
        launches[re.sub(r'_\d+', '_*', source)] += count
        traffic[re.sub(r'_\d+', '_*', source)] += megabytes
    print(f'{"kernels":>10}{"MB moved":>12}  source')
    for source, megabytes in traffic.most_common(limit):
        print(f'{launches[source]:10.1f}{megabytes:12.1f}  {source}')


def print_table(set_name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a row for each side of a set."""
    print(f'\n{set_name}')
    print(f'{"":<10}{"kernels":>10}{"GFLOP":>10}{"MB moved":>12}{"MB temporary":>14}{"ms":>10}')
    for row in rows:
        milliseconds = '–' if row['seconds'] is None else f'{1000 * row["seconds"]:.2f}'
        temporaries = '–' if row['temporaries'] is None else f'{row["temporaries"]:.1f}'
        print(
            f'{row["side"]:<10}{row["kernels"]:10.0f}{row["gflops"]:10.1f}'
            f'{row["megabytes"]:12.0f}{temporaries:>14}{milliseconds:>10}',
            flush=True,
        )


def main(argv: Sequence[str]) -> None:
    """Compile and compare the sides of every set, or serve as one of the workers.

    Without a topology, the sides are also timed.
    """
    del argv
    host.set_xla_flags()
    if SIDE.value:
        host.keep_freed_memory()
        rounds.serve(make_step(*SIDE.value.split('/')))
        return
    if TOPOLOGY.value:
        topologies.prepare_process()
        device = topologies.describe_one(TOPOLOGY.value)
    else:
        device = jax.devices()[0]
    if WHERE.value:
        known_sides = [f'{set_name}/{side}' for set_name, sides in SIDES.items() for side in sides]
        if WHERE.value not in known_sides:
            raise UserError(
                f'--where={WHERE.value} is unknown; {suggest(WHERE.value, known_sides)}'
            )
        print_sources(measure_side(*WHERE.value.split('/'), device))
        return

    # Compile, and race what can run.
    print(f'{device.device_kind}, jax {jax.__version__}')
    figures: list[dict[str, Any]] = []
    for set_name in options.select(ONLY, SIDES):
        sides = SIDES[set_name]
        rows = [measure_side(set_name, side, device) for side in sides]
        seconds: dict[str, list[float]] = {}
        if not TOPOLOGY.value:
            commands = {
                side: ['-m', 'benchmarks.kernels', f'--side={set_name}/{side}'] for side in sides
            }
            seconds = rounds.race(commands, ROUNDS.value)
        for row in rows:
            times = seconds.get(row['side'])
            row['seconds'] = None if times is None else statistics.median(times)
        print_table(set_name, rows)
        figures += rows
    options.write_json(JSON.value, device=device.device_kind, figures=figures)


if __name__ == '__main__':
    options.run(main)
