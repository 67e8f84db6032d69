"""Training of a language model: config → corpus → model → loop → run directory."""

import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from mi.config import UserError, name_config_keys
from mi.lm import config as lm_config
from mi.lm import factory
from mi.lm.data.batches import BatchLoader
from mi.lm.data.corpus import Corpus
from mi.lm.data.streams import Stream
from mi.lm.evaluate import Excerpt, Scores, evaluate
from mi.lm.model import LanguageModel
from mi.lm.trainer import Metrics, TrainState, name_parts
from mi.training import (
    averaging,
    checkpoint,
    logger,
    optim,
    progress,
    run_dir,
    run_mesh,
    sharding,
    utilization,
)


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: run_dir.Steps | None = None
) -> None:
    """Train and evaluate a model, resuming the run if the directory already has one.

    Args:
      config: config of the run.
      workdir: run directory.
      profile: first and last step to record with the profiler, or None for no profile.

    Raises:
      UserError: if the config, the corpus or the directory is invalid, or if the loss becomes
        non-finite.
    """
    lm_config.validate(config)
    corpus = factory.load_corpus(config)
    config = factory.match_size(config, *corpus.sizes)
    with run_dir.open_run(workdir, config, profile) as run:
        _train(config, corpus, run)


def _train(config: ml_collections.ConfigDict, corpus: Corpus, run: run_dir.Run) -> None:
    """Train all seeds in an open run directory."""
    # Devices, batches and the trainer.
    num_steps = config.train.steps
    seeds = np.asarray(config.seeds, np.int32)
    mesh = run_mesh.make_run_mesh(config)
    trainer = factory.build_trainer(config, *corpus.sizes)
    loader = _make_loader(config, corpus, seeds, mesh)
    run.write('data.json', _describe_data(config, corpus))
    costs = factory.compute_costs(config, *corpus.sizes)
    run.write('cost.json', {'steps': num_steps, **costs})
    token_flops = utilization.UPDATE * costs['flops_per_token']['model']
    meter = utilization.Meter(token_flops, mesh.devices.flat)

    # The state: that of the newest checkpoint, or a new one.
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints', config.train.keep)
    restored = _restore_state(config, corpus, checkpoints, run, trainer.shapes(seeds, mesh))
    if restored is None:
        with progress.Work('drawing the initial parameters'):
            train_state = trainer.init_seeds(seeds, mesh)
        meta: checkpoint.Meta = {'step': 0, 'metrics': 0, 'unlogged': []}
    else:
        train_state, meta = restored
    run.step = meta['step']

    # The programs: evaluation is compiled when it is first called.
    evaluate_split = _make_evaluation(config, corpus, trainer.model, run, mesh)
    with progress.Work('compiling the training step'):
        # As an argument, so that the members of a sweep of learning rates share the program.
        learning_rates = sharding.shard_array(
            np.asarray(optim.compute_learning_rates(config.optim, num_steps)),
            sharding.replicated(mesh),
        )
        train_step = trainer.compile(train_state, loader.load(0), mesh, learning_rates)
    is_synchronous = sharding.is_synchronous(mesh)

    # The loop. A run that ended between a checkpoint and its evaluation evaluates first.
    is_evaluation_missing = _skip_finished_evaluation(run, meta, len(seeds))
    valid_scores: list[Scores] = []  # of the newest evaluation
    with run.open_logger(num_steps, meta['metrics']) as run_log:
        log = _TrainingLog(config, run_log, meta, meter)
        if is_evaluation_missing:
            valid_scores = evaluate_split(train_state, 'valid', config.eval.valid_tokens)
            log.write_evaluation(run.step, 'valid', valid_scores)
        for step in range(run.step + 1, num_steps + 1):
            # Update and log.
            train_state, metrics = run.call_traced(
                1, train_step, train_state, loader.load(step - 1), learning_rates
            )
            if is_synchronous:
                jax.block_until_ready(metrics)
            log.add_step(step, metrics)
            run.step = step
            is_record_step = step % config.train.log_every == 0
            if is_record_step or step == num_steps:
                log.write_training(step)

            # Save, before an evaluation, which may take long and be interrupted.
            is_evaluation_step = step % config.train.eval_every == 0 or step == num_steps
            is_stopping = run.should_stop(is_record_step)
            if step % config.train.save_every == 0 or is_evaluation_step or is_stopping:
                logger.refuse_broken_state(config.seeds, step, name_parts(train_state))
                progress_meta = corpus.fingerprint | {'is_evaluated': not is_evaluation_step}
                checkpoints.save(step, train_state, log.get_position() | progress_meta)
                log.resume_clock()
                if is_stopping:
                    run.exit_preempted()

            # Evaluate.
            if is_evaluation_step:
                log.stop_clock()
                valid_scores = evaluate_split(train_state, 'valid', config.eval.valid_tokens)
                log.write_evaluation(step, 'valid', valid_scores)

        # The end: the newest evaluation is not repeated if it has read as many tokens.
        if not valid_scores or config.eval.valid_tokens != config.eval.final_tokens:
            valid_scores = evaluate_split(train_state, 'valid', config.eval.final_tokens)
        log.write_evaluation(num_steps, 'valid_whole', valid_scores)
        test_scores = evaluate_split(train_state, 'test', config.eval.final_tokens)
        log.write_evaluation(num_steps, 'test', test_scores)


def _describe_data(config: ml_collections.ConfigDict, corpus: Corpus) -> dict[str, str]:
    """Return the content of data.json, which identifies the tokens and any tokenizer file."""
    description = {'source': config.data.source, 'sha256': corpus.sha256}
    if corpus.tokenizer_sha256:
        description |= {'tokenizer': config.data.tokenizer}
        description |= {'tokenizer_sha256': corpus.tokenizer_sha256}
    return description


def _make_loader(
    config: ml_collections.ConfigDict,
    corpus: Corpus,
    seeds: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> BatchLoader:
    """Create the loader of training batches for all seeds.

    Raises:
      UserError: if the batch has more streams than the training text has tokens.
    """
    with name_config_keys({'batch': 'config.train.batch'}):
        streams = [
            Stream(corpus.tokens['train'], config.train.batch, config.train.length, seed)
            for seed in config.seeds
        ]
    return BatchLoader(corpus, streams, seeds, config.model.source == 'domain', mesh)


def _make_evaluation(
    config: ml_collections.ConfigDict,
    corpus: Corpus,
    model: LanguageModel,
    run: run_dir.Run,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, str, int], list[Scores]]:
    """Return a function (state, split, number of tokens) → metrics of each seed."""
    model = factory.configure_evaluation(model, config)
    reading = lm_config.get_reading(config)

    def stop_if_signalled() -> None:  # the checkpoint before the evaluation holds the state
        if run.should_stop(recorded=False):
            run.exit_preempted()

    def evaluate_split(state: TrainState, split: str, num_tokens: int) -> list[Scores]:
        excerpt = Excerpt(corpus, split, num_tokens)
        params = averaging.get_seeds_eval_params(state.opt_state, state.params)
        return evaluate(model, params, excerpt, reading, mesh, stop_if_signalled)

    return evaluate_split


def _skip_finished_evaluation(run: run_dir.Run, meta: checkpoint.Meta, num_seeds: int) -> bool:
    """Return whether the evaluation that belongs to the checkpoint is missing.

    If metrics.jsonl has all records of that evaluation, move the position in `meta` to their end.
    """
    num_missing = num_seeds if meta.get('is_evaluated') is False else 0
    position = logger.find_records_end(run.path, meta['metrics'], run.step, num_missing)
    is_missing = bool(sharding.any_process(position is None))
    if position is not None and not is_missing:
        meta['metrics'] = position
    return is_missing


def _restore_state(
    config: ml_collections.ConfigDict,
    corpus: Corpus,
    checkpoints: checkpoint.Checkpoints,
    run: run_dir.Run,
    state_shapes: TrainState,
) -> tuple[TrainState, checkpoint.Meta] | None:
    """Restore the state and the meta of the newest checkpoint, or return None if there is none.

    Raises:
      UserError: if the checkpoint was trained on tokens that differ from those of the corpus.
    """
    restored = checkpoints.restore(state_shapes)
    if restored is not None and not corpus.is_described_by(restored[1]):
        raise UserError(
            f'config.data.source = {config.data.source!r}: expected the tokens that {run.path} was '
            f'trained on, but the text differs. Try restoring the original text, or another '
            f'--workdir'
        )
    return restored


class _TrainingLog:
    """A buffer between the training loop and the logger of the run.

    The metrics of a step are read while the next step runs, so that the device never waits. A
    non-finite value ends the run before its state is saved.

    Args:
      config: config of the run.
      log: logger of the run.
      meta: metadata of the checkpoint from which the run continues.
      meter: meter of device utilization, in tokens per second.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        log: logger.RunLogger,
        meta: checkpoint.Meta,
        meter: utilization.Meter,
    ):
        self._seeds: tuple[int, ...] = tuple(config.seeds)
        self._tokens_per_step = config.train.batch * config.train.length * len(self._seeds)
        self._log, self._meter = log, meter
        self._unlogged: list[list[float]] = meta['unlogged']  # nats of each seed, by step
        self._unread: tuple[int, Metrics] | None = None
        # Steps since the last record and their seconds, which older checkpoints do not have.
        self._steps, self._seconds = meta.get('untimed', (0, 0.0))
        self._clock = time.perf_counter()

    def add_step(self, step: int, metrics: Metrics) -> None:
        """Store the metrics of a step that may still be running, and read the previous ones."""
        self._read()
        self._unread = step, metrics
        self._steps += 1

    def write_training(self, step: int) -> None:
        """Write each seed's mean loss and the speed of the steps since the last record."""
        self.stop_clock()
        nats_per_seed = np.mean(self._unlogged, axis=0).tolist()
        self._unlogged.clear()
        for seed, mean_nats in zip(self._seeds, nats_per_seed, strict=True):
            self._log.write(step, seed, 'train', {'nats_per_token': mean_nats})
        tokens_per_second = self._steps * self._tokens_per_step / self._seconds
        timing = {'seconds': self._seconds, 'tokens_per_second': tokens_per_second}
        timing |= self._meter.measure(tokens_per_second)
        self._log.write_timing(step, timing)
        rate = utilization.format_rate(f'{tokens_per_second:,.0f} tokens/s', timing)
        self._log.show_progress(step, f'{np.mean(nats_per_seed):.4f} nats/token', rate)
        self._steps, self._seconds = 0, 0.0
        self.resume_clock()

    def write_evaluation(self, step: int, split: str, scores: list[Scores]) -> None:
        """Write the metrics of each seed on a held-out split."""
        for seed, score in zip(self._seeds, scores, strict=True):
            self._log.write(step, seed, split, score)
        self.resume_clock()

    def get_position(self) -> checkpoint.Meta:
        """Return the metadata that a checkpoint needs to continue the log from here."""
        self.stop_clock()
        return {
            'metrics': self._log.position(),
            'unlogged': self._unlogged,
            'untimed': [self._steps, self._seconds],
        }

    def stop_clock(self) -> None:
        """Wait for running steps, and stop measuring time until `resume_clock` is called."""
        self._read()
        self._seconds += time.perf_counter() - self._clock

    def resume_clock(self) -> None:
        """Resume measuring training time."""
        self._clock = time.perf_counter()

    def _read(self) -> None:
        """Wait for the metrics of the newest step, and check that they are finite."""
        if self._unread is None:
            return
        step, metrics = self._unread
        self._unread = None
        metric_values = sharding.to_host(metrics)
        logger.refuse_non_finite(self._seeds, step, metric_values)
        self._unlogged.append(metric_values['nats_per_token'].tolist())
