"""Training a language model: config → corpus → model → loop → run directory.

All seeds of a run are trained by one program, vmapped over initialisation, data order and dropout;
arrays with a leading axis of seeds are marked [S, …]. Several devices, in one process or in many,
divide seeds, batches and, with `config.train.fsdp`, parameters, see `mi.training.sharding`; the
program is the same.
"""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax import Array

from mi.config import UserError
from mi.lm import config as lm_config
from mi.lm import factory
from mi.lm.data import streams as data_streams
from mi.lm.data import token_store
from mi.lm.evaluate import evaluate
from mi.lm.loss import Losses
from mi.lm.model import Carry, LanguageModel
from mi.rows import get_row_indices, mean_over_rows, select_rows
from mi.training import (
    checkpoint,
    logger,
    optim,
    progress,
    run_dir,
    sharding,
)


@flax.struct.dataclass
class State:
    """What a step changes; in a run every array has a leading axis of seeds."""

    params: Any
    opt_state: optax.OptState
    carry: Carry


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Trains, evaluates and leaves a run directory; continues it where there is one.

    Args:
      profile: first and last of the steps that are recorded, as in `run.start`.

    Raises:
      UserError: for a config, corpus or directory that cannot work, and for a non-finite loss.
    """
    lm_config.validate(config)
    corpus = factory.corpus(config)
    config = factory.matched(config, *corpus.sizes)
    with run_dir.open_run(workdir, config, profile) as run:
        _train(config, corpus, run)


def init(
    model: LanguageModel, optimiser: optax.GradientTransformation, seed: Array, batch: int
) -> State:
    """The state before the first step of one seed."""
    carry = model.initial_carry(batch)
    key, _ = jax.random.split(jax.random.key(seed))
    row = jnp.zeros((1, batch), jnp.int32)
    domains = row if model.source == 'domain' else None
    params = model.init(key, carry, row, None, domains)['params']
    return State(params=params, opt_state=optimiser.init(params), carry=carry)


class Gradient(NamedTuple):
    """The gradient of a batch's mean loss, the loss in nats per token, and the carry after it."""

    params: Any
    nats: Array
    carry: Carry


def gradient(
    model: LanguageModel,
    parts: int,
    partition: Any,
    params: Any,
    carry: Carry,
    seed: Array,
    step: Array,
    tokens: Array,
    domains: Array | None,
) -> Gradient:
    """The gradient of one seed on tokens [T + 1, B]; a pure function.

    Under `jax.shard_map` the batch is this device's rows of it, and the mean is over all devices
    that share it.

    Args:
      model: the model.
      parts: of this device's rows, taken one after another, so that the activations of one part are
        there at a time.
      partition: of the parameters, see `parallel.gather`.
      params: what this device has of the parameters.
      carry: before the first token.
      seed: of the run.
      step: number of updates before; decides with the seed what is dropped.
      tokens: inputs and targets.
      domains: of the tokens, for the source 'domain'.
    """
    _, key = jax.random.split(jax.random.key(seed))
    key = jax.random.fold_in(key, step)

    def objective(params: Any, carry: Carry, part: Any) -> tuple[Array, Any]:
        tokens, domains = part
        rngs = {'dropout': key, 'state': jax.random.fold_in(key, 0)}
        losses: Losses
        carry, losses = model.apply(  # type: ignore[assignment]
            {'params': sharding.gather_params(params, partition)},
            carry,
            tokens[:-1],
            tokens[1:],
            None if domains is None else domains[:-1],
            train=True,
            rngs=rngs,
        )
        return losses.objective.mean(), (losses.nats.mean(), carry)

    differentiate = jax.grad(objective, has_aux=True)
    batch = tokens, domains
    if parts == 1:
        gradients, (nats, carry) = differentiate(params, carry, batch)
    else:

        def add(total: Any, row: Any) -> tuple[Any, Carry]:
            carry, part, numbers = row
            with select_rows(numbers):
                gradients, (nats, carry) = differentiate(params, carry, part)
            return jax.tree.map(lambda a, b: a + b / parts, total, (gradients, nats)), carry

        zeros = jax.tree.map(jnp.zeros_like, (params, jnp.zeros(())))
        numbers = _parts(get_row_indices(tokens.shape[1]), parts, 0)
        rows = _parts(carry, parts, 0), _parts(batch, parts, 1), numbers
        (gradients, nats), carries = jax.lax.scan(add, zeros, rows)
        carry = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), carries)
    return Gradient(sharding.mean_gradients(gradients, partition), mean_over_rows(nats), carry)


def apply_gradient(
    optimiser: optax.GradientTransformation, state: State, gradient: Gradient
) -> tuple[State, dict[str, Array]]:
    """The state of one seed after an update, and what was measured in it."""
    updates, opt_state = optimiser.update(gradient.params, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(gradient.params)
    measured = {'nats_per_token': gradient.nats, 'gradient_norm': norm}
    return State(params, opt_state, gradient.carry), measured


def train_step(
    model: LanguageModel,
    optimiser: optax.GradientTransformation,
    parts: int,
    state: State,
    seed: Array,
    step: Array,
    tokens: Array,
    domains: Array | None,
) -> tuple[State, dict[str, Array]]:
    """One update of one seed on one device, on tokens [T + 1, B]; a pure function."""
    batch = seed, step, tokens, domains
    gradients = gradient(model, parts, None, state.params, state.carry, *batch)
    return apply_gradient(optimiser, state, gradients)


def _parts(tree: Any, parts: int, axis: int) -> Any:
    """Arrays […, B, …] → [parts, …, B / parts, …]: row i is in part i % parts."""

    def of(a: Array) -> Array:
        rows = a.reshape(*a.shape[:axis], -1, parts, *a.shape[axis + 1 :])
        return jnp.moveaxis(rows, axis + 1, 0)

    return jax.tree.map(of, tree)


def start(
    model: LanguageModel,
    optimiser: optax.GradientTransformation,
    seeds: np.ndarray,
    batch: int,
    mesh: jax.sharding.Mesh,
) -> State:
    """The state of all seeds, [S, …], each array where the mesh has it."""
    fresh = jax.vmap(lambda seed: init(model, optimiser, seed, batch))
    like = shapes(model, optimiser, seeds, batch, mesh)
    return sharding.jit_once(fresh, seeds, out_shardings=jax.tree.map(lambda a: a.sharding, like))


def shapes(
    model: LanguageModel,
    optimiser: optax.GradientTransformation,
    seeds: np.ndarray,
    batch: int,
    mesh: jax.sharding.Mesh,
) -> State:
    """What `start` makes, as `jax.ShapeDtypeStruct`s with their shardings."""
    state = jax.eval_shape(jax.vmap(lambda seed: init(model, optimiser, seed, batch)), seeds)
    return sharding.with_shardings(
        state,
        State(
            params=sharding.fsdp_sharding(state.params, mesh),
            opt_state=sharding.fsdp_sharding(state.opt_state, mesh),
            carry=jax.tree.map(
                lambda _: sharding.batch_sharding(mesh, 1, has_seeds=True), state.carry
            ),
        ),
    )


def compile_step(
    model: LanguageModel,
    optimiser: optax.GradientTransformation,
    parts: int,
    state: State,
    seeds: np.ndarray,
    tokens: Array,
    domains: Array | None,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Compiled:
    """One update of all seeds, (state, seeds, step, tokens [S, T + 1, B], domains) → …

    Each device computes the gradient of its seeds on its rows. The optimizer sees whole arrays, so
    that any is right, and the partitioner splits it as the parameters are split.

    Compiled ahead, so that another shape is an error and not another compilation. The state is
    donated.
    """
    specs = sharding.partition_specs(state)
    rows = sharding.batch_sharding(mesh, 2, has_seeds=True).spec
    by_seed, everywhere = sharding.seed_sharding(mesh).spec, sharding.replicated(mesh).spec
    parts_of_device = math.gcd(parts, tokens.shape[2] // (mesh.size // mesh.shape['seed']))
    partition = sharding.fsdp_specs(state.params, mesh)
    one_seed: Any = functools.partial(gradient, model, parts_of_device, partition)
    out_specs: Any = specs.params, by_seed, specs.carry

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs.params, specs.carry, by_seed, everywhere, rows, rows),
        out_specs=Gradient(*out_specs),
        check_vma=False,
    )
    def gradients(
        params: Any, carry: Carry, seeds: Array, step: Array, tokens: Array, domains: Any
    ) -> Gradient:
        return _over_seeds(
            lambda params, carry, seed, tokens, domains: one_seed(
                params, carry, seed, step, tokens, domains
            ),
            params, carry, seeds, tokens, domains,
        )  # fmt: skip

    def all_seeds(state: State, seeds: Array, step: Array, tokens: Array, domains: Any) -> Any:
        gradient = gradients(state.params, state.carry, seeds, step, tokens, domains)
        return _over_seeds(functools.partial(apply_gradient, optimiser), state, gradient)

    shardings = jax.tree.map(lambda a: a.sharding, state), sharding.metrics_sharding(mesh)
    jitted = jax.jit(all_seeds, donate_argnums=0, out_shardings=shardings)
    placed_seeds = jax.ShapeDtypeStruct(
        seeds.shape, seeds.dtype, sharding=sharding.seed_sharding(mesh)
    )
    return jitted.lower(state, placed_seeds, np.int32(0), tokens, domains).compile()


def _over_seeds(function: Callable[..., Any], *args: Any) -> Any:
    """Return the function of each seed; without vmap of one, as its products are faster then."""
    if len(jax.tree.leaves(args)[0]) > 1:
        return jax.vmap(function)(*args)
    result = function(*jax.tree.map(lambda a: a[0], args))
    return jax.tree.map(lambda a: a[None], result)


def _train(config: ml_collections.ConfigDict, corpus: token_store.Corpus, run: run_dir.Run) -> None:
    model = factory.build(config, *corpus.sizes)
    B, T, steps = config.train.batch, config.train.length, config.train.steps
    optimiser = optim.make_optimizer(config.optim, steps)
    run.write('cost.json', {'steps': steps, **factory.costs(config, *corpus.sizes)})
    seeds = np.asarray(config.seeds, np.int32)
    mesh = sharding.make_mesh(len(seeds), B, config.train.fsdp, config.train.mesh)
    streams = [data_streams.Stream(corpus.tokens['train'], B, T, seed) for seed in config.seeds]
    batch_sharding = sharding.batch_sharding(mesh, 2, has_seeds=True)
    placed_seeds = sharding.shard_array(seeds, sharding.seed_sharding(mesh))

    with progress.Work('drawing the initial parameters'):
        state = start(model, optimiser, seeds, B, mesh)
    saved = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    fresh: dict[str, Any] = {'step': 0, 'metrics': 0, 'unlogged': [], 'data': corpus.sha256}
    state, meta = saved.restore(state) or (state, fresh)
    _same_tokens(run.path, config, corpus, meta)
    run.step = meta['step']

    def batch(step: int) -> tuple[Array, Array | None]:  # tokens and domains, each [S, T + 1, B]
        def put(values: Callable[[np.ndarray], np.ndarray]) -> Array:
            """Give each device the values at its positions."""

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                mine = [stream.positions(step, index[2]) for stream in streams[index[0]]]
                return values(np.stack(mine))

            shape = len(seeds), T + 1, B
            return jax.make_array_from_callback(shape, batch_sharding, part)

        text = corpus.tokens['train']
        tokens = put(lambda positions: text[positions].astype(np.int32))
        if config.model.source != 'domain':
            return tokens, None
        return tokens, put(functools.partial(corpus.domain, 'train'))

    def end_if_asked() -> None:  # in an evaluation, which comes after its checkpoint
        if run.should_stop(recorded=False):
            run.exit_preempted()

    def held_out(params: Any, split: str, most: int) -> list[dict[str, Any]]:
        return evaluate(
            factory.for_evaluation(model, config),
            params,
            corpus,
            split,
            lm_config.reading(config),
            most,
            mesh,
            end_if_asked,
        )

    with progress.Work('compiling the training step'):
        compiled = compile_step(
            model, optimiser, config.train.accumulate, state, seeds, *batch(0), mesh
        )
    one_at_a_time = sharding.platform(mesh) == 'cpu' and mesh.size > 1  # queued ones hang there

    # A run that ended between a checkpoint and the evaluation of its step has that to do still.
    pending = len(seeds) if meta.get('is_evaluated') is False else 0
    position = logger.find_records_end(run.path, meta['metrics'], run.step, pending)
    is_pending = sharding.any_process(position is None)
    if position is not None and not is_pending:
        meta['metrics'] = position

    with _Log(config, run, meta) as log:
        if is_pending:
            scores = held_out(state.params, 'valid', config.eval.valid_tokens)
            log.evaluation(run.step, 'valid', scores)
        for step in range(run.step + 1, steps + 1):
            arrays = state, placed_seeds, np.int32(step - 1), *batch(step - 1)
            state, measured = run.call_traced(1, compiled, *arrays)
            if one_at_a_time:
                jax.block_until_ready(measured)
            log.measured(step, measured)
            run.step = step
            recorded = step % config.train.log_every == 0
            if recorded or step == steps:
                log.training(step)
            evaluates = step % config.train.eval_every == 0 or step == steps
            stops = run.should_stop(recorded)
            # The checkpoint comes before the evaluation, which may take long and be cut short.
            if step % config.train.save_every == 0 or evaluates or stops:
                parts = {'parameters': state.params, 'moments of the optimizer': state.opt_state}
                logger.refuse_broken_state(config.seeds, step, parts)
                saved.save(
                    step,
                    state,
                    log.position() | {'data': corpus.sha256, 'is_evaluated': not evaluates},
                )
                log.resume_clock()
                if stops:
                    run.exit_preempted()
            if evaluates:
                log.stop_clock()
                scores = held_out(state.params, 'valid', config.eval.valid_tokens)
                log.evaluation(step, 'valid', scores)
        for split, name in (('valid', 'valid_whole'), ('test', 'test')):
            log.evaluation(steps, name, held_out(state.params, split, config.eval.final_tokens))


def _same_tokens(
    path: pathlib.Path,
    config: ml_collections.ConfigDict,
    corpus: token_store.Corpus,
    meta: Mapping[str, Any],
) -> None:
    if meta['data'] != corpus.sha256:
        raise UserError(
            f'{path} was trained on other tokens than {config.data.source} has now; restore the '
            f'text, or name another --workdir'
        )


class _Log(contextlib.AbstractContextManager['_Log']):
    """What the loop measured, into the run directory.

    Metrics of a step are read while the next one runs, so that the device never waits; a value that
    is not finite ends the run before anything of it is saved.
    """

    def __init__(self, config: ml_collections.ConfigDict, run: run_dir.Run, meta: dict[str, Any]):
        self._seeds: tuple[int, ...] = tuple(config.seeds)
        self._tokens_per_step = config.train.batch * config.train.length * len(self._seeds)
        self._log = run.open_logger(config.train.steps, meta['metrics'])
        self._unlogged: list[list[float]] = meta['unlogged']  # nats of each seed, by step
        self._unread: tuple[int, dict[str, Array]] | None = None
        # Since the last record, stepping alone; older checkpoints do not have it.
        self._steps, self._seconds = meta.get('untimed', (0, 0.0))
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
        self._log.write_timing(step, {'seconds': self._seconds, 'tokens_per_second': rate})
        self._log.show_progress(step, f'{np.mean(mean):.4f} nats/token', f'{rate:,.0f} tokens/s')
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
        return {
            'metrics': self._log.position(),
            'unlogged': self._unlogged,
            'untimed': [self._steps, self._seconds],
        }

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
        values = sharding.to_host(measured)
        logger.refuse_non_finite(self._seeds, step, values)
        self._unlogged.append(values['nats_per_token'].tolist())

    def __exit__(self, *exception: object) -> None:
        self._log.__exit__(*exception)
