"""Text generation by a trained language model (`--mode=sample`)."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from chex import ArrayTree, PRNGKey
from jax import Array

from mi import precision
from mi.config import UserError
from mi.lm import factory
from mi.lm.model import Carry, LanguageModel, Params
from mi.lm.restore import restore
from mi.rows import make_row_keys
from mi.training import progress, sharding
from mi.training.io import write_json

GenerationState = tuple[Carry, ArrayTree, Array]
"""(carry, cached keys and values, newest token of each text)."""


class Decoding(NamedTuple):
    """Options for sampling texts from a model.

    Attributes:
      num_tokens: number of tokens in a text.
      temperature: divisor of the logits, or 0 to always select the most likely token.
      top_p: total probability of the nucleus, the smallest set of most likely tokens from which
        tokens are drawn (Holtzman et al., 2020).
      num_texts: number of texts per seed. The random keys of a text depend only on its index.
    """

    num_tokens: int
    temperature: float | Array = 1.0
    top_p: float | Array = 1.0
    num_texts: int = 1


def sample(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Generate continuations of `config.sample.prompt` with the newest checkpoint of a run.

    Print the texts of each seed, and write them to samples.json in the run directory.

    Raises:
      UserError: if the directory has no complete checkpoint, if its config does not match, or if
        the prompt is empty.
    """
    # The model and the prompt.
    run_path = pathlib.Path(workdir)
    config, corpus, params, step, _ = restore(config, workdir)
    if config.model.source == 'domain':
        raise UserError(
            "config.model.source = 'domain': expected a model with a different context, because a "
            'sampled text has no domain. Try --mode=eval'
        )
    options = config.sample
    prompt = corpus.encode(options.prompt)
    if len(prompt) == 0:
        raise UserError("config.sample.prompt = '': expected at least one token to start from")
    model = factory.configure_sampling(factory.build_model(config, *corpus.sizes), config)

    # The texts of each seed.
    decoding = Decoding(options.tokens, options.temperature, options.top_p, options.texts)
    prompt = np.asarray(prompt, np.int32)
    with progress.Work(f'writing {options.tokens:,} tokens'), precision.use_config(config):
        tokens = generate_all(model, params, prompt, config.seeds, decoding)
    texts = [[corpus.decode(token_row) for token_row in seed_tokens] for seed_tokens in tokens]
    for seed, seed_texts in zip(config.seeds, texts, strict=True):
        for continuation in seed_texts:
            print(f'--- seed {seed}, step {step}\n{corpus.join(options.prompt, continuation)}')
    write_json(
        run_path / 'samples.json',
        {'step': step, **options.to_dict(), 'seeds': list(config.seeds), 'texts': texts},
    )


def generate_all(
    model: LanguageModel,
    params: Params,
    prompt: np.ndarray,
    seeds: Sequence[int],
    decoding: Decoding,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """Generate texts with all seeds, divided over devices.

    Args:
      model: the model.
      params: parameters of the model, [S, …].
      prompt: ids [P], at least one.
      seeds: S random seeds.
      decoding: sampling options.
      devices: devices to use, or None for the local devices of this process.

    Returns:
      The tokens that follow the prompt, [S, texts, tokens].
    """
    # Devices divide the seeds, then the texts.
    params = sharding.to_host(params)
    devices = jax.local_devices() if devices is None else devices
    mesh = sharding.make_mesh(len(seeds), decoding.num_texts, devices=devices)
    seed_sharding = sharding.seed_sharding(mesh)
    replicated_spec = sharding.replicated(mesh).spec
    texts_per_device = decoding.num_texts // (mesh.size // mesh.shape['seed'])

    # One program for any temperature and top_p.
    def generate_seeds(
        params: Params, seeds: Array, prompt: Array, sampling_options: tuple[Array, Array]
    ) -> Array:
        device_decoding = Decoding(decoding.num_tokens, *sampling_options, texts_per_device)

        def generate_seed(params: Params, seed: Array) -> Array:
            seed_key = jax.random.key(seed)
            return generate(model, params, prompt, seed_key, device_decoding)

        return sharding.map_seeds(generate_seed, mesh)(params, seeds)

    program = jax.shard_map(
        generate_seeds,
        mesh=mesh,
        in_specs=(seed_sharding.spec, seed_sharding.spec, replicated_spec, replicated_spec),
        out_specs=sharding.batch_sharding(mesh, 1, has_seeds=True).spec,
        check_vma=False,
    )
    placed = jax.device_put((params, np.asarray(seeds, np.int32)), seed_sharding)
    sampling_options = np.float32(decoding.temperature), np.float32(decoding.top_p)
    return np.asarray(jax.jit(program)(*placed, prompt, sampling_options))


def generate(
    model: LanguageModel, params: Params, prompt: Array, key: PRNGKey, decoding: Decoding
) -> Array:
    """Generate texts with one seed.

    The carry of a recurrent core, or the cached keys and values of a Transformer, represent the
    preceding text, so that every token costs the same.

    Args:
      model: the model.
      params: parameters of the model, for one seed.
      prompt: ids [P], at least one.
      key: random key.
      decoding: sampling options.

    Returns:
      The tokens that follow the prompt, [texts, tokens].
    """
    # An empty cache for all tokens.
    model = model.decoder()
    num_tokens, num_texts = decoding.num_tokens, decoding.num_texts
    carry = model.initial_carry(num_texts)
    all_tokens = jnp.zeros((len(prompt) + num_tokens, num_texts), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), carry, all_tokens)
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables.get('cache', {}))
    draw_rows = jax.vmap(draw, (0, 0, None, None))

    def draw_next(carry: Carry, cache: ArrayTree, tokens: Array, key: PRNGKey) -> GenerationState:
        (carry, logits), updated = model.apply(
            {'params': params, 'cache': cache}, carry, tokens, mutable=['cache']
        )
        row_keys = make_row_keys(key, num_texts)
        drawn = draw_rows(logits[-1], row_keys, decoding.temperature, decoding.top_p)
        return carry, updated.get('cache', {}), drawn

    # The prompt in one call, then one token after another.
    step_keys = jax.random.split(key, num_tokens)
    prompts = jnp.broadcast_to(prompt[:, None], (len(prompt), num_texts))
    carry, cache, first_tokens = draw_next(carry, cache, prompts, step_keys[0])

    def step(loop_state: GenerationState, key: PRNGKey) -> tuple[GenerationState, Array]:
        carry, cache, tokens = loop_state
        carry, cache, drawn = draw_next(carry, cache, tokens[None], key)
        return (carry, cache, drawn), drawn

    _, other_tokens = jax.lax.scan(step, (carry, cache, first_tokens), step_keys[1:])
    return jnp.concatenate([first_tokens[None], other_tokens]).T


def draw(logits: Array, key: PRNGKey, temperature: float | Array, top_p: float | Array) -> Array:
    """Draw a token from logits [V]. See `Decoding`."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    sorted_logits = jnp.sort(scaled)[::-1]
    probabilities = jax.nn.softmax(sorted_logits)
    # The nucleus always holds the most likely token.
    is_in_nucleus = jnp.cumsum(probabilities) - probabilities < top_p
    threshold = jnp.where(is_in_nucleus, sorted_logits, jnp.inf).min()
    drawn = jax.random.categorical(key, jnp.where(scaled >= threshold, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
