"""A comparison of a small character Transformer in mi and in PyTorch, with nanoGPT's CPU recipe.

    pip install -e '.[benchmark]' && python -m benchmarks.nanogpt --data=input.txt --compile

    torch             blocks of LayerNorm, causal attention and a GELU layer of 4 H features,
                      learned positions, tied embeddings, no biases
    torch compiled    the same with torch.compile; requires --compile
    mi                the Transformer of configs/lm.py: RMSNorm, rotary positions, SwiGLU

`--data` is a text file, such as tiny Shakespeare (github.com/karpathy/char-rnn). The default is the
novels in the package. As in the recipe, the last tenth of the text is for validation. All sides
have 0.8 million parameters, the same batches and learning rates, AdamW with weight decay on
matrices, clipping by global norm, and f32 on all cores. They take turns (`benchmarks.rounds`). In a
turn, a side trains for a share of its steps, waiting for every step. It then computes the loss on
validation windows, which is not timed. The table shows medians over the turns with ranges, the
losses after equal numbers of steps, and the losses at the time when the fastest side has finished.

Source: the README of github.com/karpathy/nanoGPT, `train_shakespeare_char` on a CPU. The torch side
was written from that description.
"""

import itertools
import json
import math
import operator
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from benchmarks import options, rounds
from configs import lm as configs
from mi.config import UserError
from mi.lm import factory
from mi.lm.data import sources
from mi.lm.data.batches import Batch
from mi.training import host, sharding

DATA = flags.DEFINE_string('data', '', "Text file; '' for the novels that the package has.")
STEPS = flags.DEFINE_integer('steps', 2000, 'Updates of each side.', lower_bound=1)
TURNS = flags.DEFINE_integer('turns', 20, 'Turns that divide the updates.', lower_bound=1)
SEED = flags.DEFINE_integer('init_seed', 0, 'Seed of parameters and batches.')
COMPILE = flags.DEFINE_bool('compile', False, 'Also race torch.compile.')
SIDE = options.define_side()
JSON = options.define_json()

TORCH = 'torch'  # the peer of the ratios
SWIGLU_RATIO = 332 / 128  # F / H at which our parameters are those of a GELU layer of 4 H features
VALIDATION_BATCHES = 20
VALIDATION_SEED = 2**31  # the same windows for all sides and seeds


class Recipe(NamedTuple):
    """The sizes and the optimizer of the recipe, with nanoGPT's names in parentheses.

    Attributes:
      layers, heads, width: sizes of the model (n_layer, n_head, n_embd).
      length: number of tokens in a window, T (block_size).
      batch: number of windows in an update, B (batch_size).
      steps: number of updates (max_iters, lr_decay_iters).
      warmup: number of updates of linear warm-up (warmup_iters).
      learning_rate, final_rate: highest and last learning rate (learning_rate, min_lr).
      b2, weight_decay: hyperparameters of AdamW (beta2, weight_decay).
      clip_norm: maximum global norm of the gradient (grad_clip).
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    length: int = 64
    batch: int = 12
    steps: int = 2000
    warmup: int = 100
    learning_rate: float = 1e-3
    final_rate: float = 1e-4
    b2: float = 0.99
    weight_decay: float = 0.1
    clip_norm: float = 1.0


class Text(NamedTuple):
    """A text, with its characters as ids.

    Attributes:
      train, valid: ids for training and validation.
      vocabulary: number of different characters.
    """

    train: np.ndarray
    valid: np.ndarray
    vocabulary: int


class Side(NamedTuple):
    """A model in training.

    Attributes:
      update: function (tokens [B, T + 1], step) → None that computes an update and waits for it.
      evaluate: function from tokens [B, T + 1] to the mean loss in nats per character.
      count: number of parameters.
    """

    update: Callable[[np.ndarray, int], None]
    evaluate: Callable[[np.ndarray], float]
    count: int


def load_text(file: str, length: int) -> Text:
    """Read a text, whose last tenth is for validation.

    Args:
      file: path of a text file, or '' for the novels in the package.
      length: length of a window, T, which must fit into both parts.

    Raises:
      UserError: if the file does not exist, is not in UTF-8, or is too short.
    """
    place = f'--data={file}: '
    try:
        content = pathlib.Path(file).read_bytes() if file else sources.load_austen()['train'][0][1]
    except OSError as error:
        raise UserError(f'{place}{error.strerror}. Try without --data') from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f'{place}expected text in UTF-8, got {content[error.start]:#04x} as byte '
            f'{error.start}. Convert the file, or try without --data'
        ) from error
    codes = np.array([ord(character) for character in text])
    characters, ids = np.unique(codes, return_inverse=True)
    split = int(0.9 * len(ids))
    if len(ids) - split <= length:  # a window has T + 1 characters
        raise UserError(
            f'{place}expected more than {10 * length} characters, got {len(ids)}. Try without '
            f'--data'
        )
    return Text(ids[:split].astype(np.int32), ids[split:].astype(np.int32), len(characters))


def draw_batch(ids: np.ndarray, recipe: Recipe, *seeds: int) -> np.ndarray:
    """Draw windows from a text at random positions, int32 [B, T + 1]."""
    rng = np.random.default_rng(seeds)
    starts = rng.integers(len(ids) - recipe.length, size=recipe.batch)
    return ids[starts[:, None] + np.arange(recipe.length + 1)]


def compute_learning_rates(recipe: Recipe) -> np.ndarray:
    """Return the learning rates of all updates, linear warm-up and then a cosine, f32 [steps]."""
    steps = np.arange(recipe.steps)
    progress = (steps - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    cosine = 0.5 * (1 + np.cos(np.pi * progress))
    decayed = recipe.final_rate + cosine * (recipe.learning_rate - recipe.final_rate)
    rising = recipe.learning_rate * (steps + 1) / (recipe.warmup + 1)
    return np.where(steps < recipe.warmup, rising, decayed).astype(np.float32)


def make_torch_model(recipe: Recipe, vocabulary: int) -> Any:
    """Return the torch model, ids [B, T] → logits [B, T, V], or the mean loss of targets [B, T]."""
    import torch
    from torch import nn

    H, num_heads = recipe.width, recipe.heads

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(H, bias=False) for _ in range(2))
            self.qkv, self.out = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H, bias=False)
            self.up, self.down = nn.Linear(H, 4 * H, bias=False), nn.Linear(4 * H, H, bias=False)

        def forward(self, hidden):
            B, T, _ = hidden.shape
            qkv = self.qkv(self.norms[0](hidden)).view(B, T, 3, num_heads, H // num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            hidden = hidden + self.out(attended.transpose(1, 2).reshape(B, T, H))
            return hidden + self.down(nn.functional.gelu(self.up(self.norms[1](hidden))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(vocabulary, H)
            self.positions = nn.Embedding(recipe.length, H)
            self.blocks = nn.Sequential(*(Block() for _ in range(recipe.layers)))
            self.norm = nn.LayerNorm(H, bias=False)

        def forward(self, ids, targets=None):
            positions = self.positions(torch.arange(ids.shape[1]))
            hidden = self.norm(self.blocks(self.words(ids) + positions))
            logits = hidden @ self.words.weight.T
            if targets is None:
                return logits
            # In here, so that torch.compile fuses it, as in nanoGPT.
            return nn.functional.cross_entropy(logits.reshape(-1, vocabulary), targets.reshape(-1))

    # Initial values: deviation 0.02, less for the products that end in the residual stream.
    model = Model()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            is_last = name.endswith(('out.weight', 'down.weight'))
            scale = 1 / math.sqrt(2 * recipe.layers) if is_last else 1
            nn.init.normal_(parameter, std=0.02 * scale)
    return model


def make_torch_side(recipe: Recipe, vocabulary: int, seed: int, is_compiled: bool) -> Side:
    """Return the torch side."""
    import torch

    torch.manual_seed(seed)
    model = make_torch_model(recipe, vocabulary)
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {'params': matrices, 'weight_decay': recipe.weight_decay},
        {'params': others, 'weight_decay': 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.b2), fused=True)
    forward = torch.compile(model) if is_compiled else model
    rates = compute_learning_rates(recipe).tolist()

    def compute_loss(tokens: np.ndarray) -> Any:
        ids = torch.from_numpy(tokens).long()
        return forward(ids[:, :-1], ids[:, 1:])

    def update(tokens: np.ndarray, step: int) -> None:
        for group in optimizer.param_groups:
            group['lr'] = rates[step]
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        loss.item()

    def evaluate(tokens: np.ndarray) -> float:
        with torch.no_grad():
            return float(compute_loss(tokens))

    # Compile both passes before the first turn.
    compute_loss(np.zeros((recipe.batch, recipe.length + 1), np.int32)).backward()
    return Side(update, evaluate, sum(parameter.numel() for parameter in parameters))


def make_config(recipe: Recipe) -> ml_collections.ConfigDict:
    """Return the config of our side."""
    config = configs.get_config('core=transformer').unlock()
    width = recipe.width
    config.model.update({'layers': recipe.layers, 'heads': recipe.heads, 'site': 'none'})
    config.model.update({'embed': width, 'hidden': width, 'ffn': round(SWIGLU_RATIO * width)})
    for rate in ('input', 'layer', 'output'):
        config.dropout[rate] = 0.0
    config.train.update({'length': recipe.length, 'batch': recipe.batch, 'steps': recipe.steps})
    config.optim.update({'name': 'adamw', 'b2': recipe.b2, 'clip_norm': recipe.clip_norm})
    config.optim.weight_decay = recipe.weight_decay
    return config.lock()


def make_mi_side(recipe: Recipe, vocabulary: int, seed: int) -> Side:
    """Return our side, which uses the model and the update of `mi.lm.trainer`."""
    trainer = factory.build_trainer(make_config(recipe), vocabulary)
    mesh = sharding.make_mesh(1, recipe.batch)
    seeds = np.array([seed], np.int32)
    state = trainer.init_seeds(seeds, mesh)
    count = sum(array.size for array in jax.tree.leaves(state.params))
    tokens_sharding = sharding.batch_sharding(mesh, 2, has_seeds=True)
    seeds = sharding.shard_array(seeds, sharding.seed_sharding(mesh))
    rates = sharding.shard_array(compute_learning_rates(recipe), sharding.replicated(mesh))

    def load(tokens: np.ndarray, step: int) -> Batch:
        tokens = sharding.shard_array(tokens.T[None], tokens_sharding)
        return Batch(tokens, None, seeds, np.int32(step))

    zeros = np.zeros((recipe.batch, recipe.length + 1), np.int32)
    compiled = trainer.compile(state, load(zeros, 0), mesh, rates)

    def update(tokens: np.ndarray, step: int) -> None:
        nonlocal state
        state, metrics = compiled(state, load(tokens, step), rates)
        jax.block_until_ready(metrics)

    @jax.jit
    def compute_loss(params: Any, tokens: jax.Array) -> jax.Array:
        carry = trainer.model.initial_carry(recipe.batch)
        variables, tokens = {'params': params}, tokens.T
        _, losses = trainer.model.apply(variables, carry, tokens[:-1], tokens[1:], None)
        return losses.nats.mean()

    def evaluate(tokens: np.ndarray) -> float:
        params = jax.tree.map(lambda array: array[0], state.params)
        return float(compute_loss(params, jnp.asarray(tokens)))

    return Side(update, evaluate, count)


def make_side(name: str, recipe: Recipe, vocabulary: int, seed: int) -> Side:
    """Return a side by its name."""
    if name == 'mi':
        return make_mi_side(recipe, vocabulary, seed)
    return make_torch_side(recipe, vocabulary, seed, is_compiled=name != TORCH)


def list_turns(steps: int, turns: int) -> list[range]:
    """Split the updates into consecutive turns whose sizes differ by at most one.

    Raises:
      UserError: if there are more turns than updates.
    """
    if turns > steps:
        raise UserError(f'--turns={turns}: expected at most --steps={steps}')
    bounds = [steps * turn // turns for turn in range(turns + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def train_in_turns(
    side: Side, text: Text, recipe: Recipe, seed: int, turns: Sequence[range]
) -> Callable[[], dict[str, float]]:
    """Return a function that runs the next turn of a side, and returns its steps, time and loss."""
    windows = [
        draw_batch(text.valid, recipe, VALIDATION_SEED, index)
        for index in range(VALIDATION_BATCHES)
    ]
    remaining_turns = iter(turns)

    def take_turn() -> dict[str, float]:
        steps = next(remaining_turns)
        batches = [draw_batch(text.train, recipe, seed, step) for step in steps]
        start_time = time.perf_counter()
        for tokens, step in zip(batches, steps, strict=True):
            side.update(tokens, step)
        seconds = time.perf_counter() - start_time
        loss = statistics.fmean(side.evaluate(tokens) for tokens in windows)
        return {'steps': len(steps), 'seconds': seconds, 'loss': loss, 'parameters': side.count}

    side.evaluate(windows[0])  # compile
    return take_turn


def find_loss(turns: Sequence[Mapping[str, float]], seconds: float) -> float:
    """Return the loss after some seconds of training, interpolated between turns.

    The loss is NaN before the end of the first turn.
    """
    times = np.cumsum([turn['seconds'] for turn in turns])
    losses = [turn['loss'] for turn in turns]
    return float(np.interp(seconds, times, losses, left=np.nan))


def print_table(
    results: Mapping[str, Sequence[Mapping[str, float]]], recipe: Recipe
) -> list[dict[str, Any]]:
    """Print and return a row for each side.

    Args:
      results: side → results of its turns.
      recipe: the recipe.
    """
    tokens_per_step = recipe.batch * recipe.length
    end = min(sum(turn['seconds'] for turn in turns) for turns in results.values())
    num_turns = len(results[TORCH])
    shown_turns = sorted({(num_turns + 3) // 4, (num_turns + 1) // 2, num_turns})
    shown_steps = [sum(int(t['steps']) for t in results[TORCH][:turn]) for turn in shown_turns]
    losses_header = ''.join(f'{f"step {step:,}":>12}' for step in shown_steps)
    header = f'{"":<16}{"parameters":>12}{"tokens/s":>10}{"range":>16}{"× torch":>9}{"range":>12}'
    print(f'{header}{losses_header}{f"at {end:.0f} s":>12}')
    figures = []
    for side, turns in results.items():
        speeds = [tokens_per_step * turn['steps'] / turn['seconds'] for turn in turns]
        peer_speeds = [tokens_per_step * t['steps'] / t['seconds'] for t in results[TORCH]]
        ratios = list(map(operator.truediv, speeds, peer_speeds))
        losses = [turns[turn - 1]['loss'] for turn in shown_turns]
        final_loss = find_loss(turns, end)
        row = f'{side:<16}{int(turns[0]["parameters"]):12,}{statistics.median(speeds):10,.0f}'
        row += f'{f"{min(speeds):,.0f}–{max(speeds):,.0f}":>16}{statistics.median(ratios):9.2f}'
        row += f'{f"{min(ratios):.2f}–{max(ratios):.2f}":>12}'
        print(row + ''.join(f'{loss:12.3f}' for loss in [*losses, final_loss]), flush=True)
        figures.append(
            {
                'side': side,
                'tokens_per_second': statistics.median(speeds),
                'ratio': statistics.median(ratios),
                'turns': list(turns),
                'loss_at_equal_seconds': final_loss,
                'seconds': end,
            }
        )
    return figures


def main(argv: Sequence[str]) -> None:
    """Compare the sides, or serve as one of them."""
    del argv
    all_turns = list_turns(STEPS.value, TURNS.value)
    recipe = Recipe(steps=STEPS.value)
    text = load_text(DATA.value, recipe.length)
    options.require_cpu("PyTorch's sides")
    if SIDE.value:
        side = make_side(SIDE.value, recipe, text.vocabulary, SEED.value)
        rounds.serve_turns(train_in_turns(side, text, recipe, SEED.value, all_turns))
        return
    print(f'{host.describe_machine()}, jax {jax.__version__}; {DATA.value or "novels"}')
    print(f'{len(text.train):,} characters to train on, {text.vocabulary} different')
    sides = [TORCH, *(['torch compiled'] if COMPILE.value else []), 'mi']
    shared = [f'--{flag.name}={flag.value}' for flag in (DATA, STEPS, TURNS, SEED)]
    commands = {side: ['-m', 'benchmarks.nanogpt', f'--side={side}', *shared] for side in sides}
    results = rounds.race(commands, TURNS.value, json.loads)
    figures = print_table(results, recipe)
    options.write_json(JSON.value, peers=['torch'], figures=figures)


if __name__ == '__main__':
    # As in mi.main; must precede the first computation.
    host.keep_freed_memory()
    host.set_xla_flags()
    options.run(main)
