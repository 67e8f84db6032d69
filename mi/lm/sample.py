"""Text from a trained language model, one token after another."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from mi import precision
from mi.config import UserError
from mi.lm import factory
from mi.lm.model import LanguageModel
from mi.lm.restore import restore
from mi.rows import make_row_keys
from mi.training import progress, sharding
from mi.training.io import write_json


def sample(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Continues `config.sample.prompt` with the newest checkpoint of a run directory, each seed's.

    Prints the texts and writes them to samples.json there.

    Raises:
      UserError: if the directory has no whole checkpoint, is of another config, or the prompt is
        empty.
    """
    path = pathlib.Path(workdir)
    config, corpus, params, step, _ = restore(config, workdir)
    if config.model.source == 'domain':
        raise UserError(
            "config.model.source = 'domain': what is written has no domain; --mode=sample is for "
            'models with another context'
        )
    options = config.sample
    prompt = corpus.encode(options.prompt)
    if len(prompt) == 0:
        raise UserError("config.sample.prompt = '': expected at least one token to start from")
    model = factory.for_sampling(factory.build(config, *corpus.sizes), config)
    with progress.Work(f'writing {options.tokens:,} tokens'), precision.use_config(config):
        tokens = generate_all(
            model,
            params,
            np.asarray(prompt, np.int32),
            config.seeds,
            options.texts,
            options.tokens,
            options.temperature,
            options.top_p,
        )
    texts = [[corpus.decode(row) for row in seed_tokens] for seed_tokens in tokens]
    for seed, seed_texts in zip(config.seeds, texts, strict=True):
        for text in seed_texts:
            print(f'--- seed {seed}, step {step}\n{options.prompt}{text}')
    write_json(
        path / 'samples.json',
        {'step': step, **options.to_dict(), 'seeds': list(config.seeds), 'texts': texts},
    )


def generate_all(
    model: LanguageModel,
    params: Any,
    prompt: np.ndarray,
    seeds: Sequence[int],
    texts: int,
    count: int,
    temperature: float,
    top_p: float,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """Return the tokens of all texts of all seeds, [S, texts, count]; the devices share them.

    Args:
      model: the model.
      params: its parameters, [S, …].
      prompt: ids [P], at least one.
      seeds: S of them, which decide what is drawn.
      texts: of each seed.
      count, temperature, top_p: as in `generate`.
      devices: those of this process if None.
    """
    params = sharding.to_host(params)
    devices = jax.local_devices() if devices is None else devices
    mesh = sharding.make_mesh(len(seeds), texts, devices=devices)
    by_seed, everywhere = sharding.seed_sharding(mesh), sharding.replicated(mesh)
    rows = sharding.batch_sharding(mesh, 1, has_seeds=True)
    device_texts = texts // (mesh.size // mesh.shape['seed'])

    def draw_texts(params: Any, seeds: Array, prompt: Array, settings: Any) -> Array:
        def one_seed(params: Any, seed: Array) -> Array:
            temperature, top_p = settings
            key = jax.random.key(seed)
            return generate(model, params, prompt, key, count, temperature, top_p, device_texts)

        return sharding.map_seeds(one_seed, mesh)(params, seeds)

    program = jax.shard_map(
        draw_texts,
        mesh=mesh,
        in_specs=(by_seed.spec, by_seed.spec, everywhere.spec, everywhere.spec),
        out_specs=rows.spec,
        check_vma=False,
    )
    arguments = jax.device_put((params, np.asarray(seeds, np.int32)), by_seed)
    settings = np.float32(temperature), np.float32(top_p)
    return np.asarray(jax.jit(program)(*arguments, prompt, settings))


def generate(
    model: LanguageModel,
    params: Any,
    prompt: Array,
    key: Array,
    count: int,
    temperature: float | Array = 1.0,
    top_p: float | Array = 1.0,
    texts: int = 1,
) -> Array:
    """Return texts that continue the prompt [P], `count` tokens each, [texts, count].

    What went before is in the carry of a recurrent core and in the keys and values that a
    Transformer keeps, so that a token costs the same wherever it stands.

    Args:
      model: the model.
      params: its parameters, of one seed.
      prompt: ids, at least one.
      key: random key.
      count: how many tokens.
      temperature: of the distribution; 0 for the likeliest token.
      top_p: only the likeliest tokens are drawn that have this much of the distribution together
        (nucleus sampling, Holtzman et al., 2020).
      texts: how many; each has its own random keys, by its number.
    """
    model = model.decoder()
    carry = model.initial_carry(texts)
    whole = jnp.zeros((len(prompt) + count, texts), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), carry, whole)
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables.get('cache', {}))
    draw_rows = jax.vmap(draw, (0, 0, None, None))

    def next_tokens(carry: Any, cache: Any, tokens: Array, key: Array) -> Any:
        (carry, logits), updated = model.apply(
            {'params': params, 'cache': cache}, carry, tokens, mutable=['cache']
        )
        drawn = draw_rows(logits[-1], make_row_keys(key, texts), temperature, top_p)
        return carry, updated.get('cache', {}), drawn

    keys = jax.random.split(key, count)
    prompts = jnp.broadcast_to(prompt[:, None], (len(prompt), texts))
    carry, cache, first = next_tokens(carry, cache, prompts, keys[0])

    def step(state: Any, key: Array) -> tuple[Any, Array]:
        carry, cache, tokens = state
        carry, cache, drawn = next_tokens(carry, cache, tokens[None], key)
        return (carry, cache, drawn), drawn

    _, rest = jax.lax.scan(step, (carry, cache, first), keys[1:])
    return jnp.concatenate([first[None], rest]).T


def draw(logits: Array, key: Array, temperature: float | Array, top_p: float | Array) -> Array:
    """A token from logits [V]; see `generate`."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled)[::-1]
    probability = jax.nn.softmax(ordered)
    inside = jnp.cumsum(probability) - probability < top_p  # the likeliest always is
    lowest = jnp.where(inside, ordered, jnp.inf).min()
    drawn = jax.random.categorical(key, jnp.where(scaled >= lowest, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
