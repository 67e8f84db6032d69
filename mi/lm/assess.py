"""Evaluation of a trained language model by any protocol (`--mode=eval`)."""

import pathlib
from typing import Any

import ml_collections
import numpy as np
import rich.console
import rich.table

from mi import precision
from mi.lm import config as lm_config
from mi.lm import dynamic_evaluation, factory
from mi.lm.evaluate import Excerpt, evaluate
from mi.lm.restore import restore
from mi.training.io import write_json

SPLITS = ('valid', 'test')


def assess(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Evaluate the newest checkpoint of a run directory as `config.eval` and `config.dynamic` set.

    Print a table and write evaluation.json to the directory. Dynamic evaluation has its own row.

    Raises:
      UserError: if the directory has no complete checkpoint, or has another config.
    """
    # The model.
    path = pathlib.Path(workdir)
    config, corpus, params, step, mesh = restore(config, workdir)
    model = factory.configure_evaluation(factory.build_model(config, *corpus.sizes), config)
    reading = lm_config.get_reading(config)
    adaptation = dynamic_evaluation.Adaptation(**config.dynamic)

    # The metrics, by protocol and seed.
    scores: dict[str, dict[str, Any]] = {}
    with precision.use_config(config):
        for split in SPLITS:
            excerpt = Excerpt(corpus, split, config.eval.final_tokens)
            results = evaluate(model, params, excerpt, reading, mesh)
            if config.dynamic.tokens:
                adapted = dynamic_evaluation.evaluate(model, params, corpus, split, adaptation)
                scores[f'{split}_dynamic'] = dict(zip(map(str, config.seeds), adapted, strict=True))
            scores[split] = dict(zip(map(str, config.seeds), results, strict=True))
    write_json(path / 'evaluation.json', {'step': step, **scores})

    # The table.
    table = rich.table.Table('', 'nats/token', 'perplexity', 'bits/byte', 'how', title=str(path))
    for name, values in sorted(scores.items()):
        rows = list(values.values())
        protocol = ', '.join(f'{key} {value}' for key, value in rows[0]['over'].items())
        keys = 'nats_per_token', 'perplexity', 'bits_per_byte'
        table.add_row(name, *(_format_mean(rows, key) for key in keys), protocol)
    rich.console.Console().print(table)


def _format_mean(rows: list[dict[str, Any]], key: str) -> str:
    """Format the mean over seeds, with the standard deviation of several seeds."""
    if rows[0][key] is None:
        return ''
    values = np.array([row[key] for row in rows])
    spread = f' ± {values.std(ddof=1):.4f}' if len(values) > 1 else ''
    return f'{values.mean():.4f}{spread}'
