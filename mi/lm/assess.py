"""Evaluation of a trained language model (`--mode=eval`)."""

import pathlib

import ml_collections
import numpy as np
import rich.console
import rich.table

from mi import precision
from mi.config import UserError
from mi.lm import config as lm_config
from mi.lm import dynamic_evaluation, factory
from mi.lm.data.corpus import Corpus
from mi.lm.evaluate import Excerpt, Scores, evaluate
from mi.lm.model import LanguageModel, Params
from mi.lm.restore import restore
from mi.training.io import write_json

SPLITS = ('valid', 'test')


def assess(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Evaluate the newest checkpoint in a run directory.

    Print a table and write evaluation.json to the directory. Dynamic evaluation has its own row.

    Args:
      config: config whose sections `eval` and `dynamic` choose the protocol.
      workdir: run directory.

    Raises:
      UserError: if the directory has no complete checkpoint, if its config does not match, or if
        dynamic evaluation diverges.
    """
    # The model.
    run_path = pathlib.Path(workdir)
    config, corpus, params, step, mesh = restore(config, workdir)
    model = factory.configure_evaluation(factory.build_model(config, *corpus.sizes), config)
    reading = lm_config.get_reading(config)
    adaptation = dynamic_evaluation.Adaptation(**config.dynamic)

    # The metrics, by protocol and seed.
    scores: dict[str, dict[str, Scores]] = {}
    with precision.use_config(config):
        for split in SPLITS:
            excerpt = Excerpt(corpus, split, config.eval.final_tokens)
            results = evaluate(model, params, excerpt, reading, mesh)
            scores[split] = dict(zip(map(str, config.seeds), results, strict=True))
        if config.dynamic.tokens:
            adapted = _evaluate_dynamically(model, params, corpus, adaptation)
            for split, results in adapted.items():
                scores[f'{split}_dynamic'] = dict(zip(map(str, config.seeds), results, strict=True))
    write_json(run_path / 'evaluation.json', {'step': step, **scores})

    # The table.
    headers = '', 'nats/token', 'perplexity', 'bits/byte', 'how'
    score_table = rich.table.Table(*headers, title=str(run_path))
    for protocol_name, scores_by_seed in sorted(scores.items()):
        seed_scores = list(scores_by_seed.values())
        protocol = seed_scores[0]['over']
        description = ', '.join(f'{option} {setting}' for option, setting in protocol.items())
        columns = 'nats_per_token', 'perplexity', 'bits_per_byte'
        means = [_format_mean(seed_scores, column) for column in columns]
        score_table.add_row(protocol_name, *means, description)
    rich.console.Console().print(score_table)


def _evaluate_dynamically(
    model: LanguageModel,
    params: Params,
    corpus: Corpus,
    adaptation: dynamic_evaluation.Adaptation,
) -> dict[str, list[Scores]]:
    """Run dynamic evaluation and return its metrics, or raise UserError if it diverges."""
    try:
        return dynamic_evaluation.evaluate(model, params, corpus, SPLITS, adaptation)
    except FloatingPointError as error:
        raise UserError(
            f'{error}. Try a config.dynamic.learning_rate below {adaptation.learning_rate}, a '
            f'config.dynamic.epsilon above {adaptation.epsilon}, or a config.dynamic.statistics '
            f'above {adaptation.statistics}'
        ) from error


def _format_mean(seed_scores: list[Scores], column: str) -> str:
    """Format the mean over seeds, and the standard deviation if there are several seeds."""
    if seed_scores[0][column] is None:
        return ''
    values = np.array([score[column] for score in seed_scores])
    spread = f' ± {values.std(ddof=1):.4f}' if len(values) > 1 else ''
    return f'{values.mean():.4f}{spread}'
