"""Training a language model: config → corpus → model → loop → run directory.

All seeds of a run are trained by one program, vmapped over initialisation, data order and dropout;
arrays with a leading axis of seeds are marked [S, …].
"""

import contextlib
import functools
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

from mi import checkpoint, cost, fusion, optim, run
from mi.config import Rule, UserError, boolean, check, integer, number, one_of, seeds, text
from mi.lm import data, loss
from mi.lm.evaluate import evaluate
from mi.lm.model import SITES, SOURCES, Carry, LanguageModel

SCHEMA: dict[str, Rule] = {
    'task': one_of(['lm']),
    'seeds': seeds,
    'data.source': text,
    'data.level': one_of(data.LEVELS),
    'data.vocabulary': integer(2),
    'data.cache': text,
    'model.embed': integer(1),
    'model.hidden': integer(1),
    'model.layers': integer(1),
    'model.tied': boolean,
    'model.dropout': number(0, 0.99),
    'model.dtype': one_of(['float32', 'bfloat16']),
    'model.site': one_of(SITES),
    'model.source': one_of(SOURCES),
    'model.context': integer(1),
    'model.fusion.name': one_of([word for word in fusion.FUSIONS if word not in fusion.ONE_HOT]),
    'model.fusion.rank': integer(1),
    'model.fusion.hidden': integer(1),
    'match.by': one_of(['none', 'parameters', 'flops']),
    'match.knob': one_of(['hidden', 'rank']),
    'match.target': integer(0),
    'train.steps': integer(1),
    'train.batch': integer(1),
    'train.length': integer(1),
    'train.log_every': integer(1),
    'train.eval_every': integer(1),
    'train.save_every': integer(1),
    'train.keep': integer(1),
    'eval.batch': integer(1),
    'eval.length': integer(1),
    'eval.valid_tokens': integer(0),
    **optim.SCHEMA,
}


@flax.struct.dataclass
class State:
    """What a step changes; in a run every array has a leading axis of seeds."""

    params: Any
    opt_state: optax.OptState
    carry: Carry


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one.

    Raises:
      UserError: for a config, corpus or directory that cannot work, and for a non-finite loss.
    """
    check(config, SCHEMA)
    corpus = data.load(
        config.data.source, config.data.level, config.data.vocabulary, config.data.cache
    )
    config = matched(config, corpus.vocabulary)
    with run.start(workdir, config) as this:
        _train(config, corpus, this)


def build(config: ml_collections.ConfigDict, vocabulary: int) -> LanguageModel:
    """The model of a config; from here on there are typed fields and no config."""
    model = config.model
    return LanguageModel(
        vocabulary=vocabulary,
        embed=model.embed,
        hidden=model.hidden,
        layers=model.layers,
        site=model.site,
        source=model.source,
        context=0 if model.fusion.name == 'none' else model.context,
        fusion=fusion.get(model.fusion.name, rank=model.fusion.rank, hidden=model.fusion.hidden),
        dropout=model.dropout,
        tied=model.tied,
        dtype=jnp.dtype(model.dtype),
    )


def costs(config: ml_collections.ConfigDict, vocabulary: int) -> dict[str, dict[str, int]]:
    """Parameters, and forward FLOPs of products per token, of the model and of its fusion alone."""
    model = build(config, vocabulary)
    T, B, E, m = config.train.length, config.train.batch, config.model.embed, model.context
    tokens = jax.ShapeDtypeStruct((T, B), jnp.int32)
    carry = jax.eval_shape(lambda: model.initial_carry(B))
    variables = jax.eval_shape(model.init, jax.random.key(0), carry, tokens)
    flops = cost.flops(model.apply, variables, carry, tokens) / (T * B)

    fusion_parameters, fusion_flops = 0, 0.0
    inputs = {'encoder': [E], 'decoder': [model.hidden], 'both': [E, model.hidden], 'none': []}
    for n in inputs[model.site]:
        module = model.fusion(E, dtype=model.dtype)
        x, z = (jax.ShapeDtypeStruct((T, B, size), model.dtype) for size in (n, m))
        parameters = jax.eval_shape(module.init, jax.random.key(0), x, z)
        fusion_parameters += cost.parameters(parameters)
        fusion_flops += cost.flops(module.apply, parameters, x, z) / (T * B)
    return {
        'parameters': {'model': cost.parameters(variables), 'fusion': fusion_parameters},
        'flops_per_token': {'model': round(flops), 'fusion': round(fusion_flops)},
    }


def matched(config: ml_collections.ConfigDict, vocabulary: int) -> ml_collections.ConfigDict:
    """The config with the size `match.knob` at which `match.by` comes nearest to its target.

    The target is `match.target`, or the cost of this config as given with the fusion 'concat'.
    """
    if config.match.by == 'none':
        return config
    if config.match.knob == 'rank' and 'rank' not in fusion.has_options(config.model.fusion.name):
        raise UserError(
            f"config.match.knob = 'rank': the fusion {config.model.fusion.name!r} has no rank; "
            f"use 'hidden'"
        )
    kind = 'parameters' if config.match.by == 'parameters' else 'flops_per_token'
    key = 'model.hidden' if config.match.knob == 'hidden' else 'model.fusion.rank'

    def at(changes: dict[str, Any]) -> int:
        return costs(_changed(config, changes), vocabulary)[kind]['model']

    target = config.match.target or at({'model.fusion.name': 'concat'})
    try:
        size = cost.nearest_size(lambda size: at({key: size}), target)
    except ValueError as error:
        raise UserError(f'config.match: {error}; give another config.match.target') from error
    return _changed(config, {key: size})


def init(
    model: LanguageModel, optimiser: optax.GradientTransformation, seed: Array, batch: int
) -> State:
    """The state before the first step of one seed."""
    carry = model.initial_carry(batch)
    key, _ = jax.random.split(jax.random.key(seed))
    params = model.init(key, carry, jnp.zeros((1, batch), jnp.int32))['params']
    return State(params=params, opt_state=optimiser.init(params), carry=carry)


def train_step(
    model: LanguageModel,
    optimiser: optax.GradientTransformation,
    state: State,
    seed: Array,
    step: Array,
    tokens: Array,
) -> tuple[State, dict[str, Array]]:
    """One update of one seed on tokens [T + 1, B]; a pure function."""
    _, key = jax.random.split(jax.random.key(seed))
    rngs = {'dropout': jax.random.fold_in(key, step)}

    def objective(params: Any) -> tuple[Array, Carry]:
        logits: Array
        carry, logits = model.apply(  # type: ignore[assignment]
            {'params': params}, state.carry, tokens[:-1], train=True, rngs=rngs
        )
        return loss.nats(logits, tokens[1:]).mean(), carry

    (nats, carry), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    measured = {'nats_per_token': nats, 'gradient_norm': optax.tree.norm(gradient)}
    return State(params, opt_state, carry), measured


def compile_step(
    model: LanguageModel,
    optimiser: optax.GradientTransformation,
    state: State,
    seeds: Array,
    tokens: np.ndarray,
) -> jax.stages.Compiled:
    """`train_step` of all seeds at once, (state, seeds, step, tokens [S, T + 1, B]) → …

    Compiled ahead, so that another shape is an error and not another compilation. The state is
    donated.
    """
    one_seed = functools.partial(train_step, model, optimiser)

    def all_seeds(state: State, seeds: Array, step: Array, tokens: Array) -> Any:
        if len(seeds) > 1:
            return jax.vmap(one_seed, in_axes=(0, 0, None, 0))(state, seeds, step, tokens)
        alone = jax.tree.map(lambda a: a[0], state)  # a batch of one product is slower
        result = one_seed(alone, seeds[0], step, tokens[0])
        return jax.tree.map(lambda a: a[None], result)

    return (
        jax.jit(all_seeds, donate_argnums=0).lower(state, seeds, jnp.asarray(0), tokens).compile()
    )


def _train(config: ml_collections.ConfigDict, corpus: data.Corpus, this: run.Run) -> None:
    model = build(config, corpus.vocabulary)
    optimiser = optim.optimiser(config.optim, config.train.steps)
    this.write('cost.json', {'steps': config.train.steps, **costs(config, corpus.vocabulary)})
    B, T, steps = config.train.batch, config.train.length, config.train.steps
    seeds = jnp.asarray(config.seeds)
    streams = [data.Stream(corpus.tokens['train'], B, T, seed) for seed in config.seeds]

    state = jax.jit(jax.vmap(lambda seed: init(model, optimiser, seed, B)))(seeds)
    saved = checkpoint.Checkpoints(this.path / 'checkpoints', config.train.keep)
    fresh: dict[str, Any] = {'step': 0, 'metrics': 0, 'unlogged': [], 'data': corpus.sha256}
    state, meta = saved.restore(state) or (state, fresh)
    if meta['data'] != corpus.sha256:
        raise UserError(
            f'{this.path} was trained on other tokens than {config.data.source} has now; restore '
            f'the text, or name another --workdir'
        )
    this.step = meta['step']

    def tokens(step: int) -> np.ndarray:  # [S, T + 1, B]
        return np.stack([stream[step] for stream in streams])

    def held_out(params: Any, split: str, most: int = 0) -> list[dict[str, Any]]:
        return evaluate(model, params, corpus, split, config.eval.batch, config.eval.length, most)

    compiled = compile_step(model, optimiser, state, seeds, tokens(0))

    with _Log(config, this, meta) as log:
        for step in range(this.step + 1, steps + 1):
            state, measured = compiled(state, seeds, jnp.asarray(step - 1), tokens(step - 1))
            log.measured(step, measured)
            this.step = step
            if step % config.train.log_every == 0 or step == steps:
                log.training(step)
            if step % config.train.eval_every == 0 or step == steps:
                log.stop_clock()
                log.evaluation(
                    step, 'valid', held_out(state.params, 'valid', config.eval.valid_tokens)
                )
            stops = this.stops(recorded=step % config.train.log_every == 0)
            if step % config.train.save_every == 0 or step == steps or stops:
                saved.save(step, state, log.position() | {'data': corpus.sha256})
                log.resume_clock()
                if stops and step < steps:
                    this.preempted()
        for split, name in (('valid', 'valid_whole'), ('test', 'test')):
            log.evaluation(steps, name, held_out(state.params, split))


class _Log(contextlib.AbstractContextManager['_Log']):
    """What the loop measured, into the run directory.

    Metrics of a step are read while the next one runs, so that the device never waits; a value that
    is not finite ends the run before anything of it is saved.
    """

    def __init__(self, config: ml_collections.ConfigDict, this: run.Run, meta: dict[str, Any]):
        self._seeds: tuple[int, ...] = tuple(config.seeds)
        self._tokens_per_step = config.train.batch * config.train.length * len(self._seeds)
        self._log = this.log(config.train.steps, meta['metrics'])
        self._unlogged: list[list[float]] = meta['unlogged']  # nats of each seed, by step
        self._unread: tuple[int, dict[str, Array]] | None = None
        self._steps, self._seconds = 0, 0.0  # since the last record, stepping alone
        self._clock = time.perf_counter()

    def measured(self, step: int, values: dict[str, Array]) -> None:
        """Takes the values of a step on its way, reads those of the one before."""
        self._read()
        self._unread = step, values
        self._steps += 1

    def training(self, step: int) -> None:
        """Writes each seed's mean loss since the last record, and what the steps took."""
        self.stop_clock()
        mean = np.mean(self._unlogged, axis=0).tolist()
        self._unlogged.clear()
        for seed, nats in zip(self._seeds, mean, strict=True):
            self._log.write(step, seed, 'train', {'nats_per_token': nats})
        rate = self._steps * self._tokens_per_step / self._seconds
        self._log.timing(step, {'seconds': self._seconds, 'tokens_per_second': rate})
        self._log.progress(step, f'{np.mean(mean):.4f} nats/token', f'{rate:,.0f} tokens/s')
        self._steps, self._seconds = 0, 0.0
        self.resume_clock()

    def evaluation(self, step: int, split: str, results: list[dict[str, Any]]) -> None:
        """Writes each seed's metrics of a held-out split."""
        for seed, result in zip(self._seeds, results, strict=True):
            self._log.write(step, seed, split, result)
        self.resume_clock()

    def position(self) -> dict[str, Any]:
        """What a checkpoint needs to continue the log where it is."""
        self.stop_clock()
        return {'metrics': self._log.position(), 'unlogged': self._unlogged}

    def stop_clock(self) -> None:
        """Waits for the steps on their way; what follows is not training, until `resume_clock`."""
        self._read()
        self._seconds += time.perf_counter() - self._clock

    def resume_clock(self) -> None:
        self._clock = time.perf_counter()

    def _read(self) -> None:
        if self._unread is None:
            return
        step, measured = self._unread
        self._unread = None
        values = {name: np.asarray(value) for name, value in measured.items()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                seed = self._seeds[int(np.argmin(np.isfinite(value)))]
                raise UserError(
                    f'{name} of seed {seed} is not finite at step {step}; nothing of that is saved.'
                    f' Lower config.optim.learning_rate or config.optim.clip_norm'
                )
        self._unlogged.append(values['nats_per_token'].tolist())

    def __exit__(self, *exception: object) -> None:
        self._log.__exit__(*exception)


def _changed(
    config: ml_collections.ConfigDict, changes: dict[str, Any]
) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config
