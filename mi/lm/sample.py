"""Text from a trained language model, one token after another."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from mi import progress
from mi.config import UserError
from mi.lm import setup
from mi.lm.model import LanguageModel
from mi.lm.restore import restore
from mi.run import write_json


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
    model = setup.for_sampling(setup.build(config, *corpus.sizes), config)
    texts = []
    for i, seed in enumerate(config.seeds):
        of_seed = jax.tree.map(lambda a, i=i: a[i], params)
        with progress.Work(f'writing {options.tokens:,} tokens'):
            tokens = generate(
                model,
                of_seed,
                jnp.asarray(prompt, jnp.int32),
                jax.random.key(seed),
                options.tokens,
                options.temperature,
                options.top_p,
            )
            text = corpus.decode(tokens)
        texts.append(text)
        print(f'--- seed {seed}, step {step}\n{options.prompt}{texts[-1]}')
    write_json(
        path / 'samples.json',
        {'step': step, **options.to_dict(), 'seeds': list(config.seeds), 'texts': texts},
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def generate(
    model: LanguageModel,
    params: Any,
    prompt: Array,
    key: Array,
    count: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Array:
    """`count` tokens after the prompt [P].

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
    """
    model = model.decoder()
    carry = model.initial_carry(1)
    whole = jnp.zeros((len(prompt) + count, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), carry, whole)
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables.get('cache', {}))

    def next_of(carry: Any, cache: Any, tokens: Array, key: Array) -> Any:
        (carry, logits), updated = model.apply(
            {'params': params, 'cache': cache}, carry, tokens[:, None], mutable=['cache']
        )
        token = draw(logits[-1, 0], key, temperature, top_p)
        return carry, updated.get('cache', {}), token

    keys = jax.random.split(key, count)
    carry, cache, first = next_of(carry, cache, prompt, keys[0])

    def step(state: Any, key: Array) -> tuple[Any, Array]:
        carry, cache, token = state
        carry, cache, after = next_of(carry, cache, token[None], key)
        return (carry, cache, after), after

    _, rest = jax.lax.scan(step, (carry, cache, first), keys[1:])
    return jnp.concatenate([first[None], rest])


def draw(logits: Array, key: Array, temperature: float | Array, top_p: float | Array) -> Array:
    """A token from logits [V]; see `generate`."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled)[::-1]
    probability = jax.nn.softmax(ordered)
    inside = jnp.cumsum(probability) - probability < top_p  # the likeliest always is
    lowest = jnp.where(inside, ordered, jnp.inf).min()
    drawn = jax.random.categorical(key, jnp.where(scaled >= lowest, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
