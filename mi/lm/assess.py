"""A trained language model, looked at again: other ways to evaluate the same checkpoint."""

import pathlib
from typing import Any

import ml_collections
import numpy as np
import rich.console
import rich.table

from mi import precision
from mi.lm import config as lm_config
from mi.lm import dynamic_evaluation, factory
from mi.lm.evaluate import evaluate
from mi.lm.restore import restore
from mi.training.io import write_json

SPLITS = ('valid', 'test')


def assess(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Evaluates the newest checkpoint of a run directory as `config.eval` and `config.dynamic` say.

    Prints a table and writes evaluation.json there; dynamic evaluation is a row of its own.

    Raises:
      UserError: if the directory has no whole checkpoint, or is of another config.
    """
    path = pathlib.Path(workdir)
    config, corpus, params, step, mesh = restore(config, workdir)
    model = factory.for_evaluation(factory.build(config, *corpus.sizes), config)
    how, adaptation = lm_config.reading(config), dynamic_evaluation.Adaptation(**config.dynamic)
    scores: dict[str, dict[str, Any]] = {}
    with precision.use_config(config):
        for split in SPLITS:
            of_seeds = evaluate(model, params, corpus, split, how, config.eval.final_tokens, mesh)
            if config.dynamic.tokens:
                adapted = dynamic_evaluation.evaluate(model, params, corpus, split, adaptation)
                scores[f'{split}_dynamic'] = dict(zip(map(str, config.seeds), adapted, strict=True))
            scores[split] = dict(zip(map(str, config.seeds), of_seeds, strict=True))
    write_json(path / 'evaluation.json', {'step': step, **scores})
    table = rich.table.Table('', 'nats/token', 'perplexity', 'bits/byte', 'how', title=str(path))
    for name, values in sorted(scores.items()):
        rows = list(values.values())
        over = ', '.join(f'{key} {value}' for key, value in rows[0]['over'].items())
        cells = [_mean(rows, key) for key in ('nats_per_token', 'perplexity', 'bits_per_byte')]
        table.add_row(name, *cells, over)
    rich.console.Console().print(table)


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    """Mean over seeds, and the standard deviation where there are several."""
    if rows[0][key] is None:
        return ''
    values = np.array([row[key] for row in rows])
    spread = f' ± {values.std(ddof=1):.4f}' if len(values) > 1 else ''
    return f'{values.mean():.4f}{spread}'
